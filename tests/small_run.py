"""A whole run on tiny random models and the demo's pairs, for tests that need every stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from tiny import save_tiny

DEMO_PAIRS = Path(__file__).parents[1] / "cwpo_dist" / "demo" / "pairs.jsonl"


def small_config(folder: Path, output_dir: str | None = None, **changes: Any) -> dict[str, Any]:
    """A configuration of every stage over 96 pairs; `section__field=value` changes it."""
    source = folder / "pairs.jsonl"
    if not source.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_tiny(folder / "model", "llama", 0)
        rows = [json.loads(line) for line in DEMO_PAIRS.read_text().splitlines()]
        chosen = rows[:: max(1, len(rows) // 96)][:96]
        source.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    model = {"model_name_or_path": str(folder / "model"), "max_length": 400}
    training = {
        "learning_rate": 1e-3,
        "global_batch_size": 8,
        "max_tokens_per_micro_batch": 2048,
        "cpus_per_worker": 0.5,
        "save_steps": 2,
        "num_train_epochs": 1,
    }
    pool = {"num_actors": 1, "cpus_per_actor": 0.5}  # an actor starts longer than it works here
    gold = {"gold_function": "cwpo_dist.demo.gold:score", "num_prompts": 6, "max_new_tokens": 8}
    config: dict[str, Any] = {
        "output_dir": output_dir or str(folder / "run"),
        "simulated_labels": True,
        "arms": ["cw"],
        "prepare": {
            "sources": [{"path": str(source)}],
            "rows_per_shard": 16,
            "test_fraction": 0.3,
            "num_cpus": 0.5,
        },
        "weak": model | {"num_hidden_layers": 1},
        "policy": dict(model),
        "fit": dict(training),
        "annotate": pool | {"num_actors": 2},
        "sft": training | {"warmup_steps": 0},
        "reference": dict(pool),
        "align": training | {"warmup_steps": 0, "beta": 0.1},
        "evaluate": pool | gold | {"generation_batch_size": 4},
    }
    for dotted, value in changes.items():
        section, _, name = dotted.partition("__")
        if name:
            config[section] = {**config[section], name: value}
        else:
            config[section] = value
    return config


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """The configuration as a YAML file, for the command line."""
    path.write_text(yaml.safe_dump(config))
    return path
