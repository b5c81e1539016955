"""`cwpo bench annotator` against a plain loop: transformers, one answer at a time, and numpy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_classifier, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cwpo_dist.cli import app as cli
from cwpo_dist.evaluation.student import student

Row = dict[str, Any]
Bench = Callable[..., dict[str, Any]]
DOMAINS = ("chat", "code", None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    tiny_classifier("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def score(model: str) -> Callable[[str, str], float]:
    """As its authors would: the whole conversation through the stock classifier."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    stock = AutoModelForSequenceClassification.from_pretrained(model).eval()

    def of(prompt: str, answer: str) -> float:
        given = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = torch.tensor([tokenizer.apply_chat_template(given, return_dict=False)])
        with torch.no_grad():
            return float(stock(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)

    return of


@pytest.fixture
def bench(model: str, tmp_path: Path) -> Bench:
    """The figures of some rows, by the command line."""

    def run(rows: list[Row], *options: str, of: str = model) -> dict[str, Any]:
        data, to = tmp_path / "data.jsonl", tmp_path / "figures.json"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", "annotator", of, str(data), "--json", str(to), *options])
        assert ended.value.code == 0
        found: dict[str, Any] = json.loads(to.read_text())
        return found

    return run


def pairs() -> list[Row]:
    """Thirty with a label, some with votes; then one of each kind that is left out."""
    rows = [
        {
            "prompt": f"Say {k} of {k * k}",
            "response_a": "yes " * (k % 7 + 1),
            "response_b": f"no, not {k} " * (k % 3 + 1),
            "label": "ab"[k * 7 % 3 == 0],
            "votes_a": None,
            "votes_b": None,
            "domain": DOMAINS[k % 3],
        }
        for k in range(30)
    ]
    for row in rows[::4]:
        more, fewer = ("votes_a", "votes_b") if row["label"] == "a" else ("votes_b", "votes_a")
        row |= {more: 3, fewer: 1}
    others: list[Row] = [
        {"label": "tie"},
        {"label": None},
        {"label": "a", "response_a": "long " * 200},
        {"label": "b", "response_b": ""},
    ]
    return rows + [rows[0] | {"votes_a": None, "votes_b": None} | other for other in others]


def wilson(right: int, n: int) -> tuple[float, float]:
    z, p = 1.959963984540054, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def students(values: list[float]) -> dict[str, Any]:
    half = student(0.975, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    value = float(np.mean(values))
    return {"value": value, "low": max(0.0, value - half), "high": value + half}


def same(found: Any, expected: Any) -> None:
    assert found == pytest.approx(expected, abs=2e-5)


def accuracy(signs: list[float]) -> dict[str, Any]:
    right, decided = sum(s > 0 for s in signs), sum(s != 0 for s in signs)
    low, high = wilson(right, decided) if decided else (None, None)
    ties = len(signs) - decided
    counts = {"n": len(signs), "correct": right, "wrong": decided - right, "ties": ties}
    return counts | {"accuracy": right / decided if decided else None, "low": low, "high": high}


def check_pairs(found: dict[str, Any], told: list[tuple[float, float, int]]) -> None:
    """Of each pair: chosen − rejected in score, the share of people for it, and in length."""
    same(found["agreement"], accuracy([margin for margin, *_ in told]))
    same(found["length_baseline"], accuracy([longer for *_, longer in told]))
    same(found["chosen_longer"], accuracy([m for m, _, longer in told if longer > 0]))
    same(found["chosen_shorter"], accuracy([m for m, _, longer in told if longer < 0]))
    brier, nll, bins = [], [], dict[int, list[float]]()
    for margin, people, _ in told:
        p, agree = 1 / (1 + math.exp(-abs(margin))), people if margin > 0 else 1 - people
        brier.append(agree * (1 - p) ** 2 + (1 - agree) * p**2)
        nll.append(-agree * math.log(p) - (1 - agree) * math.log(1 - p))
        bins.setdefault(min(int((p - 0.5) * 20), 9), []).append(p - agree)
    gaps = [gap * np.sign(sum(inside)) for inside in bins.values() for gap in inside]
    ece = students(gaps)
    same(found["expected_calibration_error"], ece["value"])
    same(found["ece_interval"], [ece["low"], ece["high"]])
    same(found["brier"], students(brier))
    same(found["nll"], students(nll))


def test_every_figure_of_pairs_is_that_of_a_plain_loop(
    bench: Bench, score: Callable[[str, str], float], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pairs()
    found = bench(rows, "--by", "domain", "annotate.model.max_length=300")
    told: dict[str, list[tuple[float, float, int]]] = {"(all)": []}
    for row in rows[:30]:
        chosen, other = row["response_a"], row["response_b"]
        if row["label"] == "b":
            chosen, other = other, chosen
        margin = score(row["prompt"], chosen) - score(row["prompt"], other)
        one = margin, 1.0 if row["votes_a"] is None else 0.75, len(chosen) - len(other)
        told["(all)"].append(one)
        told.setdefault(row["domain"] or "null", []).append(one)
    assert found["domains"].keys() == told.keys() == {"(all)", "chat", "code", "null"}
    for name, of in told.items():
        check_pairs(found["domains"][name], of)
    assert len({(margin > 0, longer > 0) for margin, _, longer in told["(all)"]}) == 4
    assert (found["rows"], found["compared"]) == (34, 30)
    assert found["left_out"] == {
        **{"people found both equal": 1, "no label": 1, "over_length": 1},
        "empty answer: response_b": 1,
    }
    shown = capsys.readouterr().out
    assert "34 rows, 30 compared on cpu" in shown
    assert "left out: 1 × over_length" in shown
    assert f"{100 * found['domains']['code']['agreement']['accuracy']:.1f} %" in shown


def test_swapped_answers_turn_the_accuracy_round(bench: Bench) -> None:
    texts = [
        (row["prompt"], *[row[f"response_{k}"] for k in ("ab" if row["label"] == "a" else "ba")])
        for row in pairs()[:30]
    ]
    one = bench([{"prompt": p, "chosen": a, "rejected": b} for p, a, b in texts])
    other = bench([{"prompt": p, "chosen": b, "rejected": a} for p, a, b in texts])
    first, second = (each["domains"]["(all)"] for each in (one, other))
    assert first["agreement"]["accuracy"] == pytest.approx(1 - second["agreement"]["accuracy"])
    assert 0 < first["agreement"]["correct"] < 30
    assert first["chosen_longer"]["correct"] == second["chosen_shorter"]["wrong"]


def test_other_forms_of_the_same_pairs_have_the_same_figures(bench: Bench) -> None:
    texts = [(row["prompt"], row["response_a"], row["response_b"]) for row in pairs()[:12]]
    one = bench([{"prompt": p, "chosen": a, "rejected": b} for p, a, b in texts])
    told = {
        k: [
            [{"role": "user", "content": each[0]}, {"role": "assistant", "content": each[k]}]
            for each in texts
        ]
        for k in (1, 2)
    }
    messages = bench([{"chosen": a, "rejected": b} for a, b in zip(told[1], told[2], strict=True)])
    rated = [{"prompt": p, "responses": [b, a, "no"], "scores": [1, 2, 1]} for p, a, b in texts]
    of_lists = bench(rated, "prepare.pairing=best_worst")
    assert messages["domains"]["(all)"]["nll"] == pytest.approx(one["domains"]["(all)"]["nll"])
    assert (of_lists["rows"], of_lists["compared"], of_lists["left_out"]) == (12, 12, {})


def lists() -> list[Row]:
    """RewardBench 2: two subsets, and Ties with two rows a prompt, but for one."""
    rows: list[Row] = [
        {
            "id": str(k),
            "prompt": f"How many are {k} and {k}?",
            "chosen": [f"{2 * k}"],
            "rejected": [f"{2 * k + j} " * j for j in (1, 2, 3)],
            "subset": "Math" if k % 3 else "Focus",
        }
        for k in range(12)
    ]
    for k in range(6):
        good = [f"red {k}", "blue", f"a {k}th green"]
        bad = [f"colour {k + j}" for j in range(4)]
        if k % 3 == 0:
            good, bad = bad, good
        row = {"prompt": f"Name a colour that is not {k}.", "subset": "Ties", "rejected": bad}
        rows.append(row | {"id": f"tied:{k}", "chosen": good})
        rows.append(row | {"id": f"ref:{k}", "chosen": good[k % 3 : k % 3 + 1]})
    return rows[:-1]


def test_every_figure_of_lists_is_that_of_a_plain_loop(
    bench: Bench, score: Callable[[str, str], float], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*lists(), {"id": "x", "prompt": "p", "chosen": [], "rejected": ["a"], "subset": "Math"}]
    found = bench(rows)
    told: dict[str, list[tuple[float, float, int]]] = {"(all)": [], "Math": [], "Focus": []}
    best: dict[str, list[float]] = {name: [] for name in told}
    ties: dict[str, tuple[bool, float, float]] = {}
    for row in rows[:-1]:
        good, bad = ([score(row["prompt"], a) for a in row[k]] for k in ("chosen", "rejected"))
        if row["subset"] == "Ties":
            gap = min(good) - max(bad)
            ties[row["id"]] = gap > 0, max(good) - min(good), gap
            continue
        lengths = [len(row["chosen"][0]) - len(answer) for answer in row["rejected"]]
        for name in ("(all)", row["subset"]):
            told[name] += [(good[0] - b, 1.0, n) for b, n in zip(bad, lengths, strict=True)]
            best[name].append(float(good[0] > max(bad)))
    for name, of in told.items():
        record = found["domains"][name]
        same(record["agreement"]["correct"], sum(m > 0 for m, *_ in of))
        same(record["brier"]["value"], np.mean([(1 / (1 + math.exp(m))) ** 2 for m, *_ in of]))
        assert record["score"] == pytest.approx(np.mean(best[name]))
        same(record["best"], accuracy([x - 0.5 for x in best[name]]))
    tied, ref = (
        {k.split(":")[1]: v for k, v in ties.items() if k.startswith(kind)}
        for kind in ("tied", "ref")
    )
    both, total = sorted(set(tied) & set(ref)), 0.0
    for k in both:
        (_, spread, first), (*_, second) = tied[k], ref[k]
        total += 0.2 * (first > spread) + 0.2 * (min(first, second) > spread)
        total += 0.01 * math.tanh(min(first, second) / spread - 1)
    expected = 0.3 * np.mean([v[0] for v in tied.values()]) + total / len(both)
    expected += 0.3 * np.mean([v[0] for v in ref.values()])
    assert (len(tied), len(ref), len(both)) == (6, 5, 5)
    assert 0 < found["ties"]["tied"] < 1, "some are right, some are not"
    same(found["ties"]["tied"], np.mean([right for right, *_ in tied.values()]))
    same(found["ties"]["score"], expected)
    assert found["ties"]["low"] < expected < found["ties"]["high"]
    mean = np.mean([np.mean(best["Math"]), np.mean(best["Focus"]), expected])
    same(found["mean_score"], mean)
    assert found["left_out"] == {"wrong type: chosen": 1}
    assert f"{100 * mean:.1f} %" in capsys.readouterr().out


def test_scores_that_are_equal_are_ties(bench: Bench, model: str, tmp_path: Path) -> None:
    silent = tiny_classifier("llama")
    torch.nn.init.zeros_(silent.score.weight)
    silent.save_pretrained(tmp_path / "silent")
    tiny_tokenizer().save_pretrained(tmp_path / "silent")
    found = bench(pairs()[:30], of=str(tmp_path / "silent"))["domains"]["(all)"]
    assert (found["agreement"]["ties"], found["agreement"]["accuracy"]) == (30, None)
    assert found["brier"]["value"] is found["expected_calibration_error"] is None
    listed = bench(lists(), of=str(tmp_path / "silent"))
    assert listed["domains"]["(all)"]["score"] == 0.25
    assert listed["domains"]["(all)"]["best"]["ties"] == 12


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([], (), "it is empty"),
        ([{"prompt": "p", "text": "t"}], (), "no columns for two answers"),
        ([{"prompt": "p", "chosen": ["a"], "rejected": ["a"]}], (), "1 × identical answers"),
        ([{"prompt": "p", "response_a": "x", "response_b": "y"}], (), "1 × no label"),
        ([{"prompt": "p", "chosen": "x", "rejected": "y"}], ("--by", "z"), "--by: there is no"),
        ([{"prompt": "p", "chosen": "x" * 999, "rejected": "y"}], (), "1 × over_length"),
        (pairs()[:2], ("annotate.model=null",), "annotate.model: "),
        (pairs()[:2], ("nonsense",), "write key.sub=value"),
    ],
)
def test_what_cannot_be_measured_ends_in_one_message(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[Row],
    options: tuple[str, ...],
    said: str,
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    refused(capsys, said, model, str(data), *options)


def test_a_hostile_file_or_model_ends_in_one_message(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, torn = tmp_path / "good.jsonl", tmp_path / "torn.parquet"
    good.write_text(json.dumps({"prompt": "p", "chosen": "x", "rejected": "y"}))
    torn.write_bytes(b"PAR1\x00\xff" * 9)
    refused(capsys, "damaged file", model, str(torn))
    refused(capsys, "nothing to read", model, str(tmp_path / "none.jsonl"))
    refused(capsys, "annotate.model.model_name_or_path", str(tmp_path / "none"), str(good))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama", "num_labels": [')
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    refused(capsys, "annotate.model.model_name_or_path", str(broken), str(good))
    (tmp_path / "file").write_text("")
    refused(capsys, "file", model, str(good), "--json", str(tmp_path / "file" / "x.json"))


def test_the_command_teaches_by_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "annotator", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Example: cwpo bench annotator models/annotator heldout.jsonl --by domain" in shown


def refused(capsys: pytest.CaptureFixture[str], said: str, *arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "annotator", *arguments])
    assert ended.value.code == cli.USER_ERROR
    told = capsys.readouterr().err
    assert said in told
    assert (told.count("error:"), "Traceback" in told) == (1, False)
