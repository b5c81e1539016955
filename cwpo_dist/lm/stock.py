"""A module in; nothing, where the stock model says the same of probe rows, or a refusal by name.

Not of layouts (probe.py), but of plain rows: whether states know what they should predict, and
whether our heads give what the stock model's own forward gives.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from cwpo_dist.lm.loading import ModelError
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores, decode, decoder_of, unwrapped
from cwpo_dist.lm.rows import Layout, Row, RowBatch, collate

logger = logging.getLogger(__name__)

RowLengths = tuple[int, tuple[int, ...]]  # tokens of a row's prompt and of its answers

# Relative error of hidden states that rounding alone explains. A leak is of the order of 1.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Nats by which our head may differ from the stock model's, whose chunks differ.
_HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
_SCORED = 2  # rows of the probe that are scored one sequence at a time
_PROBE_LENGTHS: tuple[RowLengths, ...] = ((7, (5, 9)), (3, (6, 2, 4, 1)), (12, (4,)))
SHORT = max(prompt + max(answers) for prompt, answers in _PROBE_LENGTHS)


def probe_rows(vocab_size: int, seed: int = 0, longest: int | None = None) -> list[Row]:
    """Rows of random tokens, of unequal lengths and numbers of answers.

    Args:
        vocab_size: token ids are below it.
        seed: of the tokens.
        longest: a long row of so many tokens, and a short one, in place of three short ones.
    """
    lengths = list(_PROBE_LENGTHS)
    if longest is not None:
        further, last = lengths[0][1]
        lengths = [(longest - last, (further, last)), lengths[1]]
    return drawn_rows(vocab_size, lengths, seed)


def drawn_rows(vocab_size: int, lengths: Sequence[RowLengths], seed: int = 0) -> list[Row]:
    """Rows of random tokens below `vocab_size`, the same ones for the same seed.

    Args:
        vocab_size: of the model.
        lengths: tokens of each row's prompt and of its answers.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(vocab_size, (length,), generator=generator).tolist()

    return [
        Row(draw(prompt), tuple(draw(answer) for answer in answers)) for prompt, answers in lengths
    ]


def apart(rows: list[Row]) -> list[Row]:
    """A row for each answer."""
    return [row.part(slice(k, k + 1)) for row in rows for k in range(len(row.answers))]


def states(module: AnswerLogProbs | AnswerScores, rows: list[Row], layout: Layout) -> Tensor:
    """What the module reads: states of tokens that predict, or of answers' ends.

    Returns:
        fp32 [N, H], N answer tokens in the order of the rows; or [A, H] of A answers.
    """
    batch = collate(rows, layout, 0).to(next(module.parameters()).device)
    hidden = decode(decoder_of(unwrapped(module.model)), batch).flatten(0, 1).float()
    return hidden[batch.source if isinstance(module, AnswerLogProbs) else batch.last]


def check_log_probs(module: AnswerLogProbs) -> None:
    """Whether states know no token that they predict, and our head gives the stock model's logits.

    Raises:
        ModelError: naming the architecture.
    """
    _check_causal(module)
    _check_head(module)


def _check_causal(module: AnswerLogProbs) -> None:
    """The states that predict tokens must not know them: encoders read the whole sequence."""
    row = apart(probe_rows(vocabulary(module.model)))[1]
    (answer,) = row.answers
    other = Row(row.prompt, ([*answer[:-1], (answer[-1] + 1) % vocabulary(module.model)],))
    states_NH, others_NH = (states(module, [each], "plain") for each in (row, other))
    leaked = float(((states_NH - others_NH).norm(dim=-1) / states_NH.norm(dim=-1)).max())
    if not leaked <= TOLERANCE[next(module.parameters()).dtype]:
        raise ModelError(
            f"model: {type(unwrapped(module.model)).__name__} reads ahead: the states that predict "
            "a token change with that token; give a causal language model"
        )


