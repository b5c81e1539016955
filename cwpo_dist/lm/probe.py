"""A model's module in, the layout of its rows out: packed or shared where it is proved exact.

The proof is a probe: random rows through the stock decoder, laid out plainly, against the same rows
packed, and where that fails against the same rows laid out shared. What cannot be proved takes
plain rows, and says why, once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from cwpo_dist.lm.loading import ModelError
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores, decode, unwrapped
from cwpo_dist.lm.packed import attention_for
from cwpo_dist.lm.rows import Layout, Row, RowBatch, collate

logger = logging.getLogger(__name__)

# ALiBi biases scores by distance in the row, which no position id can change.
_ALIBI = frozenset({"bloom", "mpt"})
# Relative error of hidden states that rounding alone explains. A leak is of the order of 1.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Nats by which our head may differ from the stock model's, whose chunks differ.
_HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
_SCORED = 2  # rows of the probe that are scored one sequence at a time
_PROBE_LENGTHS = ((7, (5, 9)), (3, (6, 2)), (12, (1, 4)))


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


def choose_layout(module: AnswerLogProbs | AnswerScores, *, longest: int) -> LayoutChoice:
    """Proves packed or shared rows on this model, or falls back to plain ones.

    A model that is to take packed rows is switched to the attention that knows them, which computes
    all else as before.

    Args:
        module: on its device, before an engine wraps it.
        longest: the most tokens of a prompt and one answer (`max_length`).

    Raises:
        ModelError: when the module's log-probs or scores are not the stock model's.
    """
    config = unwrapped(module.model).config
    name = f"{config.name_or_path or config.model_type} ({config._attn_implementation})"
    if isinstance(module, AnswerLogProbs):
        _check_head(module)
    else:
        _check_scores(module)
    reason = _known_obstacle(module, longest)
    choice = LayoutChoice("plain", reason, None) if reason else _probe(module)
    _tell(name, choice)
    return choice


def probe_rows(vocab_size: int, seed: int = 0) -> list[Row]:
    """Rows of random tokens, two answers each, of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(vocab_size, (length,), generator=generator).tolist()

    return [
        Row(draw(prompt), tuple(draw(answer) for answer in answers))
        for prompt, answers in _PROBE_LENGTHS
    ]


def _known_obstacle(module: AnswerLogProbs | AnswerScores, longest: int) -> str | None:
    """Why shared rows cannot work, where the model's configuration already says so."""
    config = unwrapped(module.model).config
    text = config.get_text_config()
    if isinstance(module, AnswerScores) and not module.reads_last_token:
        return f"{config.model_type} reads a sequence as a whole"
    if config.model_type in _ALIBI or getattr(text, "alibi", False):
        return f"{config.model_type} takes distances from the row (ALiBi), not from position ids"
    if str(config._attn_implementation).startswith("flash"):
        return f"{config._attn_implementation} takes resetting positions for packed sequences"
    window = getattr(text, "sliding_window", None)
    if window is not None and window < longest:
        return f"its sliding window of {window} is shorter than rows of {longest} tokens"
    return None


def _probe(module: AnswerLogProbs | AnswerScores) -> LayoutChoice:
    """The first layout, from the fastest on, that equals plain rows; else plain, and why."""
    given = unwrapped(module.model).config._attn_implementation
    packed = attention_for(next(module.parameters()).device)
    if given in {"sdpa", packed}:
        choice = _try(module, "packed", packed)
        if choice.layout == "packed":
            return choice
        logger.debug("%s", choice.reason)
    return _try(module, "shared", given)


def _try(module: AnswerLogProbs | AnswerScores, layout: Layout, attention: str) -> LayoutChoice:
    core = unwrapped(module.model)
    try:
        if core.config._attn_implementation != attention:
            core.set_attn_implementation(attention)
        return _compare(module, layout)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return LayoutChoice("plain", f"it refuses {layout} rows: {error}", None)


