"""What plan accepts starts, and what it refuses would have failed: configurations by the dozen."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peft import LoraConfig, get_peft_model
from tiny import CHAT_TEMPLATE, tiny_classifier, tiny_config, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from cwpo_dist.config import ConfigError
from cwpo_dist.config.load import parse_config
from cwpo_dist.execution import run as running
from cwpo_dist.execution.run import run
from cwpo_dist.lm.loading import ModelError
from cwpo_dist.lm.templates import TokenError
from cwpo_dist.pairs.readers import SourceError
from cwpo_dist.pairs.rejects import RejectsError
from cwpo_dist.planning.plan import plan
from cwpo_dist.runs import scored_by
from cwpo_dist.scoring.driver import run_here
from cwpo_dist.scoring.pipeline import ShardJob
from cwpo_dist.scoring.retries import ShardError

# What a user is shown in a line; anything else is a fault of ours.
REFUSALS = (ConfigError, ModelError, TokenError, SourceError, RejectsError, ShardError)
ROWS = 24
SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
TEMPLATES = {
    "own": CHAT_TEMPLATE,
    "refuses system": SYSTEM + CHAT_TEMPLATE,
    "cuts": CHAT_TEMPLATE.replace("message['content']", "message['content'].split('so')[0]"),
    "trims": CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim"),
    "broken": "{% for m in messages %}{{ m.content }",
    "none": None,
}


@pytest.fixture
def here(ray_local: Any, in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages run in this process: what they accept and refuse is the same."""

    def shards(job: ShardJob, pool: Any, check: Any) -> dict[str, Any]:
        counts = run_here(job)
        check(counts)
        return counts

    monkeypatch.setattr(running, "connect", lambda: None)
    monkeypatch.setattr(scored_by, "run_shards", shards)


class Maker:
    """A configuration and its files, drawn from a seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)

    def pick(self, *choices: Any) -> Any:
        return self.draw.choice(choices)

    def rows(self) -> list[dict[str, Any]]:
        systems, empties, spaces = (self.pick(0, 0, 0, 1, ROWS // 2, ROWS) for _ in range(3))
        chat, labelled = self.pick(True, True, False), self.pick(True, True, False)
        made = []
        for k in range(ROWS):
            prompt, answers = f"Question {k}?", [f"yes {k} so", f"no {k} so" * self.pick(1, 1, 20)]
            if k < spaces:
                answers[1] = answers[0] + "  "
            if k < empties:
                answers[1] = ""
            row: dict[str, Any] = {"prompt": prompt}
            row |= dict(zip(("response_a", "response_b"), answers, strict=True))
            if chat:
                turns = [{"role": "system", "content": "Be kind."}] if k < systems else []
                row["prompt"] = [*turns, {"role": "user", "content": prompt}]
                for name, text in zip(("response_a", "response_b"), answers, strict=True):
                    row[name] = [{"role": "assistant", "content": text}]
            if labelled:
                row["label"] = self.pick("a", "b")
            made.append(row)
        return made + made[: self.pick(0, 0, 1, ROWS // 2)]  # copies are merged

    def source(self) -> str:
        rows = self.rows()
        name = self.pick("pairs.jsonl", "pairs [v2].jsonl", "array.jsonl", "x.json", "p.parquet")
        path = self.folder / name
        if name == "p.parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif name in {"array.jsonl", "x.json"}:
            path.write_text(json.dumps(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def model(self) -> dict[str, Any]:
        folder, kind = self.folder / "reward", self.pick(*["llama", "gemma2", "bert"] * 3, "gone")
        if kind == "gone":
            return {"model_name_or_path": str(folder)}
        model, tokenizer = tiny_classifier(kind), tiny_tokenizer(add_bos=self.pick(True, False))
        spoiled = self.pick(*[None] * 7, "adapter", "two labels", "new token")
        if spoiled == "two labels":
            model = AutoModelForSequenceClassification.from_config(tiny_config(kind, num_labels=2))
        elif spoiled == "adapter":
            model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS"))
        elif spoiled == "new token":
            tokenizer.add_tokens([self.pick("Question", "unmet")])
        template = TEMPLATES[self.pick(*TEMPLATES, *["own"] * 4)]
        named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "x"}]
        tokenizer.chat_template = template
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if template is not None and self.pick(True, False, False):
            (folder / "chat_template.jinja").unlink(missing_ok=True)
            file = folder / "tokenizer_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))
        return {
            "model_name_or_path": str(folder),
            "max_length": self.pick(400, 400, 400, 120, 40, 4),
            "over_length": self.pick("drop", "truncate"),
            "chat_template": self.pick("tokenizer", "tokenizer", "plain"),
        }

    def config(self) -> dict[str, Any]:
        share = self.pick(0.0, 0.5, 1.0)
        return {
            "output_dir": str(self.folder / "run"),
            "prepare": {
                "sources": [{"path": self.source()}],
                "labelled_fraction": share,
                "validation_fraction": 0.0,
                "test_fraction": 0.0,
                "max_reject_fraction": self.pick(0.05, 0.5, 1.0),
            },
            "annotate": {
                "model": self.model(),
                "max_reject_fraction": self.pick(0.05, 0.5, 1.0),
                "cpus_per_actor": 0.5,
            },
        }


def refusal(act: Any) -> str | None:
    try:
        act()
    except REFUSALS as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in range(1, 12))]
)
def test_plan_and_run_agree(tmp_path: Path, part: int) -> None:
    seen: Counter[bool] = Counter()
    for seed in range(40 * part, 40 * part + 40):
        folder = tmp_path / str(seed)
        folder.mkdir()
        given = parse_config(Maker(folder, seed).config())
        planned = refusal(lambda config=given: plan(config))
        ran = refusal(lambda config=given: run(config, until="annotate"))
        told = f"seed {seed}\nplan: {planned}\nrun: {ran}\n{given.annotate}\n{given.prepare}"
        assert (planned is None) == (ran is None), told
        seen[planned is None] += 1
    assert min(seen[True], seen[False]) >= 5, "both are met often"
