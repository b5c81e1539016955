"""The report in a real browser: it draws without complaint, filters, and runs nobody's text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import Open
from test_comparison_page import difference, sample_comparison
from test_report import sample_metrics, sample_pairs

from cwpo_dist.report.comparison_page import render_comparison
from cwpo_dist.report.page import render

HOSTILE = (
    "<script>window.pwned=1</script></script><script>window.pwned=2</script>"
    "<img src=x onerror=\"window.pwned=3\"><svg onload='window.pwned=4'>"
    '<a href="javascript:window.pwned=5">link</a><iframe srcdoc="<script>top.pwned=6</script>">'
    "]]>--><!-- \u202egnp.exe\u202c \u2066isolate \u2028line \x00\x07 \ud800 ${window.pwned=7} "
    "</textarea></title></style>" + "W" * 20_000
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_draws_without_complaint(opened: Open, scheme: str) -> None:
    page = opened(render(sample_metrics(), sample_pairs()), color_scheme=scheme)
    assert page.locator("#explorer-count").inner_text() == "60 of 60 pairs"
    assert page.locator(".pair").count() == 5
    paper, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        ".map(c => c.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b))"
    )
    assert (paper > ink) == (scheme == "light")


def test_a_narrow_screen_needs_no_sideways_scrolling(opened: Open) -> None:
    page = opened(
        render(sample_metrics(), sample_pairs(5, HOSTILE)), viewport={"width": 380, "height": 800}
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 380


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_comparison_draws_without_complaint_on_any_screen(opened: Open, scheme: str) -> None:
    html = render_comparison(sample_comparison(HOSTILE[:300]))
    page = opened(html, color_scheme=scheme, viewport={"width": 380, "height": 800})
    for plot in page.locator("svg").all():
        box = plot.bounding_box()
        assert 0 < box["x"] < box["x"] + box["width"] <= 380, "no plot has to be scrolled"
    assert page.locator("nav a").all_inner_texts() == [
        *("What came out", "Figures", "Plots", "Single runs", "Provenance"),
    ]
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).count() == 1
    assert page.locator("script").count() == 0
    assert page.locator("figure svg").count() == 2, "the differences, and each trial's own figure"
    assert "cw: 4.0 points above" in page.locator("main li").first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    assert page.pdf(format="A4").startswith(b"%PDF")


def many_trials() -> dict[str, Any]:
    """Twelve trials, so that tables are as wide as they get, with every figure that there is."""
    found = sample_comparison()
    told, whole = found["trials"]["cw"], difference(0.5, 0.1)
    own = ["accuracy", "length_balanced", "length"]
    own += ["gra_own_sft", "gra_common", "ties_own_sft", "ties_common"]
    known = ["labels_right", "least_confident", "most_confident", "calibration_error", "kl"]
    known += ["mean_confidence", "margin_length", "pairs", "steps", "sft_loss", "device_hours"]
    known += ["brier", "nll"]
    names = ["human", *(f"cw_mean, {k} % labelled" for k in range(11))]
    told |= {"figures": dict.fromkeys(own, whole), "by_seed": dict.fromkeys(known, whole)}
    against = dict.fromkeys(names, dict.fromkeys(own, difference(-0.152, 0.1)))
    return found | {"trials": dict.fromkeys(names, told | {"against": against})}


def cut(page: Any, width: int) -> list[str]:
    """What reaches over the right edge."""
    page.set_viewport_size({"width": width, "height": 1000})
    reaches: list[str] = page.evaluate(
        "[...document.querySelectorAll('table, td, th, svg, pre, p')].filter("
        "e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 99))"
    )
    return reaches


A4 = 703  # pixels between the margins


def test_paper_cuts_no_column_and_shows_the_configuration(opened: Open) -> None:
    metrics = sample_metrics()
    arm = metrics["arms"]["cw"]
    metrics["arms"] = {  # an annotator each: its table has as many columns
        f"cw, {k} % labelled": arm | {"annotator": arm["annotator"] | {"other": k}}
        for k in range(9)
    }
    long = {"config": {f"key {k}": k for k in range(99)}}
    pages = render_comparison(many_trials() | long), render(metrics | long, sample_pairs(3))
    for html in pages:
        page = opened(html)
        assert page.locator("table").count() > 3
        page.emulate_media(media="print")
        assert cut(page, A4) == []
        assert "key 98: 98" in page.locator("pre[role=region]").inner_text()
        assert page.locator("pre[role=region]").evaluate(
            "e => e.scrollHeight <= e.clientHeight + 1"
        )


def test_a_wide_table_keeps_the_names_of_its_rows_in_sight(opened: Open) -> None:
    page = opened(render_comparison(many_trials()), viewport={"width": 380, "height": 800})
    table = page.get_by_role("region", name="Accuracy, each trial less each other")
    name = table.locator("tbody th").last
    assert table.evaluate("e => e.scrollWidth > e.clientWidth")
    assert table.evaluate("e => getComputedStyle(e).backgroundImage").count("gradient") == 2
    before = name.bounding_box()["x"]
    table.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("e => e.scrollLeft > 0", arg=table.element_handle())
    assert name.bounding_box()["x"] == before


def test_it_prints(opened: Open) -> None:
    page = opened(render(sample_metrics(), sample_pairs()))
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.emulate_media(media="print")
    assert not page.locator("#explorer-form").is_visible()
    assert page.locator(".pair").first.is_visible()


def shown(page: Any) -> int:
    return int(page.locator("#explorer-count").inner_text().split()[0])


def test_filters_say_what_python_says(opened: Open) -> None:
    import math

    sample = sample_pairs()
    pairs, page = sample["pairs"], opened(render(sample_metrics(), sample))

    def expect(keep: Callable[[dict[str, Any]], bool]) -> None:
        count = sum(map(keep, pairs))
        assert 0 < count < len(pairs), "a filter that keeps all or none shows nothing"
        assert shown(page) == count

    def sure(pair: dict[str, Any]) -> float:
        return math.tanh(abs(pair["margin"]) / 2)

    def wrong(pair: dict[str, Any]) -> bool:
        return pair["label"] not in (None, "a" if pair["margin"] >= 0 else "b")

    page.fill("[name=low]", "0.5")
    expect(lambda pair: sure(pair) >= 0.5)
    page.select_option("[name=show]", "wrong")
    expect(lambda pair: sure(pair) >= 0.5 and wrong(pair))
    assert "contradicts the human label" in page.locator(".facts").first.inner_text()
    page.fill("[name=low]", "")
    page.select_option("[name=show]", "split")
    expect(lambda pair: pair["margins"][0] * pair["margins"][1] < 0)
    page.click("text=Clear")
    page.wait_for_function("document.getElementById('explorer-count').textContent.startsWith('60')")
    page.fill("[name=short]", "150")
    expect(lambda pair: max(len(pair["a"]), len(pair["b"])) >= 150)
    page.fill("[name=short]", "")
    page.select_option("[name=split]", "unlabelled")
    expect(lambda pair: pair["split"] == "unlabelled")
    page.select_option("[name=split]", "")
    page.fill("[name=words]", "NUMBER 5")
    expect(lambda pair: "number 5" in pair["prompt"])
    page.fill("[name=words]", "")
    page.select_option("[name=order]", "sure")
    confident = max(map(sure, pairs))
    assert f"confidence {confident:.2f}" in page.locator(".facts").first.inner_text()


def test_it_works_from_the_keyboard(opened: Open) -> None:
    page = opened(render(sample_metrics(), sample_pairs()))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.focus("#explorer-next")
    page.keyboard.press("Enter")
    assert page.locator("#explorer-place").inner_text() == "page 2 of 12"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#explorer-place").inner_text() == "page 1 of 12"
    page.focus("[name=show]")
    page.keyboard.type("annotator against")
    assert shown(page) < 60
    unnamed = page.evaluate(
        "[...document.querySelectorAll('#explorer-form input, #explorer-form select')]"
        ".filter(e => !e.labels.length && !e.ariaLabel).length"
    )
    assert unnamed == 0


def test_before_and_after_stand_side_by_side(opened: Open) -> None:
    page = opened(render(sample_metrics(), sample_pairs()))
    page.select_option("[name=show]", "answers")
    page.select_option("[name=arm]", "cw")
    assert shown(page) == 10
    card = page.locator(".pair").first
    before, after = card.locator(".answers").nth(1).locator(".prose").all()
    assert (before.inner_text().strip(), after.inner_text().strip()) == ("before 0", "after 0")
    assert before.bounding_box()["y"] == after.bounding_box()["y"]


def test_hostile_text_is_shown_and_does_nothing(opened: Open) -> None:
    metrics = sample_metrics()
    metrics["arms"] = {f"{HOSTILE[:300]}{k}": arm for k, arm in enumerate(metrics["arms"].values())}
    metrics["run"]["output_dir"] = HOSTILE[:300]
    sample = sample_pairs(12, HOSTILE)
    sample["arms"] = [HOSTILE[:300], "__proto__", "cw"]
    for pair in sample["pairs"]:
        pair["split"] = HOSTILE[:200]
    html = render(metrics, sample)
    html.encode()  # also with a lone surrogate
    page = opened(html)
    page.select_option("[name=arm]", "cw")
    assert page.evaluate("window.pwned") is None
    assert page.locator("script").count() == 2
    assert page.locator("main :is(img, iframe, a, textarea)").count() == 0
    text = page.locator(".pair .prose").first.inner_text()
    assert "<script>window.pwned=1</script>" in text
    assert "⟨U+202E⟩gnp.exe" in text
    box = page.locator(".pair").first.bounding_box()
    assert box["width"] < 1200
    assert box["height"] < 3000
    page.select_option("[name=arm]", "__proto__")
    assert page.locator(".pair .answers").count() == 5


def test_an_injected_script_would_not_run_either(opened: Open, browser: Any) -> None:
    """The policy names one script by its hash: markup that slipped through stays dead."""
    html = render(sample_metrics(), sample_pairs())
    html = html.replace("</main>", "<script>window.pwned=1</script></main>")
    context = browser.new_context(offline=True)
    page = context.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.set_content(html)
    assert page.evaluate("window.pwned") is None
    assert any("Content Security Policy" in text for text in refused)
    context.close()


def test_a_million_pairs_stay_below_five_megabytes(opened: Open) -> None:
    html = render(sample_metrics(), sample_pairs(600, "word " * 2_000))
    assert 3_000_000 < len(html.encode()) < 5_000_000
    page = opened(html)
    assert 0 < shown(page) < 600
    assert "of 1,000,000 pairs" in page.locator("#explorer-top").inner_text()
