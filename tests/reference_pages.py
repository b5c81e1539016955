"""The code in; the pages of docs/ that say what it writes and which commands it has, out.

PYTHONPATH=.:tests python tests/reference_pages.py docs
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from pkgutil import walk_packages

import pyarrow as pa
from typer.cli import get_docs_for_click
from typer.main import get_command
from typer.models import Context

import cwpo_dist
from cwpo_dist.cli import app as cli
from cwpo_dist.docstrings import described, first_sentence
from cwpo_dist.evaluation.accuracy import AnnotatorAccuracy, GoldAccuracy, PolicyAccuracy
from cwpo_dist.evaluation.win_rates import Answers
from cwpo_dist.manifest import Manifest
from cwpo_dist.pairs import preferences, records, stored
from cwpo_dist.pairs.alone import AloneCounts
from cwpo_dist.pairs.row_forms import ListCounts
from cwpo_dist.runs import agreed
from cwpo_dist.runs.divergence import Divergence
from cwpo_dist.runs.judged_answers import JUDGED_SCHEMA, JudgedAnswer
from cwpo_dist.runs.prepared_counts import PreparedCounts
from cwpo_dist.scoring.driver import run_shards
from cwpo_dist.scoring.pool import _ShardActor
from cwpo_dist.scoring.progress import Progress
from cwpo_dist.stages import evaluate, weigh
from cwpo_dist.training import metrics_log
from cwpo_dist.training.train_rank import TrainRank

_BY = "`make reference` writes this\npage anew from records, docstrings and options of the code."
FILES = f"""# Files and metrics

The columns of the tables that a run writes, what its manifests count, and every metric; null is
what is not known. Texts are strings or, of conversations, lists of messages. {_BY}
"""
COMMANDS = f"""# Commands

