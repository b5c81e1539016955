"""Pairs in; our forward pass against the stock Hugging Face loop on the same token ids out."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import measure
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cwpo_dist.config import ModelConfig
from cwpo_dist.lm.flops import useful_flops
from cwpo_dist.lm.loading import load_policy, load_reward_model
from cwpo_dist.lm.modules import AnswerLogProbs, AnswerScores
from cwpo_dist.lm.reading import encoder_for
from cwpo_dist.lm.rows import Row
from cwpo_dist.lm.sharing import SharedRows
from cwpo_dist.pairs.answers import read_compared
from cwpo_dist.pairs.records import prompt_of
from cwpo_dist.scoring.answers_in import AnswersIn, encoded
from cwpo_dist.scoring.forward import RowForward
from cwpo_dist.scoring.set_aside import SetAside
from cwpo_dist.storage import Store

STOCK_BATCH = 16  # sequences

Scorer = Literal["reward", "reference"]


def stock_scores(
    model: Any, pad_id: int, sequences: Sequence[list[int]], _prompts: Sequence[int]
) -> list[float]:
    """The loop of a model card: pad, forward, read the logit."""
    values: list[float] = []
    for start in range(0, len(sequences), STOCK_BATCH):
        ids, mask = _padded(sequences[start : start + STOCK_BATCH], pad_id)
        values += model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
    return values


def stock_logps(
    model: Any, pad_id: int, sequences: Sequence[list[int]], prompts: Sequence[int]
) -> list[float]:
    """Summed answer log-probs from logits of every position, as TRL computes a reference."""
    values: list[float] = []
    for start in range(0, len(sequences), STOCK_BATCH):
        batch, lengths = sequences[start:][:STOCK_BATCH], prompts[start:][:STOCK_BATCH]
        ids, mask = _padded(batch, pad_id)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logps = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[:, :, 0]
        answer = torch.arange(1, ids.shape[1])[None] >= torch.tensor(lengths)[:, None]
        values += (logps * (answer & mask[:, 1:].bool())).sum(1).tolist()
    return values


def _padded(sequences: Sequence[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, sequences))
    ids = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in sequences])
    return ids, mask


@dataclass(frozen=True)
class Peers:
    """The same pairs for both sides."""

    ours: RowForward
    rows: list[Row]
    stock: Callable[[Sequence[list[int]], Sequence[int]], list[float]]

    def run_ours(self) -> list[float]:
        """All values, answer by answer, in the order of the rows."""
        return [value for pair in self.ours(self.rows).values for value in pair]

    def run_stock(self, by_length: bool) -> list[float]:
        """The same by the stock loop, which is given its batches in another order."""
        sequences = [row.prompt + answer for row in self.rows for answer in row.answers]
        prompts = [len(row.prompt) for row in self.rows for _ in row.answers]
        order = list(range(len(sequences)))
        if by_length:
            order.sort(key=lambda i: -len(sequences[i]))
        found = self.stock([sequences[i] for i in order], [prompts[i] for i in order])
        values = [0.0] * len(order)
        for i, value in zip(order, found, strict=True):
            values[i] = value
        return values


def peers(scorer: Scorer, model: ModelConfig, pairs: Store, shards: int, tokens: int) -> Peers:
    """Both sides, loaded, and the pairs' token ids."""
    encoder = encoder_for(model, "reward model" if scorer == "reward" else "policy")
    rows = measure.encoded(pairs, shards, encoder, model)
    pad = encoder.pad_id
    if scorer == "reward":
        module: Any = AnswerScores(load_reward_model(model))
        name = model.model_name_or_path
        stock = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32)
        loop = partial(stock_scores, stock.eval(), pad)
    else:
        module = AnswerLogProbs(load_policy(model))
        stock = AutoModelForCausalLM.from_pretrained(
            model.model_name_or_path, num_hidden_layers=model.num_hidden_layers, dtype=torch.float32
        )
        loop = partial(stock_logps, stock.eval(), pad)
    return Peers(RowForward(module, pad, model.max_length, tokens), rows, loop)


