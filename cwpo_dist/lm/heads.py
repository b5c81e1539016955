"""A classifier's configuration in; the heads that score with it, or why it is no annotator, out.

An annotator of several heads is a stock classifier with a label a head, called head_0, head_1, …:
by their names it is told from a classifier of as many classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig


def name_heads(config: PretrainedConfig, heads: int) -> None:
    """Makes a configuration that of a classifier with so many heads."""
    config.num_labels = heads
    if heads > 1:
        config.id2label = {k: f"head_{k}" for k in range(heads)}
        config.label2id = {name: k for k, name in config.id2label.items()}


def scoring_heads(config: PretrainedConfig) -> int | None:
    """How many heads score with a classifier; None: its labels are classes."""
    labels: Mapping[Any, str] = config.id2label or {}
    named = bool(labels) and all(labels.get(k) == f"head_{k}" for k in range(len(labels)))
    return len(labels) if len(labels) == 1 or named else None


def has_heads(config: PretrainedConfig) -> bool:
    """Whether a checkpoint is a classifier already; a language model has no heads yet."""
    return any("ForSequenceClassification" in kind for kind in config.architectures or [])


def heads_fault(config: PretrainedConfig, heads: int) -> str | None:
    """Why a checkpoint cannot be trained as so many heads; None: it can."""
    if not has_heads(config) or scoring_heads(config) == heads:
        return None
    return (
        f"is a classifier of {config.num_labels} labels, but fit.heads is {heads}; give a language "
        "model, or an annotator of as many heads"
    )
