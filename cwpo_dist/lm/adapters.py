"""A folder with an adapter in it in; why it is no whole model, and how to make one of it, out."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

WEIGHTS = "adapter_model.safetensors"


def adapter_fault(name: str, file: Path) -> str:
    """That a folder is an adapter, of which model, and how to make a whole model of the two.

    Args:
        name: of the folder, as it was given.
        file: peft's configuration in it.
    """
    settings = json.loads(file.read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    scores = settings.get("task_type") == "SEQ_CLS"
    kind = "AutoPeftModelForSequenceClassification" if scores else "AutoPeftModelForCausalLM"
    labels = f", num_labels={_heads(file.parent / WEIGHTS)}" if scores else ""
    return (
        f"model_name_or_path: {name!r} is a peft adapter ({file.name}) of {base!r}, no whole "
        "model. Merge the two once, and give the new folder:\n"
        f"    from peft import {kind}; from transformers import AutoTokenizer\n"
        f"    {kind}.from_pretrained({name!r}{labels}).merge_and_unload()"
        ".save_pretrained('merged')\n"
        f"    AutoTokenizer.from_pretrained({name!r}).save_pretrained('merged')"
    )


def _heads(weights: Path) -> int:
    """How many scores an adapter's head gives, by the header of its weights; 1 where none is."""
    try:
        with safe_open(weights, framework="pt") as held:
            heads = [name for name in held.keys() if name.endswith("score.weight")]  # noqa: SIM118 (it is no mapping)
            return held.get_slice(heads[0]).get_shape()[0] if heads else 1
    except (SafetensorError, OSError):
        return 1