Every command with its arguments and options, as `cwpo COMMAND --help` has them, then what exit
codes and errors mean. {_BY}
"""
_LOGGED = """All numbers of `fit`, `sft` and `align`, a record a line. Trackers get the same;
TensorBoard and W&B show them as `train/…` and, without their `eval_`, as `eval/…`."""
# A table's files, its schema, and where the meaning of a column stands, the first that has it.
TABLES: Mapping[str, tuple[pa.Schema, Sequence[object]]] = {
    "prepare/<key>/prompts/part-*.parquet": (
        stored.prompt_schema("text"),
        [stored.prompt_schema],
    ),
    "prepare/<key>/answers/part-*.parquet": (
        stored.answer_schema("text", pa.schema([("keep_columns", pa.null())])),
        [stored.answer_schema],
    ),
    "prepare/<key>/pairs/part-*.parquet": (
        stored.pair_schema(pa.schema([("keep_columns", pa.null())])),
        [stored.pair_schema, stored.Pair],
    ),
    "<stage>/<key>/rejects/part-*.parquet": (records.REJECT_SCHEMA, [records.Reject]),
    "tokens/<key>/tokens/part-*.parquet": (records.TOKEN_SCHEMA, [records.AnswerTokens]),
    "annotate/<key>/scores/part-*.parquet": (
        records.HEADS_SCHEMA,
        [records.HeadScores, records.Score],
    ),
    "weigh/<key>/preferences/part-*.parquet": (
        preferences.preference_schema("text", tools=True),
        [preferences.Preference],
    ),
    "reference/<key>/reference/part-*.parquet": (records.LOG_PROB_SCHEMA, [records.LogProb]),
    "generate/<key>/answers/part-*.parquet": (records.ANSWER_SCHEMA, [records.SampledAnswer]),
    "evaluate/<key>/items.parquet": (evaluate.ITEM_SCHEMA, [evaluate.MeasuredPair]),
    "evaluate/<key>/answers.parquet": (JUDGED_SCHEMA, [JudgedAnswer]),
    "evaluate/<key>/agreed.parquet": (agreed.AGREED_SCHEMA, [agreed.Agreed]),
    "scores/<key>/part-*.parquet of an export": (
        preferences.scored_schema("text", tools=True),
        [preferences.ScoredAnswer],
    ),
}
# What manifests count, by the stages that count it.
COUNTS: Mapping[str, object] = {
    "prepare": PreparedCounts,
    "prepare: `lists`": ListCounts,
    "prepare: `alone`": AloneCounts,
    "tokens, annotate, implicit, reference, generate": run_shards,
    "annotate, reference, generate: `throughput`": Progress.throughput,
    "weigh": weigh._summary,
    "fit, sft, align": TrainRank.counts,
    "evaluate": evaluate.make,
}
FIGURES: Mapping[str, type] = {
    "`annotator`": AnnotatorAccuracy,
    "`policy`": PolicyAccuracy,
    "`gra`, against each baseline": GoldAccuracy,
    "`answers`, against each baseline": Answers,
    "`kl`": Divergence,
}


def files_page() -> str:
    """docs/files.md: tables, manifests, metrics."""
    parts = [FILES, "## Tables\n"]
    for name, (schema, told) in TABLES.items():
        rows = [(f"`{f.name}`", _kind(f.type), _meaning(f.name, told)) for f in schema]
        parts += [f"### `{name}`\n", _table(("column", "type", "what it is"), rows)]
    parts += ["## manifest.json\n", _listed(described(Manifest))]
    parts += ["## What manifests count\n"]
    for stages, told in COUNTS.items():
        parts += [f"### {stages}\n", _listed(described(told))]
    parts += ["## metrics.jsonl\n", f"{_LOGGED}\n", _listed(described(metrics_log))]
    parts += ["## On Ray's dashboard\n", "By `stage`, for the Prometheus server that reads it.\n"]
    parts += [_listed(described(_ShardActor))]
    parts += ["## evaluate/<key>/metrics.json\n", "Null is what was not asked for.\n"]
    for name, record in FIGURES.items():
        parts += [f"### {name}\n", _listed(_all_described(record))]
    for record in dict.fromkeys(each for top in FIGURES.values() for each in _records_in(top)):
        parts += [f"### {record.__name__}\n", f"{first_sentence(record)}\n"]
        parts += [_listed(_all_described(record))]
    return "\n".join(parts).replace("None", "null")


def _meaning(column: str, told: Sequence[object]) -> str:
    return next(found[column] for found in map(described, told) if column in found)


def _kind(kind: pa.DataType) -> str:
    named = {
        pa.null(): "as kept",
        pa.list_(pa.int32()): "list of int32",
        pa.list_(pa.float32()): "list of float32",
        pa.float32(): "float32",
        pa.float64(): "float64",
        pa.json_(): "JSON",
    }
    return named.get(kind, str(kind))


def _all_described(record: type) -> dict[str, str]:
    """Of a dataclass and of those that it extends."""
    found = [described(each) for each in reversed(record.__mro__) if dataclasses.is_dataclass(each)]
    return {name: text for each in found for name, text in each.items()}


def _records_in(record: type) -> Iterator[type]:
    """The records that a record holds, alone or in tuples, and those below them."""
    for kind in typing.get_type_hints(record).values():
        for each in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(each) and described(each):
                assert isinstance(each, type)
                yield each
                yield from _records_in(each)


def commands_page() -> str:
    """docs/commands.md: typer's own page of the command line, then codes and errors."""
    command = get_command(cli.app)
    told = get_docs_for_click(obj=command, ctx=Context(command), name="cwpo")
    told = re.sub(r"^# `cwpo`\n", "", told).replace("\n## `", "\n## `").strip()
    codes = _listed(described(cli.main), "code")
    return "\n".join(
        [
            COMMANDS,
            f"{told}\n",
            "## Exit codes\n",
            f"{codes}\nA command that was killed has the signal's code.\n",
            "## Errors\n",
            "One that nothing on the way handles ends the command with exit code 2, `Preempted` "
            "with 75.\n",
            _table(("error", "of", "what it says"), sorted(_errors())),
        ]
    )


def _errors() -> Iterator[tuple[str, str, str]]:
    """The error classes of the package."""
    for module in walk_packages(cwpo_dist.__path__, "cwpo_dist."):
        if module.name.endswith("__main__"):
            continue
        for name, found in inspect.getmembers(import_module(module.name), inspect.isclass):
            if issubclass(found, Exception) and found.__module__ == module.name:
                yield f"`{name}`", module.name.removeprefix("cwpo_dist."), first_sentence(found)


def _listed(told: Mapping[str, str], head: str = "name") -> str:
    of_each = groupby(told.items(), key=itemgetter(1))  # names that share a meaning share a row
    rows = [(", ".join(f"`{name}`" for name, _ in names), text) for text, names in of_each]
    return _table((head, "what it is"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[re.sub(r"(?<!\\)[|]", r"\\|", cell) for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


PAGES = {"files.md": files_page, "commands.md": commands_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (Path(sys.argv[1]) / name).write_text(page(), encoding="utf-8")