def timed(run: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """Seconds and values."""
    started = time.perf_counter()
    with torch.inference_mode():
        values = run()
    return time.perf_counter() - started, values


def forward_part(both: Peers, repeats: int) -> dict[str, Any]:
    """Medians over interleaved repeats."""
    seconds: dict[str, list[float]] = {"ours": [], "arrival": [], "sorted": []}
    rate = difference = 0.0
    both.ours(both.rows[:8])  # warm: the first call allocates
    for _ in range(repeats):
        rate = max(rate, measure.matmul_rate())
        elapsed, values = timed(both.run_ours)
        seconds["ours"].append(elapsed)
        for order in ("arrival", "sorted"):
            elapsed, stock = timed(partial(both.run_stock, order == "sorted"))
            seconds[order].append(elapsed)
            difference = max(difference, float(np.abs(np.subtract(values, stock)).max()))
    took = {name: statistics.median(each) for name, each in seconds.items()}
    flops = useful_flops(both.ours.module).forward(both.rows) / took["ours"]
    rate = max(rate, measure.matmul_rate())
    pairs = len(both.rows)
    return {
        "pairs": pairs,
        "tokens": sum(row.n_tokens for row in both.rows),
        "layout": both.ours.layout,
        "ours_pairs_s": pairs / took["ours"],
        "stock_arrival_pairs_s": pairs / took["arrival"],
        "stock_sorted_pairs_s": pairs / took["sorted"],
        "ratio_arrival": took["arrival"] / took["ours"],
        "ratio_sorted": took["sorted"] / took["ours"],
        "matmul_gflop_s": rate / 1e9,
        "useful_gflop_s": flops / 1e9,
        "useful_flops_share": flops / rate,
        "max_score_diff": difference,
    }


def answers_part(
    scorer: Scorer, model: ModelConfig, pairs: Store, tokens: int, repeats: int, stock_pairs: int
) -> dict[str, Any]:
    """Every answer once against the stock loop on both sequences of every pair, interleaved.

    Ours is the worker of the stage, from text to numbers; the stock loop is given token ids, and
    sorted by length, as is best for it. Of more than `stock_pairs` it computes a random sample.
    """
    both = peers(scorer, model, pairs, 1, tokens)
    encoder = encoder_for(model, "reward model" if scorer == "reward" else "policy")
    compared = read_compared(pairs, 0)

    def run_ours() -> list[float]:
        values: dict[str, float] = {}
        answers = AnswersIn(pairs).read(0)
        for read in encoded(encoder, model, answers, SetAside(0)):
            shared = SharedRows.of([(prompt_of(each.name), row) for each, row in read])
            forwarded = both.ours(shared.rows)
            counted.update(forwarded.counts)
            names = (each.name for each, _ in read)
            values |= dict(zip(names, shared.of_each(forwarded.values), strict=True))
        known = [p for p in compared if p.answer_a in values and p.answer_b in values]
        return [values[name] for p in known for name in (p.answer_a, p.answer_b)]

    drawn = random.Random(0).sample(range(len(compared)), min(stock_pairs, len(compared)))
    some = replace(both, rows=[both.rows[i] for i in drawn])
    counted: Counter[str] = Counter()
    seconds: dict[str, list[float]] = {"ours": [], "stock": []}
    difference = 0.0
    for _ in range(repeats):
        counted.clear()
        elapsed, values = timed(run_ours)
        seconds["ours"].append(elapsed)
        elapsed, stock = timed(partial(some.run_stock, True))
        seconds["stock"].append(elapsed)
        of_both = np.reshape(values, (-1, 2))[drawn].ravel()
        difference = max(difference, float(np.abs(np.subtract(of_both, stock)).max()))
        print(f"  {seconds}", flush=True)
    took = {name: statistics.median(each) for name, each in seconds.items()}
    by_pair = sum(row.n_tokens for row in both.rows)
    return {
        "answers_part": {
            "pairs": len(compared),
            "answers": len({name for p in compared for name in (p.answer_a, p.answer_b)}),
            "prompts": len({prompt_of(p.pair_id) for p in compared}),
            "tokens": counted["tokens"],
            "tokens_by_pair": by_pair,
            "tokens_ratio": by_pair / counted["tokens"],
            "ours_pairs_s": len(compared) / took["ours"],
            "stock_pairs": len(drawn),
            "stock_pairs_s": len(drawn) / took["stock"],
            "ratio": len(compared) / took["ours"] / (len(drawn) / took["stock"]),
            "max_score_diff": difference,
        }
    }
