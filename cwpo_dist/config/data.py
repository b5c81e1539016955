"""Where pairs come from, and how they are split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from cwpo_dist.config.base import Fraction, Place, PositiveFloat, PositiveInt, Section

LabelValue = bool | int | float | str
Pairing = Literal["given", "all", "best_worst", "adjacent"]


class LabelColumn(Section):
    """Where labels stand, and what their values mean."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    columns: str | list[str] = Field(
        alias="from", description="their column; several, one an annotator: the majority counts"
    )
    a: LabelValue | list[LabelValue] | None = Field(
        None, description="values that say: response_a is better"
    )
    b: LabelValue | list[LabelValue] | None = Field(
        None, description="values that say: response_b is better"
    )
    tie: LabelValue | list[LabelValue] | None = Field(
        None, description="values that say: neither is better"
    )
    none: LabelValue | list[LabelValue] | None = Field(
        None, description="values that say: nobody judged"
    )

    def values(self) -> dict[str, list[LabelValue]]:
        """a, b, tie, none → the values that mean it; empty where they are to be found."""
        given = {name: getattr(self, name) for name in ("a", "b", "tie", "none")}
        return {
            name: value if isinstance(value, list) else [value]
            for name, value in given.items()
            if value is not None
        }


_MAP = {"from", "a", "b", "tie", "none"}


class Source(Section):
    """One source of pairs: files, a folder, or a hub id; docs/data.md says which files are read."""

    path: Place = Field(description="file, glob, folder, URI, or a Hugging Face hub id")
    name: str | None = Field(None, description="subset of a data set; null: its default")
    data_dir: str | None = Field(
        None, description="folder inside a data set (harmless-base); null: all"
    )
    split: str | None = Field(
        None,
        description="split of a data set or folder; null: where there are several, that of `into`, "
        "else train",
    )
    revision: str | None = Field(
        None, description="commit of a hub data set; null: main, which may change"
    )
    columns: dict[str, str | LabelColumn | None] = Field(
        default_factory=dict,
        description="our name → theirs (a.b.0 inside nested ones, a.*.b of all items), or null: "
        "not to be read; for label also {from: …, a: …, b: …, tie: …}. docs/data.md has the names",
    )
    format: Literal["auto", "text", "conversational", "hh"] = Field(
        "auto",
        description="how prompts and answers are spelled; conversational: lists of messages; hh: "
        "transcripts '\\n\\nHuman: … \\n\\nAssistant: …'; auto: as most of the first rows are",
    )
    into: Literal["train", "labelled", "validation", "test"] | None = Field(
        None,
        description="every row of this source goes to this side; labelled: to train, and its "
        "labels may be used whatever `labelled_fraction` is; null: split by hash",
    )
    limit: PositiveInt | None = Field(None, description="read at most this many rows; null: all")

    @field_validator("columns", mode="before")
    @classmethod
    def _spelled(cls, columns: object) -> object:
        """Says what a column is, where pydantic would say it of each kind that it could be."""
        for name, given in columns.items() if isinstance(columns, dict) else ():
            is_map = isinstance(given, dict) and "from" in given and given.keys() <= _MAP
            if is_map:
                _check_meanings(name, given)
            elif given is not None and not isinstance(given, str | LabelColumn):
                raise ValueError(
                    f"{name}: {given!r}; give a column's name, or null, or for label "
                    "{from: column, a: value, b: value, tie: value, none: value}"
                )
        return columns


def _check_meanings(name: str, label: Mapping[str, object]) -> None:
    said = {key for key, meant in label.items() if meant is not None}
    if said - {"from"} and not {"a", "b"} <= said:
        raise ValueError(f"{name}: {label!r}; give what means a and what means b, or none")


class PrepareConfig(Section):
    """Sources → pairs: what is read and how it is split."""

    compute_fields: ClassVar[frozenset[str]] = frozenset({"num_cpus", "max_reject_fraction"})

    sources: list[Source] = Field(min_length=1, description="what is read, all of it together")
    labelled_fraction: Fraction = Field(
        0.3, description="share of training prompts whose labels may be used; 1: all there are"
    )
    validation_fraction: Fraction = Field(
        0.0,
        description="share of prompts held out to fit temperatures, choose rates and follow "
        "training",
    )
    test_fraction: Fraction = Field(
        0.1,
        description="share of prompts held out for the figures; 0 unless told where a source goes "
        "`into: test`, which is the test part",
    )
    flipped_labels: Fraction = Field(
        0.0,
        description="share of training labels turned round, with their votes, for experiments with "
        "poisoned ones",
    )
    ties: Literal["unlabelled", "labelled"] = Field(
        "unlabelled",
        description="of the labelled prompts, what pairs without a label but as many votes for one "
        "answer as for the other are; labelled: `fit` learns from them with fit.labels: votes",
    )
    pairing: Pairing = Field(
        "given",
        description="what is compared of responses to one prompt, of a list or a row each: all two "
        "of them; best_worst: the best and the worst; adjacent: neighbours by score or rank; "
        "given: none, each row is a pair, or an answer that is scored in no pair",
    )
    group_column: str | None = Field(
        None, description="rows that share its value stay on one side; null: the prompt"
    )
    keep_columns: list[str] = Field(
        default_factory=list, description="columns that are carried along untouched"
    )
    max_reject_fraction: Fraction = Field(
        0.05,
        description="share; the stage fails when more rows, or more files (damaged), are set "
        "aside; `tokens` and `reference`, when more answers are",
    )
    rows_per_shard: PositiveInt = Field(
        1024,
        description="pairs a shard, the unit of scoring; about a minute's work of an annotator",
    )
    num_cpus: PositiveFloat = Field(0.5, description="CPUs of one reading task")

    def identity(self) -> dict[str, object]:
        """As of any section; without what older keys do not know, where it is as it was."""
        settings = super().identity()
        if not self.flipped_labels:
            del settings["flipped_labels"]
        else:
            settings["flipped_with"] = "votes"  # before they were turned, too, keys had no word
        if self.pairing == "given":
            del settings["pairing"]
        return settings

    @model_validator(mode="before")
    @classmethod
    def _one_test_part(cls, given: object) -> object:
        """Who brings a test part wants no second one drawn beside it, unless it is asked for."""
        if not isinstance(given, dict) or "test_fraction" in given:
            return given
        sources = given.get("sources")
        sides = [_into(source) for source in sources] if isinstance(sources, list) else []
        return {**given, "test_fraction": 0.0} if "test" in sides else given


def _into(source: object) -> object:
    """Where a source goes, be it read already or still as the file has it."""
    return source.get("into") if isinstance(source, dict) else getattr(source, "into", None)
