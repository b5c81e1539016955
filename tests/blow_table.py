"""A run that has ended in; how it differs from one without blows, and a table of all blows, out."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prepared
import pyarrow.dataset as ds
from blown_run import Run
from history import Did, load, violations
from small_recipe import STEPS, configured, nodes

from cwpo_dist.storage import MANIFEST, Store

# Folders with the column that names their rows, and the count of these.
COUNTED = (
    ("pairs", "pair_id", "pairs"),
    ("scores", "answer_id", "rows"),
    ("preferences", "pair_id", "selected"),
)
SAME = ("pairs/", "rejects/", "scores/", "tokens/", "preferences/", "model/")  # byte for byte
PASSING = ("work/", "checkpoints/", "ray/")  # what no ended run has
STAGES = ("prepare", "annotate", "tokens", "weigh", "align")


@dataclass(frozen=True)
class Blow:
    """One blow, and what became of it.

    Attributes:
        kind: of the blow.
        place: `disk` or `s3`.
        at: when it fell, in seconds of the machine's clock.
        stage: the struck driver's.
        said: the errors of ours by which drivers ended then.
        recovery_s: until something new was committed; None where all had been.
        why: where that was, and what took longest.
    """

    kind: str
    place: str
    at: float
    stage: str
    said: tuple[str, ...] = ()
    recovery_s: float | None = None
    why: str = ""


def outputs(run: Run) -> dict[str, bytes]:
    """All that a run left, but what a store keeps for itself."""
    store = Store(run.uri)
    return {name: store.read(name) for name in store.names()}


def differences(run: Run, quiet: Mapping[str, bytes]) -> tuple[list[str], list[str]]:
    """What is lost, and what is there twice or too much, as against a run without blows."""
    found = outputs(run)
    compared = {name for name in (*found, *quiet) if name.split("/", 2)[2].startswith(SAME)}
    lost = [f"missing: {name}" for name in sorted(compared - found.keys())]
    lost += [
        f"other bytes: {name}"
        for name in sorted(compared & found.keys() & quiet.keys())
        if found[name] != quiet[name]
    ]
    lost += _other_manifests(found, quiet)
    more = [f"too much: {name}" for name in sorted(compared - quiet.keys())]
    more += [f"left over: {name}" for name in found if name.split("/", 2)[2].startswith(PASSING)]
    more += _unlike_its_counts(run, found)
    return lost, more


def _other_manifests(found: Mapping[str, bytes], quiet: Mapping[str, bytes]) -> list[str]:
    """Their counts, and the metrics of each step, without what depends on time."""

    def counts(files: Mapping[str, bytes], name: str) -> Any:
        kept = json.loads(files[name])["counts"] if name in files else None
        return {k: v for k, v in (kept or {}).items() if k not in {"last", "seconds"}}

    def losses(files: Mapping[str, bytes]) -> Any:
        lines = next(files[name] for name in files if name.endswith("/metrics.jsonl"))
        records = (json.loads(line) for line in lines.splitlines())
        return [(each["step"], each["loss"], each["grad_norm"]) for each in records]

    manifests = [name for name in quiet if name.endswith(f"/{MANIFEST}")]
    other = [f"other counts: {n}" for n in manifests if counts(found, n) != counts(quiet, n)]
    if losses(found) != losses(quiet):
        other.append(f"other metrics: {losses(found)}, not {losses(quiet)}")
    assert len(losses(quiet)) == STEPS
    return other


def _unlike_its_counts(run: Run, found: Mapping[str, bytes]) -> list[str]:
    """Rows in are pairs, merged and rejects, each once; others' readers see the same rows."""
    config = configured(run.inputs, run.uri)
    root, told = Store(run.uri), []
    for node in nodes(config).values():
        place = root.child(*node.path.split("/"))
        counts = place.read_json(MANIFEST)["counts"]
        if node.stage == "prepare":
            try:
                prepared.add_up(counts, place)
            except AssertionError as error:
                told.append(f"prepare does not add up: {error}")
        if not run.on_disk:
            continue
        partial = [path for path in Path(place.root).rglob("*") if path.name.endswith(".partial")]
        told += [f"half-written: {path}" for path in partial]
        for name, of, key in COUNTED:
            if (folder := Path(place.root, name)).is_dir():
                rows = ds.dataset(folder).to_table([of])[of].to_pylist()
                if not len(rows) == len(set(rows)) == counts[key]:
                    told.append(f"{folder}: {len(rows)} rows of {counts[key]}")
    return told


def judged(run: Run, quiet: Mapping[str, bytes], blows: Sequence[Blow]) -> dict[str, Any]:
    """All that is to be said of a run that an undisturbed driver has ended."""
    history = load(run.log)
    lost, doubled = differences(run, quiet)
    return {
        "lost": lost,
        "doubled": doubled,
        "violations": violations(history),
        "operations": len(history),
        "blows": [vars(blow) | _recovery(blow, history) for blow in blows],
    }


def _recovery(blow: Blow, history: Sequence[Did]) -> dict[str, Any]:
    """How long nothing new was committed."""
    after = [did for did in history if did.begin > blow.at]
    made = [did for did in after if did.outcome == "won" and "/lease/" not in did.name]
    if not made:
        return {}
    first = min(made, key=lambda did: did.end)
    waited = [min(d.end, first.end) - d.begin for d in after if d.op == "acquire"]
    held = f", {max(waited):.2f} s of it for the lease" if max(waited, default=0.0) > 0.1 else ""
    recovery = first.end - blow.at
    return {
        "recovery_s": recovery,
        "why": f"to the next commit of {first.name.split('/')[0]}{held}",
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each kind of blow and place."""
    rows = [
        "| blow | on | fell | where (" + ", ".join(STAGES) + ", elsewhere) | drivers that gave up, "
        "by which error | lost | there twice | not explained | recovery, median and slowest, s | "
        "the slowest: what was committed then, and what took longest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_kind: dict[tuple[str, str], list[tuple[Any, Any]]] = defaultdict(list)
    for result in results:
        for blow in result["blows"]:
            by_kind[blow["kind"], blow["place"]].append((blow, result))
    for (kind, place), fell in sorted(by_kind.items()):
        blows, whole = [blow for blow, _ in fell], {id(run): run for _, run in fell}.values()
        where = Counter(b["stage"] if b["stage"] in STAGES else "" for b in blows)
        said = Counter(each for blow in blows for each in blow["said"])
        timed = sorted((b["recovery_s"], b["why"]) for b in blows if b["recovery_s"] is not None)
        slow = f"{timed[len(timed) // 2][0]:.2f}, {timed[-1][0]:.2f}" if timed else "–"
        ended = ", ".join(f"{count} {name}" for name, count in said.most_common()) or "none"
        bad = [sum(len(run[what]) for run in whole) for what in ("lost", "doubled", "violations")]
        cells = [kind, place, len(blows), ", ".join(str(where[s]) for s in (*STAGES, ""))]
        cells += [ended, *bad, slow, timed[-1][1] if timed else "–"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"
