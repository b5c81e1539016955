"""Pairs that people shall label in; one page to label them in, or an import of Label Studio, out.

Nobody is told what an annotator thinks of a pair, and each person sees its answers in an order of
their own. The page opens offline and sends nothing: what was said lies in the browser, and in a
file of votes that `prepare` reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cwpo_dist.report.explorer import embedded_json, hash_of, script_of
from cwpo_dist.report.page import TEMPLATES

SCRIPT = script_of("questions.js")
SHOWN = ("shown_prompt", "shown_a", "shown_b")
# Its labelling interface. `winner` is what a source's `columns` name.
LABEL_STUDIO = """<View>
  <Style>.text {white-space: pre-wrap; overflow-wrap: anywhere; display: block}</Style>
  <Header value="Which answer is better?"/>
  <View className="text"><Text name="prompt" value="$shown_prompt"/></View>
  <View style="display: grid; grid-template-columns: 1fr 1fr; gap: 1em">
    <View className="text"><Header value="A"/><Text name="a" value="$shown_a"/></View>
    <View className="text"><Header value="B"/><Text name="b" value="$shown_b"/></View>
  </View>
  <Choices name="winner" toName="prompt" choice="single-radio" required="true">
    <Choice value="a" hint="A is better"/>
    <Choice value="b" hint="B is better"/>
    <Choice value="tie" hint="both are equally good"/>
  </Choices>
</View>
"""


@dataclass(frozen=True)
class Question:
    """A pair that people shall label.

    Attributes:
        pair_id: its id.
        row: as a source has it, without a label.
        shown: prompt, answer a and answer b as people read them.
    """

    pair_id: str
    row: dict[str, object]
    shown: tuple[str, str, str]

    @property
    def line(self) -> str:
        """The row as one line of JSON."""
        return json.dumps(self.row, ensure_ascii=False)

    def rewritten(self) -> dict[str, object]:
        """`shown`, where that is not what the row has: no text lies in the page twice."""
        texts = self.row["prompt"], self.row["response_a"], self.row["response_b"]
        return {} if texts == self.shown else {"shown": self.shown}


def page(key: str, questions: Sequence[Question]) -> bytes:
    """The page on which they are labelled.

    Args:
        key: of these questions: what a browser keeps is kept under it.
        questions: in the order in which they are asked.
    """
    # A row goes as text and comes back as it is: a script would round its large numbers.
    asked = [{"row": each.line} | each.rewritten() for each in questions]
    template = TEMPLATES.get_template("questions.html.j2")
    html = template.render(
        count=f"{len(questions):,}",
        hash=hash_of(SCRIPT),
        script=Markup(SCRIPT),  # noqa: S704 (a file of this package)
        json=Markup(embedded_json({"key": key, "questions": asked})),  # noqa: S704 (spelled out)
    )
    return html.encode("utf-8", "replace")


def label_studio_tasks(questions: Sequence[Question]) -> bytes:
    """The same as tasks for Label Studio's import, whose interface is `LABEL_STUDIO`."""
    tasks = [{"data": each.row | dict(zip(SHOWN, each.shown, strict=True))} for each in questions]
    return json.dumps(tasks, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace")
