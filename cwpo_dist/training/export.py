"""A trained engine in, a Hugging Face folder out: gathered by all ranks, written by rank 0."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.loading import load_annotator_base, load_policy
from cwpo_dist.storage import Store
from cwpo_dist.training.lora import (
    Head,
    MergeError,
    base_folder,
    merge_adapter,
    merge_in_memory,
    save_adapter,
)

logger = logging.getLogger(__name__)

MODEL, ADAPTER = "model", "adapter"


class Gatherer(Protocol):
    """The part of an engine that an export needs."""

    rank: int

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """A context in which the data of these parameters is whole on every rank."""


def gather_weights(
    engine: Gatherer, model: nn.Module, *, trainable_only: bool
) -> dict[str, Tensor]:
    """The model's weights by name, on the CPU of rank 0; empty on the others. A collective."""
    whole = {}
    for name, parameter in model.named_parameters():
        if trainable_only and not parameter.requires_grad:
            continue
        with engine.gathered([parameter]):
            if engine.rank == 0:
                whole[name] = parameter.detach().to("cpu", copy=True)
    return whole


def export_full(
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    stage: Store,
) -> None:
    """Writes `model/` of a stage from gathered weights; rank 0 alone, after training.

    Args:
        model: its configuration and class; its own weights are not read (they may be shards).
        weights: all of them, by the model's names; tied ones once.
        tokenizer: travels along, with its chat template.
        stage: the stage's folder.
    """
    with _written(stage.child(MODEL)) as folder:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def export_lora(
    model: PeftModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    stage: Store,
    base: ModelConfig,
    head: Head,
    seed: int,
) -> None:
    """Writes `adapter/` and, merged with the base, `model/`; rank 0 alone, after training.

    Args:
        model: the adapted model; its own weights are not read (they may be shards).
        weights: its trainable ones, by the model's names.
        tokenizer: travels along, with its chat template.
        stage: the stage's folder.
        base: what training started from.
        head: of the model.
        seed: what drew an annotator's head.
    """
    dtype = next(iter(weights.values())).dtype
    with _written(stage.child(ADAPTER)) as folder:
        save_adapter(model, weights, folder)
        tokenizer.save_pretrained(folder)
        with _written(stage.child(MODEL)) as out:
            _merge(base, tokenizer, head, seed, folder, out, dtype)
            tokenizer.save_pretrained(out)


def _merge(
    base: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    head: Head,
    seed: int,
    adapter: Path,
    out: Path,
    dtype: torch.dtype,
) -> None:
    """Streams where the base's files are the model's weights, else loads the base whole."""
    whole = "it keeps its first layers only" if base.num_hidden_layers else None
    if head == "scores":
        whole = "its head is new"
    if whole is None:
        try:
            merge_adapter(base_folder(base), adapter, out, dtype=dtype)
            return
        except MergeError as error:
            whole = str(error)
    logger.info("merging the adapter in memory, not streamed: %s", whole)
    if head == "scores":
        model = load_annotator_base(base, tokenizer, seed, device="cpu")
    else:
        model = load_policy(base, device="cpu")
    merge_in_memory(model, adapter, out, dtype)


@contextmanager
def _written(store: Store) -> Iterator[Path]:
    """A local folder whose files end up in the store."""
    if store.is_local:
        Path(store.root).mkdir(parents=True, exist_ok=True)
        yield Path(store.root)
        return
    with tempfile.TemporaryDirectory(prefix="cwpo-export-") as folder:
        yield Path(folder)
        store.upload(Path(folder))
