"""A whole run on Ray whose winners are marked by a word: who learns, learns to prefer that word.

A label, weight or sign turned round anywhere on the way would teach the other word.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from prepared import write
from tiny import save_tiny

from cwpo_dist.config import Config
from cwpo_dist.execution.run import run

ARMS = ["human", "weak", "cw", "soft", "ws_dpo"]
ANNOTATED = {"weak", "cw", "soft", "ws_dpo"}  # the last one by its weak teacher's implicit reward


def marked(count: int) -> list[dict[str, Any]]:
    """Pairs of which people chose the answer with `mmm`; all else is drawn for both alike."""
    draw = random.Random(0)
    rows = []
    for i in range(count):
        won, lost = (
            f"{draw.choice('abcdefg') * 3} {word} {draw.choice('hijk')}" for word in ("mmm", "nnn")
        )
        winner_first = draw.random() < 0.5
        a, b = (won, lost) if winner_first else (lost, won)
        label = "a" if winner_first else "b"
        rows.append({"prompt": f"p{i}: ", "response_a": a, "response_b": b, "label": label})
    return rows


@pytest.fixture(
    scope="module", params=[["cw"], pytest.param(ARMS, marks=pytest.mark.long)], ids=["cw", "all"]
)
def metrics(
    request: pytest.FixtureRequest, ray_local: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("learns")
    save_tiny(folder / "model", "llama", 0)
    model = {"model_name_or_path": str(folder / "model"), "chat_template": "plain"}
    model |= {"max_length": 64}
    training = {
        "learning_rate": 3e-3,
        "max_steps": 20,
        "global_batch_size": 16,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "cpus_per_worker": 0.5,
        "lora": None,
        "report_to": "none",
    }
    pool = {"num_actors": 1, "cpus_per_actor": 0.5}
    config = Config.model_validate(
        {
            "output_dir": str(folder / "run"),
            "arms": request.param,
            "prepare": {
                "sources": [{"path": write(folder / "pairs.jsonl", marked(200))}],
                "labelled_fraction": 0.4,
                "test_fraction": 0.3,
            },
            "weak": model,
            "policy": model,
            "fit": training,
            "annotate": pool,
            "sft": None,
            "reference": pool,
            "align": training | {"beta": 0.1, "eval_steps": 20},
            "evaluate": pool | {"num_prompts": 0},
        }
    )
    run(config)
    found: dict[str, Any] = json.loads((folder / "run" / "metrics.json").read_text())["arms"]
    return found


def test_every_annotator_scores_the_marked_answer_higher(metrics: dict[str, Any]) -> None:
    for arm in ANNOTATED & metrics.keys():
        agreement = metrics[arm]["annotator"]["agreement"]
        assert agreement["n"] > 30, arm
        assert agreement["accuracy"] > 0.9, arm


def test_the_policy_of_every_arm_comes_to_prefer_it(metrics: dict[str, Any]) -> None:
    for arm, found in metrics.items():
        policy = found["policy"]
        assert policy["agreement"]["n"] > 30, arm
        assert policy["agreement"]["accuracy"] > 0.9, arm
        assert policy["mean_margin"] > 0, arm
        followed = [row for row in found["curves"]["align"] if "eval_rewards/margins" in row]
        assert followed[-1]["eval_rewards/accuracies"] > 0.9, arm
        assert followed[-1]["eval_rewards/margins"] > 0, arm
