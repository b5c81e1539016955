"""A trained engine in, a Hugging Face folder out: gathered by all ranks, written by rank 0.

Weights are gathered and written one file after another, so rank 0 holds `MAX_SHARD_SIZE` of the
model at most. The exception, said in the log, are models that transformers saves in another form
than it computes with: they are gathered whole.

Who has lost the lease meanwhile changes nothing that its follower exported: a local folder gets its
name, and an object store's file is put there, only if there is none. Other bytes that a dead writer
left are replaced, and the lease is asked first. Not promised is what falls between asking and
writing: who is stopped there for longer than the lease may replace, after its follower, what was
such a dead writer's, or add a file of a name that its follower does not write. Both take another
version of the code, as equal inputs give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from cwpo_dist.canonical import to_json
from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.fingerprints import model_fingerprint
from cwpo_dist.lm.identity import Identity, digests, identify
from cwpo_dist.lm.loading import load_annotator_base, load_policy
from cwpo_dist.lm.modules import unwrapped, whole_shape
from cwpo_dist.lm.switches import give_back
from cwpo_dist.local_files import whole_folder
from cwpo_dist.node_disk import staged, whole_files
from cwpo_dist.storage import Store
from cwpo_dist.storage_faults import is_full
from cwpo_dist.training.lora import Head, save_adapter
from cwpo_dist.training.merge import INDEX, MergeError, base_folder, merge_adapter, merge_in_memory
from cwpo_dist.training.merge_check import check_merged, check_whole

logger = logging.getLogger(__name__)

MODEL, ADAPTER = "model", "adapter"
BASE = "base.json"  # what the adapter's base is known by
Fence = Callable[[], None]  # raises where another holds the lease by now
MAX_SHARD_SIZE = "5GB"  # of one file: what rank 0 holds at once


class Gatherer(Protocol):
    """The part of an engine that an export needs."""

    rank: int

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
        """A context in which the data of these parameters is whole on every rank."""


def gather_weights(engine: Gatherer, model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Parameters and buffers by name, on the CPU of rank 0; empty on the others. A collective.

    Args:
        engine: which gathers them, one at a time.
        model: its own weights may be shards.
        names: of those that are wanted.
    """
    whole = {}
    for name, tensor in _saved(model).items():
        if name not in names:
            continue
        with engine.gathered([tensor] if isinstance(tensor, nn.Parameter) else []):
            if engine.rank == 0:
                whole[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return whole


def trainable_names(model: nn.Module) -> list[str]:
    """The names of the parameters that training changes."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def export_full(
    engine: Gatherer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stage: Store,
    fence: Fence,
) -> None:
    """Writes `model/` of a stage; called on all ranks after training, written by rank 0.

    Args:
        engine: which gathers weights.
        model: its own weights may be shards; tied ones are written once.
        tokenizer: travels along, with its chat template.
        stage: the stage's folder.
        fence: asked before anything gets its name there.
    """
    with _written(stage.child(MODEL), fence) if engine.rank == 0 else nullcontext() as folder:
        _write_model(engine, model, folder)
        if folder is not None:
            tokenizer.save_pretrained(folder)


def _write_model(engine: Gatherer, model: PreTrainedModel, folder: Path | None) -> None:
    """Streams the weights to a folder, which only rank 0 has."""
    give_back(model)
    empty = {name: _empty(tensor) for name, tensor in _saved(model).items()}
    as_saved = revert_weight_conversion(model, dict(empty))
    if as_saved.keys() != empty.keys():
        logger.info("%s is saved in another form: gathered whole", type(model).__name__)
        weights = gather_weights(engine, model, empty)
        if folder is not None:
            model.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD_SIZE)
        return
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=MAX_SHARD_SIZE)
    for file, names in plan.filename_to_tensors.items():
        weights = gather_weights(engine, model, names)
        if folder is not None:
            save_file(weights, folder / file, metadata={"format": "pt"})
    if folder is None:
        return
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _saved(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that a checkpoint of the model has."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return dict(model.named_parameters()) | buffers


def _empty(tensor: Tensor) -> Tensor:
    """Its shape without its data."""
    return torch.empty(whole_shape(tensor), dtype=tensor.dtype, device="meta")


def export_lora(
    model: PeftModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    stage: Store,
    base: ModelConfig,
    head: Head,
    seed: int,
    fence: Fence,
    known: Identity | None = None,
) -> None:
    """Writes `adapter/`, `base.json` and, merged with the base, `model/`; rank 0 alone.

    Args:
        model: the adapted model; its own weights are not read (they may be shards).
        weights: its trainable ones, by the model's names.
        tokenizer: travels along, with its chat template.
        stage: the stage's folder.
        base: what training started from.
        head: of the model.
        seed: what drew an annotator's head.
        fence: asked before anything gets its name there.
        known: what the adapter calls its base; None: what `base` is known by elsewhere.

    Raises:
        MergeMismatch: when the merged model is not base and adapter; it is not kept.
        NoRoom: when the disk is full.
    """
    dtype = next(iter(weights.values())).dtype
    known = known or identify(base, model_fingerprint(base))
    if not known.on_hub:
        known = replace(known, sha256=digests(base_folder(base)))
    with _written(stage.child(ADAPTER), fence) as folder:
        save_adapter(model, weights, folder, known)
        tokenizer.save_pretrained(folder)
        fence()
        stage.write(BASE, to_json(asdict(known)))
    with _written(stage.child(MODEL), fence) as out:
        heads = unwrapped(model).config.num_labels or 1
        _merge(base, tokenizer, head, seed, heads, staged(stage.child(ADAPTER)), out, dtype)
        tokenizer.save_pretrained(out)


def _merge(
    base: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    head: Head,
    seed: int,
    heads: int,
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
            merge_adapter(base, adapter, out, dtype=dtype)
        except MergeError as error:
            whole = str(error)
        else:
            check_merged(base, adapter, out, dtype)
            return

    def load(given: ModelConfig) -> PreTrainedModel:
        if head == "scores":
            return load_annotator_base(given, tokenizer, seed, heads=heads, device="cpu")
        return load_policy(given, device="cpu")

    logger.info("merging the adapter in memory, not streamed: %s", whole)
    merge_in_memory(load(base), adapter, out, dtype)
    check_whole(load, base, adapter, out, head, dtype)


class NoRoom(ValueError):
    """A disk that is full; the message names the place and the remedy."""


@contextmanager
def _written(store: Store, fence: Fence) -> Iterator[Path]:
    """A local folder whose files end up in the store; nothing stays of what cannot be finished."""
    field, place = "output_dir", store.root
    if not store.is_local:
        field, place = "TMPDIR", tempfile.gettempdir()
    try:
        with _local(store, fence) as folder:
            yield folder
    except Exception as error:  # tokenizers, in Rust, raise nothing narrower
        if not is_full(error):
            raise
        raise NoRoom(
            f"{field}: no room left in {place} for the trained model "
            f"({error.__cause__ or error}); free some"
            f"{'' if store.is_local else ', or name a larger disk'}, then give the same command "
            "again: training is done, and goes on with the export"
        ) from error


@contextmanager
def _local(store: Store, fence: Fence) -> Iterator[Path]:
    if store.is_local:
        with whole_folder(store.root, fence) as written:
            yield written
            fence()
        return
    with tempfile.TemporaryDirectory(prefix="cwpo-export-") as folder:
        yield Path(folder)
        for path, name in whole_files(Path(folder)):
            fence()
            if not store.create_from(path, name) and not _alike(store, path, name):
                fence()  # still ours: then who left these bytes is dead
                store.copy_in(path, name)


def _alike(store: Store, path: Path, name: str) -> bool:
    there: Any  # a raw file, says its type, which is not asked of it
    with store.opened(name) as there, path.open("rb") as here:
        found, wanted = (hashlib.file_digest(file, "sha256").digest() for file in (there, here))
    return found == wanted
