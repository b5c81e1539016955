"""A model's module in, the layout of its rows out: packed or shared where it is proved exact.

The proof is a probe: random answers through the stock decoder, each alone, without a pad, against
the same answers together in a batch: packed, where that fails shared, and where that fails plain. A
model that is not exact in plain rows either is refused by name, as is one that is not the stock
model in any (stock.py).

What a model does beyond some length (a window, a chunk, positions that turn) short rows cannot
show. Its configuration names such lengths; where rows may pass one, the probe has a row that does,
and no other model pays for one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from cwpo_dist.lm.foreign import FOREIGN_ERRORS, model_fault, whole_number
from cwpo_dist.lm.loading import ModelError
from cwpo_dist.lm.modules import (
    AnswerLogProbs,
    AnswerScores,
    decode,
    decoder_of,
    scores_last_token,
    unwrapped,
)
from cwpo_dist.lm.packed import NAME
from cwpo_dist.lm.rope import turning_length
from cwpo_dist.lm.rows import Layout, Row, collate
from cwpo_dist.lm.sequence import ALONE, SequenceGroup
from cwpo_dist.lm.stock import (
    SHORT,
    TOLERANCE,
    apart,
    check_log_probs,
    check_scores,
    probe_rows,
    states,
    vocabulary,
)
from cwpo_dist.lm.transformers_internals import attention_in_use

logger = logging.getLogger(__name__)

# ALiBi biases scores by distance in the row, which no position id can change.
_ALIBI = frozenset({"bloom", "mpt"})
# Of fields of a configuration that say after how many tokens something changes.
_LENGTH_NAMES = ("window", "chunk", "position", "topk", "compress", "block", "_len", "floor")
_BEYOND = 16  # tokens by which the long row passes such a length


@dataclass(frozen=True)
class LayoutChoice:
    """How a model's rows are laid out, and what decided it.

    Attributes:
        layout: 'packed' or 'shared' only where the probe proved it.
        reason: one sentence for logs and records.
        max_difference: the probe's largest relative error of a hidden state; None without a probe.
    """

    layout: Layout
    reason: str
    max_difference: float | None


def choose_layout(
    module: AnswerLogProbs | AnswerScores, *, longest: int, group: SequenceGroup = ALONE
) -> LayoutChoice:
    """Proves packed, shared or plain rows on this model, the fastest that are exact.

    A model that is to take packed rows is switched to the attention that knows them, which computes
    all else as before.

    Args:
        module: on its device, before an engine wraps it.
        longest: the most tokens of a prompt and one answer (`max_length`).
        group: the ranks that are to share rows; then a collective of theirs.

    Raises:
        ModelError: when the module's log-probs or scores are not the stock model's, or ranks that
            share a row do not compute what one does.
    """
    core = unwrapped(module.model)
    named = core.config.name_or_path or core.config.model_type
    name = f"{named} ({attention_in_use(core)})"
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            choice = _choose(module, longest)
            if group.size > 1:
                _check_shared(module, choice, group)
    except FOREIGN_ERRORS as error:
        if isinstance(error, ModelError):
            raise
        kind, why = type(core).__name__, model_fault(error)
        raise ModelError(
            f"model: {kind} cannot read rows of text alone ({why}); give another model"
        ) from error
    finally:
        for part, mode in modes:
            part.training = mode
    _tell(name, choice)
    return choice


def _choose(module: AnswerLogProbs | AnswerScores, longest: int) -> LayoutChoice:
    reason = _known_obstacle(module, longest)
    if isinstance(module, AnswerLogProbs):
        check_log_probs(module)
    else:
        check_scores(module)
        if not module.reads_last_token:
            assert reason is not None
            return LayoutChoice("plain", reason, None)
    cases = [_case(module, None)]
    beyond = _revealing_length(unwrapped(module.model).config.get_text_config(), longest)
    if beyond is not None:
        cases.append(_case(module, beyond))
    if reason is None:
        choice = _best(module, cases)
        if choice.layout != "plain":
            return choice
        reason = choice.reason
    difference = _difference(module, "plain", cases)
    if not difference <= TOLERANCE[next(module.parameters()).dtype]:  # also for NaN
        raise ModelError(
            f"model: what {type(unwrapped(module.model)).__name__} says of a row depends on the "
            f"rows beside it (off by {difference:.1e}): it reads padding as text; give another "
            "model"
        )
    return LayoutChoice("plain", reason, difference)


def _best(module: AnswerLogProbs | AnswerScores, cases: list[_Case]) -> LayoutChoice:
    """Packed rows where they equal plain ones, else shared, else plain and the last reason."""
    given = attention_in_use(unwrapped(module.model))
    if given in {"sdpa", NAME}:
        choice = _try(module, "packed", NAME, cases)
        if choice.layout == "packed":
            return choice
    return _try(module, "shared", given, cases)


def _known_obstacle(module: AnswerLogProbs | AnswerScores, longest: int) -> str | None:
    """Why shared rows cannot work, where the model's configuration already says so."""
    core = unwrapped(module.model)
    if isinstance(module, AnswerScores) and not module.reads_last_token:
        return f"{core.config.model_type} reads a sequence as a whole"
    return _configured_obstacle(core, longest)


def _configured_obstacle(core: PreTrainedModel, longest: int) -> str | None:
    config, attention = core.config, attention_in_use(core)
    text = config.get_text_config()
    if config.model_type in _ALIBI or getattr(text, "alibi", False):
        return f"{config.model_type} takes distances from the row (ALiBi), not from position ids"
    if attention.startswith("flash"):
        return f"{attention} takes resetting positions for packed sequences"
    window = getattr(text, "sliding_window", None)
    if window and window < longest:  # 0 (Qwen2-MoE) is none
        return f"its sliding window of {window} is shorter than rows of {longest} tokens"
    turning = turning_length(core)
    if turning is not None and turning < longest:
        return (
            f"its rotary positions turn in rows of more than {turning} tokens, and rows may have "
            f"{longest}: each answer takes its own"
        )
    return None


