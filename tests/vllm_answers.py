"""Answers of vLLM, as token ids: a folder with `asked.json` in, `answers.json` in it out.

test_vllm.py starts it with the Python that has vLLM.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.vllm_generation import VllmWriter

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    asked = json.loads((folder / "asked.json").read_text())
    model = ModelConfig(model_name_or_path=asked["model"], max_length=asked["max_length"])
    writer = VllmWriter(model, gpus=0, **asked["told"])
    found = []
    for writer.temperature, prompts in asked["calls"]:
        found.append(writer.tokens(prompts))
    (folder / "answers.json").write_text(json.dumps(found))
