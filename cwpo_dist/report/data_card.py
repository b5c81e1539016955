"""Stage outputs in; the card of their preferences or scores as a data set, out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
from datasets import DatasetInfo, Features
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData

from cwpo_dist.config import Config
from cwpo_dist.docstrings import described
from cwpo_dist.lm.identity import hub_id, public_name
from cwpo_dist.manifest import Manifest
from cwpo_dist.pairs.preferences import Preference, ScoredAnswer
from cwpo_dist.report.card import labels_and_weights, simulated, table

DataSet = Literal["preferences", "scores"]
_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M"}
_SIZES |= {10**7: "1M<n<10M", 10**8: "10M<n<100M", 10**9: "100M<n<1B"}
_SAYS = {
    "preferences": "Pairs of answers: which one is better, and how much each pair counts in "
    "confidence-weighted preference optimisation (arXiv 2603.04968).",
    "scores": "Answers and what a reward model gives each. An answer to a prompt with very many "
    "pairs may stand twice, with the same score.",
}
_USE = """## How to load it

```python
from datasets import load_dataset

rows = load_dataset("FOLDER", split="train")  # this folder, or its name on the hub
```
"""
_TRL = (
    "TRL's trainers take `prompt`, `chosen` and `rejected` as they are; `weight` they leave out.\n"
)


@dataclass(frozen=True)
class Exported:
    """What lies in the folder beside the card.

    Attributes:
        kind: which of both it is.
        schema: of its Parquet files.
        rows: how many there are.
        made: the manifests of the outputs that they come from.
        prepared: that of the pairs below them.
        arm: whose labels and weights they are, where a whole run was exported.
    """

    kind: DataSet
    schema: pa.Schema
    rows: int
    made: Sequence[Manifest]
    prepared: Manifest
    arm: tuple[Config, str] | None


def data_card(of: Exported) -> str:
    """README.md: YAML front matter by which `datasets` and the hub read it, columns, provenance."""
    sources = [source["path"] for source in of.prepared.settings["sources"]]
    meanings = described(Preference if of.kind == "preferences" else ScoredAnswer)
    made = [("sources", ", ".join(map(public_name, sources))), ("rows", f"{of.rows:,}")]
    outputs = ((each.stage, f"`{each.key}`") for each in (of.prepared, *of.made))
    lines = [
        f"---\n{_front(of, sources).to_yaml()}\n---\n",
        f"# {of.kind.title()} made by cwpo_dist\n",
        f"{_SAYS[of.kind]}\n",
        *(() if of.arm is None else simulated(of.arm[0])),
        _USE,
        *((_TRL,) if of.kind == "preferences" else ()),
        *table("Columns", ((f"`{name}`", meanings[name]) for name in of.schema.names)),
        *table("What it was made from", [*made, *_decided(of)]),
        "The texts keep the licences of their sources, which this card does not know.\n",
        *table("Stage outputs", outputs),
        *table("Versions", of.made[0].versions.items()),
    ]
    return "\n".join(lines)


def _front(of: Exported, sources: Sequence[str]) -> DatasetCardData:
    """What `datasets` and the hub read of the card."""
    front = DatasetCardData(
        license="unknown",
        tags=["preference-optimization", "dpo" if of.kind == "preferences" else "reward-model"],
        source_datasets=list(filter(None, map(hub_id, sources))) or None,
        size_categories=[next((name for n, name in _SIZES.items() if of.rows < n), "1B<n<10B")],
        configs=[{"config_name": "default", "data_files": f"{of.kind}/**/*.parquet"}],
    )
    info = DatasetInfo(features=Features.from_arrow_schema(of.schema))
    DatasetInfosDict({"default": info}).to_dataset_card_data(front)
    return front


def _decided(of: Exported) -> Iterator[tuple[str, str]]:
    """Who decided, as far as the outputs say."""
    if of.kind == "scores":
        yield "annotators", ", ".join(str(each.counts["annotator"]) for each in of.made)
    elif of.arm is not None:
        config, arm = of.arm
        counts: Mapping[str, object] = of.made[0].counts
        yield "arm", f"`{arm}`"
        figures = {"mean_weight": counts["mean_weight"], "weigh": counts}
        yield from labels_and_weights(config, arm, figures)
