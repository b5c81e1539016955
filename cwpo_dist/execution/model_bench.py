"""A reward model and a labelled set in; what the model is worth there, printed and as JSON, out.

Answers are scored in this process, by the worker that `annotate` runs.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console

from cwpo_dist.config import AnnotateConfig, Config, ConfigError, ModelConfig
from cwpo_dist.evaluation.model_worth import Judged, worth
from cwpo_dist.lm.templates import Fault
from cwpo_dist.pairs.judged_rows import Benchmark, Row, read_benchmark
from cwpo_dist.pairs.records import Reject, Score, answer_id, prompt_id, rows_of
from cwpo_dist.pairs.stored import Pair, write_pairs
from cwpo_dist.report.worth_table import print_benchmark
from cwpo_dist.runs.model_checks import check_model
from cwpo_dist.runs.sizes import reward_model
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.progress import Progress, Report
from cwpo_dist.scoring.retries import attempt
from cwpo_dist.scoring.scorers import RewardWorker
from cwpo_dist.storage import Store

ROWS_AT_ONCE = 256
Scores = dict[str, Score | str]  # by an answer's id: its score, or why it has none


class BenchError(ValueError):
    """A labelled set of which nothing can be measured; the message says why and what to do."""


def bench_annotator(config: Config, by: str | None, to: str | None) -> None:
    """Measures the reward model `annotate.model` on the sources of `prepare`, and prints it.

    Args:
        config: of which these two sections are read.
        by: the column by which figures are divided; None: none.
        to: the file of all figures; None: none.

    Raises:
        ConfigError: for data or a model that cannot be read.
        BenchError: where no pair with a label and two scores is left.
        ShardError: where the device fails, or every row.
        StorageError: where `to` cannot be written.
    """
    folder, name = os.path.split(to or "")
    place, model = Store(folder or "."), config.annotate.model
    if to is not None:
        place.check()  # before hours of work
    if model is None:
        raise ConfigError("annotate.model: it is the one that is measured; leave it to MODEL")
    found = read_benchmark(config.prepare, by)
    if not found.rows:
        raise _nothing(found, model)
    if faults := check_model("annotate.model", model, reward_model, {}).faults:
        raise ConfigError("\n".join(faults))
    scores, device = _scored(config.annotate, model, found.rows)
    judged = list(_judged(found, scores))
    if not judged:
        raise _nothing(found, model)
    figures = {
        "model": model.model_name_or_path,
        "data": [source.path for source in config.prepare.sources],
        "by": found.by,
        "rows": found.read,
        "compared": len(judged),
        "left_out": dict(found.left_out),
        "device": device,
        **worth(judged, lists=found.lists),
    }
    if to is not None:
        place.write(name, f"{json.dumps(figures, indent=2)}\n".encode())
    print_benchmark(figures, Console())


def _nothing(found: Benchmark, model: ModelConfig) -> BenchError:
    why = "; ".join(f"{n:,} × {reason}" for reason, n in found.left_out.most_common())
    remedy = "say where labels stand (prepare.sources.0.columns.label=…)"
    if Fault.OVER_LENGTH in found.left_out:
        remedy = f"raise annotate.model.max_length={model.max_length}"
    return BenchError(
        f"DATA: of {found.read:,} rows none has a label and two scores ({why}); {remedy}"
    )


def _scored(config: AnnotateConfig, model: ModelConfig, rows: Sequence[Row]) -> tuple[Scores, str]:
    """What the model makes of all answers, and the device on which it does."""
    scores, began = Scores(), time.monotonic()
    starts = range(0, len(rows), ROWS_AT_ONCE)
    budget, same_bits = config.max_tokens_per_batch, config.batch_invariant
    with (
        tempfile.TemporaryDirectory(prefix="cwpo-bench-") as folder,
        Progress("bench", len(starts), 0, config.actor_pools()[:1]) as progress,
    ):
        store = Store(folder)
        worker = RewardWorker(AnswersIn(store), model, "", budget, batch_invariant=same_bits)
        for index, start in enumerate(starts):
            from_s, some = time.monotonic(), rows[start : start + ROWS_AT_ONCE]
            write_pairs(store, index, [pair for row in some for pair in row.pairs])
            output = attempt(worker, index, f"the answers of row {start} and on")
            scores |= {each.row: each.reason for each in rows_of(Reject, output.rejects)}
            scores |= {each.answer_id: each for each in rows_of(Score, output.rows)}
            now = time.monotonic()
            progress.add(Report(index, "here", 0, now - from_s, now - began, output.counts))
        return scores, str(worker.forward.device)


def _judged(found: Benchmark, scores: Scores) -> Iterator[Judged]:
    """The rows whose answers all have scores; the others are counted as left out."""
    for row in found.rows:
        margins = [_margin(pair, scores) for pair in row.pairs]
        why = next((each for each in margins if isinstance(each, str)), None)
        if why is None:
            yield Judged(row, np.array(margins, dtype=np.float64))
        else:
            found.left_out[why] += 1


def _margin(pair: Pair, scores: Scores) -> float | str:
    """Score of a − score of b, or why there is none."""
    asked = prompt_id(pair.prompt, pair.tools)
    a, b = (scores[answer_id(asked, answer)] for answer in pair.answers)
    if isinstance(a, Score) and isinstance(b, Score):
        return a.score - b.score if a.tokens_hash != b.tokens_hash else Fault.IDENTICAL
    return next(each for each in (a, b) if isinstance(each, str)).partition(": ")[0]