def _check_head(module: AnswerLogProbs) -> None:
    """Our chunked head against the stock model's own logits, on plain rows.

    Where they differ, models may multiply states or logits by a number that we know no name of: it
    is measured, and the head checked again.
    """
    parameter = next(module.parameters())
    batch = collate(probe_rows(vocabulary(module.model)), "plain", 0).to(parameter.device)
    stock_N, scale = _stock_logps(module, batch)
    tolerance = _HEAD_TOLERANCE[parameter.dtype]
    difference = float((stock_N - module.token_logps(batch)).abs().max())
    if not difference <= tolerance and scale is not None:
        module.head.scale = scale
        difference = float((stock_N - module.token_logps(batch)).abs().max())
    if not difference <= tolerance:
        raise ModelError(
            f"model: the logits of {type(unwrapped(module.model)).__name__} are not those of its "
            f"output embeddings on its decoder (off by {difference:.1e} nats); its architecture is "
            "not supported: give another model"
        )


def _stock_logps(module: AnswerLogProbs, batch: RowBatch) -> tuple[Tensor, float | None]:
    """Log-probs of answer tokens [N] by the stock model; and what it multiplies logits by."""
    passed: list[Tensor] = []
    head = unwrapped(module.model).get_output_embeddings()
    hook = head.register_forward_hook(lambda _module, args, out: passed.extend([args[0], out]))
    try:
        stock = module.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    finally:
        hook.remove()
    logits = stock.logits.flatten(0, 1)
    logps_NV = logits[batch.source].float().log_softmax(-1)
    hidden = decode(decoder_of(unwrapped(module.model)), batch).flatten(0, 1)
    scale = None
    if len(passed) == 2:
        entered, left = (tensor.flatten(0, -2) for tensor in passed)
        if (entered.shape, left.shape) == (hidden.shape, logits.shape):
            scale = _ratio(entered, hidden) * _ratio(logits, left)
    return logps_NV.gather(1, batch.target[:, None])[:, 0], scale


def _ratio(multiple: Tensor, of: Tensor) -> float:
    """X for which multiple = x · of, by least squares."""
    return float((multiple.double() * of.double()).sum() / of.double().square().sum())


def check_scores(module: AnswerScores) -> None:
    """Scores of padded plain rows against the stock classifier's own, of one sequence at a time.

    A classifier that sees pads is told to take sequences one by one.

    Raises:
        ModelError: for a decoder that is not read at the last token.
    """
    core = unwrapped(module.model)
    parameter = next(module.parameters())
    rows, pad = closed_rows(core.config.get_text_config(), _PROBE_LENGTHS[:_SCORED])
    batch = collate(rows, "plain", pad).to(parameter.device)
    padded_S, stock_S = module(batch).flatten(), module.stock(batch).flatten()
    if not bool(stock_S.isfinite().all()):
        return  # its scores are no numbers in any layout: each pair says so
    difference = float((padded_S - stock_S).abs().max() / (1 + stock_S.abs().max()))
    if difference <= TOLERANCE[parameter.dtype]:
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


def closed_rows(config: PretrainedConfig, lengths: Sequence[RowLengths]) -> tuple[list[Row], int]:
    """Random rows that end in EOS and have no other, nor a pad (some classifiers look for them).

    Args:
        config: of the model's text.
        lengths: of the rows, without EOS.

    Returns:
        The rows, and what fills up shorter sequences.
    """
    ends, pad = config.eos_token_id, config.pad_token_id
    ends = ends if isinstance(ends, list) else [ends]
    words = [token for token in range(int(config.vocab_size)) if token not in (*ends, pad)]
    last = next((end for end in ends if end is not None and end != pad), words[-1])
    drawn = drawn_rows(len(words), lengths)
    return [_closed(row, words, last) for row in drawn], max(0, -1 if pad is None else pad)


def _closed(row: Row, words: Sequence[int], last: int) -> Row:
    """A row whose tokens are places in `words`, as those words, and a last one."""
    answers = ([*(words[token] for token in answer), last] for answer in row.answers)
    return Row([words[token] for token in row.prompt], tuple(answers))


def vocabulary(model: nn.Module) -> int:
    """How many words a model has."""
    return int(unwrapped(model).config.get_text_config().vocab_size)
