"""The page of `cwpo ask` in a real browser: people label on it, and the file has what they said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Open
from test_browser import HOSTILE

from cwpo_dist.report.questions import Question, page

LARGE = {"id": 9007199254740993, "share": 1.0, "huge": 1e30}


def question(k: int, said: str = "") -> Question:
    shown = f"Question {k}? {said}", f"answer a of {k} {said}", f"answer b of {k} {said}"
    row = {"pair_id": f"{k:032x}", "prompt": shown[0], "tools": [LARGE]}
    return Question(f"{k:032x}", row | {"response_a": shown[1], "response_b": shown[2]}, shown)


def html(count: int, said: str = "") -> str:
    return page("key", [question(k, said) for k in range(count)]).decode()


def left(page: Any) -> str:
    """Which answer stands on the left."""
    return str(page.locator(".answer .prose").first.inner_text().split()[1])


def saved(page: Any, folder: Path) -> list[dict[str, Any]]:
    with page.expect_download() as download:
        page.click("#save")
    file = folder / download.value.suggested_filename
    download.value.save_as(file)
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_twelve_questions_from_the_keyboard(opened: Open, tmp_path: Path, scheme: str) -> None:
    """What is better on the left is a vote for whichever answer stood there."""
    shown = opened(html(12), color_scheme=scheme, accept_downloads=True)
    shown.evaluate("document.activeElement.blur()")  # it asks for a name first
    shown.keyboard.press("1")
    assert shown.locator("#count").inner_text() == "0 of 12 answered", "whose answer would it be?"
    assert shown.locator("#save").is_disabled()
    assert not shown.locator("#question").is_visible()
    shown.fill("#name", "Ann O'Neil")
    shown.locator("body").click(position={"x": 2, "y": 2})
    expected = []
    for k, key in enumerate("123412341231"):
        assert shown.locator("#place").inner_text() == f"question {k + 1} of 12"
        first = left(shown)
        other = "b" if first == "a" else "a"
        expected.append({"1": first, "2": other, "3": "tie", "4": None}[key])
        shown.keyboard.press(key)
    assert shown.locator("#count").inner_text() == '12 of 12 answered, 2 of them "cannot say"'
    assert {"a", "b"} < set(expected), "both keys chose both answers"
    rows = saved(shown, tmp_path)
    assert (tmp_path / "answers-Ann-O-Neil-key.jsonl").exists()
    voted = {
        row["pair_id"]: next(x for x in ("a", "b", "tie") if row[f"votes_{x}"]) for row in rows
    }
    assert voted == {f"{k:032x}": said for k, said in enumerate(expected) if said is not None}
    for row in rows:
        assert sum(row[f"votes_{x}"] for x in ("a", "b", "tie")) == 1
        assert row["tools"] == [LARGE], "no number is rounded on its way"
        assert row["annotator"] == "Ann O'Neil"


def test_what_was_said_stays_and_can_be_corrected(opened: Open, tmp_path: Path) -> None:
    shown = opened(html(3), accept_downloads=True)
    shown.fill("#name", "Ann")
    for button in ("1 · Left is better", "2 · Right is better"):
        shown.get_by_role("button", name=button).click()
    assert shown.locator("#count").inner_text() == "2 of 3 answered"
    before = saved(shown, tmp_path)
    assert "Saved as answers-Ann-key.jsonl" in shown.locator("#told").inner_text()
    for _ in range(20):  # a busy browser takes its time until another load finds what it stored
        shown.reload()
        if "Answers" in shown.locator("#told").inner_text():
            break
    assert "Answers are kept here: 2 as Ann." in shown.locator("#told").inner_text()
    shown.fill("#name", "Ben")
    assert shown.locator("#count").inner_text() == "0 of 3 answered", "another person's"
    shown.fill("#name", "Ann")
    assert shown.locator("#count").inner_text() == "2 of 3 answered"
    assert shown.locator("#place").inner_text() == "question 3 of 3", "the first that is left"
    shown.locator("#back").click()
    pressed = shown.locator("#choices [aria-pressed=true]")
    assert pressed.inner_text() == "2 · Right is better"
    shown.get_by_role("button", name="3 · Both are equal").click()
    after = saved(shown, tmp_path)
    assert after[0] == before[0]
    assert after[1] | {"votes_tie": 0} == before[1] | {"votes_a": 0, "votes_b": 0}


def test_a_browser_that_keeps_nothing_says_so_and_loses_nothing(opened: Open) -> None:
    """A name that is corrected takes no answers with it; what is left is said at the end."""
    full = "void (Storage.prototype.setItem = () => { throw new Error('full'); })"
    shown = opened(html(3))
    shown.evaluate(full)
    shown.fill("#name", "An")
    shown.locator("body").click(position={"x": 2, "y": 2})
    shown.keyboard.press("1")
    assert "keeps nothing" in shown.locator("#told").inner_text()
    shown.fill("#name", "Ann")
    assert shown.locator("#told").inner_text() == "Answers are kept here: 1 as An."
    shown.fill("#name", "An")
    assert shown.locator("#count").inner_text() == "1 of 3 answered"
    shown.press("#name", "Enter")
    shown.keyboard.press("1")
    assert shown.locator("#count").inner_text() == "2 of 3 answered"
    assert shown.locator("#name").input_value() == "An"
    shown.locator("#back").click()
    shown.locator("#back").click()
    assert shown.locator("#place").inner_text() == "question 1 of 3"


def test_sides_are_drawn_for_each_person_and_question(opened: Open) -> None:
    shown = opened(html(30))
    orders = []
    for name in ("Ann", "Ben"):
        shown.fill("#name", name)
        order = [left(shown)]
        for _ in range(29):
            shown.locator("#next").click()
            order.append(left(shown))
        for _ in range(29):
            shown.locator("#back").click()
        orders.append(order)
    for order in orders:
        assert 5 <= order.count("a") <= 25
    assert orders[0] != orders[1]


def test_hostile_text_is_shown_and_does_nothing(opened: Open, tmp_path: Path) -> None:
    shown = opened(html(2, HOSTILE), accept_downloads=True, viewport={"width": 380, "height": 800})
    shown.fill("#name", '"><img src=x onerror=alert(1)>__proto__')
    assert shown.evaluate("window.pwned") is None
    assert shown.locator("script").count() == 2
    assert shown.locator("main :is(img, iframe, a, textarea)").count() == 0
    text = shown.locator(".prose").first.inner_text()
    assert "<script>window.pwned=1</script>" in text
    assert "⟨U+202E⟩gnp.exe" in text
    assert shown.evaluate("document.documentElement.scrollWidth") <= 380
    shown.get_by_role("button", name="1 · Left is better").click()
    rows = saved(shown, tmp_path)
    assert len(rows) == 1
    assert shown.evaluate("window.pwned") is None
