"""A policy, how SFT and alignment went, in; a run directory that `cwpo export` takes, out.

Training is stood in for by noise on all weights that it would change: what is written of them is
written by the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tiny
import torch
from torch import Tensor

from cwpo_dist.config import LoraConfig, ModelConfig
from cwpo_dist.lm.encoder import load_tokenizer
from cwpo_dist.lm.fingerprints import model_fingerprint
from cwpo_dist.lm.identity import Identity
from cwpo_dist.lm.loading import load_policy
from cwpo_dist.runs.context import trained
from cwpo_dist.storage import MANIFEST, Store
from cwpo_dist.training import saving
from cwpo_dist.training.lora import add_lora

How = Literal["full", "lora"]
# Both adapt the head, the second the embeddings too; scales are 2 and 4/3.
SFT_LORA = LoraConfig(
    r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj", "up_proj", "lm_head"]
)
ALIGN_LORA = LoraConfig(
    r=3,
    lora_alpha=4,
    lora_dropout=0.0,
    target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"],
)
IDS = torch.randint(3, 250, (3, 20), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class FinishedRun:
    """A run directory, and the log-probs of its aligned model as it was in memory."""

    root: Store
    wanted: Tensor

    def close_to(self, model: Any, atol: float = 1e-4) -> None:
        """Fails unless the model is the aligned one."""
        torch.testing.assert_close(log_probs(model), self.wanted, atol=atol, rtol=0)


class Alone:
    """The part of an engine that an export asks: one process holds all weights."""

    rank = 0

    def gathered(self, parameters: Sequence[Any]) -> Any:
        return nullcontext()


def log_probs(model: Any) -> Tensor:
    """By stock transformers, or peft around it: [rows, tokens - 1]."""
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS, use_cache=False).logits.float()
    return logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]


def tiny_policy(folder: Path, tied: bool, **changes: Any) -> ModelConfig:
    tiny.save_tiny(folder, "llama", tie_word_embeddings=tied)
    return ModelConfig(model_name_or_path=str(folder), max_length=64, **changes)


def finish(
    root: Store,
    policy: ModelConfig,
    sft: How | None,
    align: How,
    *,
    loras: tuple[LoraConfig, LoraConfig] = (SFT_LORA, ALIGN_LORA),
) -> FinishedRun:
    """Writes the run; `loras`: of SFT and of alignment, where they are `lora`."""
    stages, start, settings = {}, policy, {"model_now": model_fingerprint(policy)}
    if sft is not None:
        stages["sft"] = {"key": "sft-key"}
        place = root.child("sft", "sft-key")
        _train(place, start, loras[0] if sft == "lora" else None, 1, None)
        start = trained(policy, place)
    stages["align"] = {"key": "align-key"}
    place = root.child("align", "align-key")
    below = None if sft is None else Identity("sft/sft-key/model", on_hub=False)
    wanted = _train(place, start, loras[1] if align == "lora" else None, 2, below)
    for role, stage in stages.items():
        root.create_json(f"{role}/{stage['key']}/{MANIFEST}", {"settings": settings})
    section = {"full": {"lora": None}, "lora": {"lora": {"r": 2}}}
    config = {
        "output_dir": root.uri,
        "arms": ["human"],
        "prepare": {"sources": [{"path": "pairs.jsonl"}]},
        "policy": policy.model_dump(mode="json"),
        "sft": None if sft is None else section[sft],
        "align": section[align],
    }
    root.create_json("arms/human/config.json", config)
    root.create_json("arms/human/stages.json", stages)
    root.create_json("arms/human/metrics.json", {"pairs": 3})
    return FinishedRun(root, wanted)


def _train(
    place: Store, start: ModelConfig, lora: LoraConfig | None, seed: int, known: Identity | None
) -> Tensor:
    """Noise where training would be, then the stage's own export."""
    model: Any = load_policy(start, device="cpu")
    tokenizer = load_tokenizer(start)
    generator = torch.Generator().manual_seed(seed)
    model = model if lora is None else add_lora(model, lora, "logps", seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.add_(noise.to(parameter.dtype))
    wanted = log_probs(model)
    if lora is None:
        saving.export_full(Alone(), model, tokenizer, place, lambda: None)
    else:
        names = saving.trainable_names(model)
        weights = saving.gather_weights(Alone(), model, names)
        saving.export_lora(
            model, weights, tokenizer, place, start, "logps", seed, lambda: None, known
        )
    return wanted