def _compare(module: AnswerLogProbs | AnswerScores, layout: Layout) -> LayoutChoice:
    """The layout when its hidden states equal those of plain rows, else plain."""
    decoder = unwrapped(module.model).base_model
    parameter = next(decoder.parameters())
    rows = probe_rows(_vocabulary(module.model))
    batches = [collate(rows, each, 0).to(parameter.device) for each in ("plain", layout)]
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            plain_NH, found_NH = (_read_states(module, decoder, batch) for batch in batches)
    finally:
        module.train(was_training)
    distance_N = (found_NH - plain_NH).norm(dim=-1) / plain_NH.norm(dim=-1)
    difference = float(distance_N.max())
    tolerance = _TOLERANCE[parameter.dtype]
    if not difference <= tolerance:  # also for NaN
        reason = f"{layout} rows miss plain ones by {difference:.1e}, more than {tolerance:.0e}"
        return LayoutChoice("plain", reason, difference)
    reason = f"{layout} rows equal plain ones on a probe (largest relative error {difference:.1e})"
    return LayoutChoice(layout, reason, difference)


def _read_states(
    module: AnswerLogProbs | AnswerScores, decoder: nn.Module, batch: RowBatch
) -> Tensor:
    """The hidden states that the module reads: of tokens that predict, or of answers' ends."""
    hidden = decode(decoder, batch).flatten(0, 1).float()
    return hidden[batch.source if isinstance(module, AnswerLogProbs) else batch.last]


def _check_head(module: AnswerLogProbs) -> None:
    """Our chunked head against the stock model's own logits, on plain rows."""
    parameter = next(module.parameters())
    batch = collate(probe_rows(_vocabulary(module.model)), "plain", 0).to(parameter.device)
    was_training = module.training
    module.eval()
    with torch.no_grad():
        ours_N = module.token_logps(batch)
        stock = module.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    module.train(was_training)
    logps_NV = stock.logits.flatten(0, 1)[batch.source].float().log_softmax(-1)
    difference = float((logps_NV.gather(1, batch.target[:, None])[:, 0] - ours_N).abs().max())
    if not difference <= _HEAD_TOLERANCE[parameter.dtype]:
        raise ModelError(
            f"model: the logits of {type(unwrapped(module.model)).__name__} are not those of its "
            f"output embeddings on its decoder (off by {difference:.1e} nats); its architecture is "
            "not supported: give another model"
        )


def _check_scores(module: AnswerScores) -> None:
    """Scores of padded plain rows against the stock classifier's own, of one sequence at a time.

    A classifier that sees pads is told to take sequences one by one.

    Raises:
        ModelError: for a decoder that is not read at the last token.
    """
    core = unwrapped(module.model)
    parameter = next(module.parameters())
    rows, pad = _scored_rows(core.config.get_text_config())
    batch = collate(rows, "plain", pad).to(parameter.device)
    was_training = module.training
    module.eval()
    with torch.no_grad():
        padded_S, stock_S = module(batch).flatten(), module.stock(batch).flatten()
    module.train(was_training)
    if not bool(stock_S.isfinite().all()):
        return  # its scores are no numbers in any layout: each pair says so
    difference = float((padded_S - stock_S).abs().max() / (1 + stock_S.abs().max()))
    if difference <= _TOLERANCE[parameter.dtype]:
        return
    if module.reads_last_token:
        raise ModelError(
            f"model: {type(core).__name__} is not read at the last token of a sequence (off by "
            f"{difference:.1e}); its architecture is not supported: give another model"
        )
    module.one_by_one = True
    logger.warning(
        "%s: one sequence at a time, as its scores depend on the pads of a batch (by %.1e)",
        *(type(core).__name__, difference),
    )


def _scored_rows(config: Any) -> tuple[list[Row], int]:
    """Probe rows that end in EOS and have no other, nor a pad (some classifiers look for them)."""
    ends, pad = config.eos_token_id, config.pad_token_id
    ends = ends if isinstance(ends, list) else [ends]
    words = [token for token in range(int(config.vocab_size)) if token not in (*ends, pad)]
    last = next((end for end in ends if end is not None and end != pad), words[-1])
    rows = [
        Row(
            [words[token] for token in row.prompt],
            tuple([*(words[token] for token in a), last] for a in row.answers),
        )
        for row in probe_rows(len(words))[:_SCORED]
    ]
    return rows, pad if pad is not None and pad >= 0 else 0


def _vocabulary(model: nn.Module) -> int:
    config: Any = unwrapped(model).config.get_text_config()
    return int(config.vocab_size)


@cache
def _tell(name: str, choice: LayoutChoice) -> None:
    """Once a process and model."""
    level = logging.WARNING if choice.layout == "plain" else logging.INFO
    logger.log(level, "%s: %s rows, as %s", name, choice.layout, choice.reason)
