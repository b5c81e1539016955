"""A run, or one output of it, in; its preferences or scores as a data set with its card, out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from cwpo_dist.config import Config
from cwpo_dist.manifest import Manifest
from cwpo_dist.pairs.answers import read_answers
from cwpo_dist.pairs.preferences import ScoredAnswer, product_table, scored_schema
from cwpo_dist.pairs.records import SCORE_SCHEMA, Score, read_rows
from cwpo_dist.report.data_card import DataSet, Exported, data_card
from cwpo_dist.results.export import ExportError, FinishedArm, copy_all, new_folder
from cwpo_dist.runs.joined import score_files
from cwpo_dist.runs.output_key import committed_retries
from cwpo_dist.storage import MANIFEST, Store

_STAGES = {"preferences": ("weigh",), "scores": ("annotate", "implicit")}


def export_data(
    run: str, arm: str | None, to: str, kind: DataSet, private_key: Path | None = None
) -> str:
    """Writes a data set that `datasets.load_dataset` reads: Parquet, card and digests.json.

    Args:
        run: the run directory, or an output of `weigh` or `annotate` in it, a path or a URI.
        arm: which arm's; None when the run has one, or an output is given.
        to: where it goes, a path or a URI; must be new or empty.
        kind: `preferences` are copied as they are, `scores` get the texts that they are of.
        private_key: signs the folder; None: it goes unsigned.

    Returns:
        `to`.

    Raises:
        ExportError: where there is no such output, or it is not finished; as `export`.
    """
    with new_folder(to, private_key) as target:
        root, of_arm, outputs = _found(Store(run), arm, kind)
        made = [Manifest.read(output) for output in outputs]
        prepared = root.child(*made[0].inputs["prepare"].split("/"))
        told = Manifest.read(prepared)
        if kind == "preferences":
            schema, rows = _preferences(outputs[0], target)
        else:
            schema, rows = _scores(outputs, prepared, told, target)
        card = data_card(Exported(kind, schema, rows, made, told, of_arm))
        target.write("README.md", card.encode())
    return to


def _found(
    run: Store, arm: str | None, kind: DataSet
) -> tuple[Store, tuple[Config, str] | None, list[Store]]:
    """The run directory, its arm where one is known, and the outputs."""
    stages = _STAGES[kind]
    if run.exists(MANIFEST):
        if (stage := Manifest.read(run).stage) not in stages:
            raise ExportError(
                f"--data {kind}: {run.uri!r} is of {stage!r}; name one of {stages[0]}"
            )
        place = run.root if run.is_local else run.uri.rstrip("/")  # a relative path has no parent
        return Store(place.rsplit("/", 2)[0]), None, [run]
    try:
        source = FinishedArm.of(run, arm)
    except ExportError as error:
        raise ExportError(
            f"{error} Or name an output: {run.child(stages[0], '<key>').uri}"
        ) from None
    found = {role: at["stage"] for role, at in source.stages.items() if at["stage"] in stages}
    if not found:
        raise ExportError(
            f"--data {kind}: arm {source.name!r} has none; no annotator scored for it"
        )
    outputs = [source.finished(role, stage) for role, stage in found.items()]
    return run, (source.config, source.name), outputs


def _preferences(output: Store, target: Store) -> tuple[pa.Schema, int]:
    copy_all(output.child("preferences"), target.child("preferences"))
    with output.parquet(output.names("preferences")[0]) as file:
        schema = file.schema_arrow
    return schema, Manifest.read(output).counts["selected"]


def _scores(
    outputs: list[Store], prepared: Store, told: Manifest, target: Store
) -> tuple[pa.Schema, int]:
    """Writes a file a shard and annotator, with the texts in the place of ids."""
    more, rows = set(told.counts["message_keys"]), 0
    schema = scored_schema(told.counts["kind"], keys=bool(more - {"tools"}), tools="tools" in more)
    for output in outputs:
        key = output.uri.rsplit("/", 1)[-1]
        for index in range(told.counts["shards"]):
            found = list(_scored(output, prepared, index))
            table = product_table(ScoredAnswer, found, schema)
            target.create_table(f"scores/{key}/part-{index:05d}.parquet", table)
            rows += len(found)
    return schema, rows


def _scored(output: Store, prepared: Store, index: int) -> Iterator[ScoredAnswer]:
    """Of one shard, those that were scored at once and those of committed retries."""
    answers = {answer.answer_id: answer for answer in read_answers(prepared, index)}
    for name in score_files(output, index, committed_retries(output)):
        for score in read_rows(output, name, Score, SCORE_SCHEMA):
            of = answers[score.answer_id]
            yield ScoredAnswer(
                of.answer_id, of.prompt, of.answer, of.tools, score.annotator, score.score
            )