def unshared(core: PreTrainedModel, longest: int) -> str | None:
    """Why ranks cannot share a model's rows, where its configuration says so; None: it does not.

    Args:
        core: a causal language model or a classifier; nothing of it is computed.
        longest: as of `choose_layout`.
    """
    text, attention = core.config.get_text_config(), attention_in_use(core)
    if not whole_number(text, "num_attention_heads"):
        return "its configuration names no attention heads"
    if attention not in {"sdpa", NAME}:
        return f"its attention is {attention!r}, and only that of torch ('sdpa') is shared"
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    for kind in kinds:
        if "attention" not in kind or "linear" in kind:
            return f"its layers of kind {kind!r} hand states on from token to token"
    if core.get_output_embeddings() is None and not scores_last_token(core):
        return f"{core.config.model_type} reads a sequence as a whole"
    return _configured_obstacle(core, longest)


def _check_shared(
    module: AnswerLogProbs | AnswerScores, choice: LayoutChoice, group: SequenceGroup
) -> None:
    """States of probe rows that ranks share against those of one rank; a collective.

    Raises:
        ModelError: where they differ, or rows are not packed.
    """
    if choice.layout != "packed":
        why = f"rows are {choice.layout} ({choice.reason}), and only packed ones are shared"
    else:
        difference, why = _shared_difference(module, group)
        if difference <= TOLERANCE[next(module.parameters()).dtype]:
            return
    kind = type(unwrapped(module.model)).__name__
    raise ModelError(f"sequence_parallel_size: {group.size}: of {kind} {why}; set it to 1")


def _shared_difference(
    module: AnswerLogProbs | AnswerScores, group: SequenceGroup
) -> tuple[float, str]:
    """The sum over ranks of their largest relative error of a state, and that in words."""
    decoder = decoder_of(unwrapped(module.model))
    batch = collate(probe_rows(vocabulary(module.model)), "packed", 0)
    batch = batch.to(next(module.parameters()).device)
    read = batch.source if isinstance(module, AnswerLogProbs) else batch.last
    try:
        whole_NH = decode(decoder, batch)[0][read[group.holds(read)]]
        own_NH = decode(decoder, group.part(batch))[0][group.own(read)]
    except FOREIGN_ERRORS as error:  # of all ranks alike
        return torch.inf, f"rows cannot be shared: {model_fault(error)}"
    relative_N = ((own_NH - whole_NH).norm(dim=-1) / whole_NH.norm(dim=-1)).nan_to_num(torch.inf)
    found = float(group.summed(relative_N.max() if len(relative_N) else relative_N.sum()))
    return found, f"rows that workers share miss whole ones by {found:.1e}"


def _revealing_length(config: PretrainedConfig, longest: int) -> int | None:
    """The length of a row that passes every length of a configuration that rows can pass."""
    passed = [n for n in _named_lengths("", config.to_dict()) if SHORT <= n < longest]
    return min(longest, max(passed) + _BEYOND) if passed else None


def _named_lengths(name: str, value: object) -> Iterator[int]:
    """The whole numbers below a name that speaks of lengths, wherever they stand."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _named_lengths(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _named_lengths(name, inner)
    elif isinstance(value, int) and any(word in name for word in _LENGTH_NAMES):
        yield int(value)


@dataclass(frozen=True)
class _Case:
    """Rows of a probe, and the states of each of their answers alone, [N, H]."""

    rows: list[Row]
    alone_NH: Tensor


def _case(module: AnswerLogProbs | AnswerScores, longest: int | None) -> _Case:
    rows = probe_rows(vocabulary(module.model), longest=longest)
    return _Case(rows, torch.cat([states(module, [row], "plain") for row in apart(rows)]))


def _try(
    module: AnswerLogProbs | AnswerScores, layout: Layout, attention: str, cases: list[_Case]
) -> LayoutChoice:
    """The layout when its hidden states are those of answers alone, else plain, and why."""
    core = unwrapped(module.model)
    given = attention_in_use(core)
    try:
        if given != attention:
            core.set_attn_implementation(attention)
        difference = _difference(module, layout, cases)
        tolerance = TOLERANCE[next(module.parameters()).dtype]
        if difference <= tolerance:
            reason = f"{layout} rows equal plain ones on a probe (largest error {difference:.1e})"
            return LayoutChoice(layout, reason, difference)
        reason = f"{layout} rows miss plain ones by {difference:.1e}, more than {tolerance:.0e}"
    except FOREIGN_ERRORS as error:
        difference, reason = None, f"it refuses {layout} rows: {model_fault(error)}"
    if given != attention:
        core.set_attn_implementation(given)
    return LayoutChoice("plain", reason, difference)


def _difference(module: AnswerLogProbs | AnswerScores, layout: Layout, cases: list[_Case]) -> float:
    """The largest relative error of a state against the same answer's alone."""
    largest = 0.0
    for case in cases:
        rows = apart(case.rows) if layout == "plain" else case.rows
        distance_N = (states(module, rows, layout) - case.alone_NH).norm(dim=-1)
        relative_N = distance_N / case.alone_NH.norm(dim=-1)
        largest = max(largest, float(relative_N.max().nan_to_num(torch.inf)))
    return largest


@cache
def _tell(name: str, choice: LayoutChoice) -> None:
    """Once a process and model."""
    level = logging.WARNING if choice.layout == "plain" else logging.INFO
    logger.log(level, "%s: %s rows, as %s", name, choice.layout, choice.reason)
