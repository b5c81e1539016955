"""`annotate.batch_invariant`: the bits of a score are its answer's own, in whatever company."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from test_earlier_scores import annotated, growing, place, write
from tiny import tiny_classifier, tiny_tokenizer, word_tokenizer
from torch.nn.functional import linear, scaled_dot_product_attention

from cwpo_dist.canonical import parquet_bytes
from cwpo_dist.config import ConfigError, ModelConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.lm import fixed_shapes
from cwpo_dist.lm.fixed_shapes import BLOCK, TILE, FixedShapes, UnfitError, by_tile
from cwpo_dist.lm.loading import ModelError
from cwpo_dist.lm.modules import AnswerScores
from cwpo_dist.lm.packed import by_row
from cwpo_dist.pairs.records import pair_id, prompt_id
from cwpo_dist.pairs.stored import pairs_of, whole_schema, write_pairs
from cwpo_dist.planning.plan import plan
from cwpo_dist.scoring.answers_in import AnswersIn
from cwpo_dist.scoring.earlier_scores import EarlierScores, NewAnswersWorker, ranged_files
from cwpo_dist.scoring.invariant import InvariantForward
from cwpo_dist.scoring.pipeline import part
from cwpo_dist.scoring.scorers import RewardWorker
from cwpo_dist.storage import Store

Pairs = Sequence[dict[str, Any]]
ARCHS = ("llama", "bert")  # packed rows by fixed shapes, and each answer alone


def made_pairs(number: int) -> list[dict[str, Any]]:
    """Pairs of unlike lengths; three answers a prompt, so that each stands in two pairs."""
    draw = random.Random(0)

    def text(most: int) -> str:
        return "".join(draw.choices("abcdefgh  ", k=draw.randint(1, most)))

    found: list[dict[str, Any]] = []
    while len(found) < number:
        prompt, answers = f"{text(80)}: ", [f"{len(found)} {k} {text(80)}" for k in range(3)]
        for a, b in itertools.combinations(answers, 2):
            given = {"prompt": prompt, "response_a": a, "response_b": b, "split": "unlabelled"}
            name = pair_id(prompt_id(prompt), a, b)
            found.append(given | {"pair_id": name, "source": "made"})
    return found[:number]


PAIRS = made_pairs(18)


def saved(folder: Path, arch: str) -> ModelConfig:
    tiny_classifier(arch).save_pretrained(folder)
    (word_tokenizer() if arch == "bert" else tiny_tokenizer()).save_pretrained(folder)
    given = {"model_name_or_path": str(folder), "max_length": 400, "chat_template": "plain"}
    return ModelConfig.model_validate(given)


class Outputs:
    """Outputs of one loaded annotator, each of other pairs, shards and batches."""

    def __init__(self, folder: Path, arch: str, *, batch_invariant: bool) -> None:
        self.folder, self.number = folder, itertools.count()
        self.worker = RewardWorker(
            AnswersIn(Store(str(folder))),
            saved(folder / "model", arch),
            "it",
            4096,
            batch_invariant=batch_invariant,
        )

    def score(
        self, pairs: Pairs, rows: int, tokens: int = 4096, earlier: Iterable[Store] = ()
    ) -> Store:
        """The scores of so many pairs a shard; those that an earlier output has are copied."""
        store = Store(str(self.folder / str(next(self.number))))
        self.worker.answers, self.worker.forward.max_tokens = AnswersIn(store), tokens
        files = EarlierScores(ranged_files(earlier, "scores"))
        worker = NewAnswersWorker(files, self.worker.answers, lambda: self.worker)
        ordered = sorted(pairs, key=lambda pair: str(pair["pair_id"]))
        for index in range(-(-len(pairs) // rows)):
            held = ordered[index * rows : (index + 1) * rows]
            write_pairs(store, index, pairs_of(pa.Table.from_pylist(held, whole_schema("text"))))
            output = worker(index, worker.read(index))
            assert output.rows.num_rows == output.counts["rows_in"], output.counts
            store.create_table(part("scores", index), output.rows)
        return store


def content(store: Store) -> bytes:
    """All scores of an output, however they are cut into shards, as one file.

    An answer whose pairs lie in several shards is scored in each, to the same bits.
    """
    table = pa.concat_tables(store.read_table(name) for name in store.names("scores"))
    once = table.group_by(table.column_names).aggregate([]).sort_by("answer_id")
    return parquet_bytes(once.combine_chunks().replace_schema_metadata(None))


def grown(outputs: Outputs, steps: Sequence[tuple[Pairs, int, int]]) -> Store:
    """The last of several outputs, each of all pairs so far: pairs, rows a shard, tokens."""
    earlier: list[Store] = []
    seen: list[dict[str, Any]] = []
    for more, rows, tokens in steps:
        seen = [*seen, *more]
        earlier.append(outputs.score(seen, rows, tokens, list(earlier)))
    return earlier[-1]


PATTERNS: dict[str, list[tuple[Pairs, int, int]]] = {
    "appended": [(PAIRS[:13], 8, 4096), (PAIRS[13:], 8, 4096)],
    "small increments": [(PAIRS[k : k + 5], 8, 4096) for k in range(0, 18, 5)],
    "other order, shards and batches": [(PAIRS[:7:-1], 5, 100), (PAIRS[7::-1], 30, 1500)],
}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_grown_output_equals_a_fresh_one_byte_for_byte(arch: str, tmp_path: Path) -> None:
    outputs = Outputs(tmp_path, arch, batch_invariant=True)
    fresh = content(outputs.score(PAIRS, 8))
    for name, steps in PATTERNS.items():
        assert content(grown(outputs, steps)) == fresh, name
    for rows, tokens in ((30, 64), (7, 2000)):
        assert content(outputs.score(PAIRS, rows, tokens)) == fresh, (rows, tokens)


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_without_the_setting_bits_depend_on_the_batch(arch: str, tmp_path: Path) -> None:
    """What the test above would see: the same pairs, in batches of other sizes."""
    outputs = Outputs(tmp_path, arch, batch_invariant=False)
    others = {content(outputs.score(PAIRS, *how)) for how in ((30, 64), (30, 1500), (7, 2000))}
    assert len(others) > 1


def test_an_answer_has_one_score_wherever_its_pairs_lie(tmp_path: Path) -> None:
    """Beside other answers of its prompt, or fewer, or none."""
    outputs = Outputs(tmp_path, "llama", batch_invariant=True)
    found: dict[str, set[float]] = {}
    for shard_rows in (30, 1):
        store = outputs.score(PAIRS, shard_rows)
        for name in store.names("scores"):
            for row in store.read_table(name).to_pylist():
                found.setdefault(row["answer_id"], set()).add(row["score"])
    assert len(found) == len(PAIRS), "three answers and three pairs a prompt"
    assert all(len(scores) == 1 for scores in found.values())


def forward_of(model: Any) -> InvariantForward:
    return InvariantForward(AnswerScores(model), 2, 512, 4096)


def test_decoders_are_packed_and_others_read_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert forward_of(tiny_classifier("llama")).tiled
    assert not forward_of(tiny_classifier("llama", attn_implementation="eager")).tiled
    assert (
        "each answer in a pass of its own, which is slower, as it takes shared rows" in caplog.text
    )


@pytest.mark.parametrize("kind", ["batch", "product", "attention"])
def test_a_decoder_that_is_not_invariant_in_packed_rows_is_read_alone(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It adds what depends on the batch: by its length, by a product or attention of its shape."""
    model = tiny_classifier("llama")

    def disturb(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        if kind == "batch":
            return output * (1 + 1e-6 * output.shape[1])
        if kind == "product":
            return output + 0 * torch.bmm(output, torch.zeros(len(output), 32, 32))
        return output + 0 * scaled_dot_product_attention(*[output[:, None]] * 3)[:, 0]

    model.model.layers[0].mlp.register_forward_hook(disturb)
    forward = forward_of(model)
    assert not forward.tiled
    said = {
        "batch": "other bits in other batches",
        "product": "aten::bmm",
        "attention": "aten::_scaled",
    }
    assert said[kind] in caplog.text


def test_a_scorer_with_other_bits_each_time_is_refused_by_name() -> None:
    model, calls = tiny_classifier("llama"), itertools.count()
    model.score.register_forward_hook(lambda _module, _args, out: out * (1 + 1e-6 * next(calls)))
    with pytest.raises(ModelError, match=r"annotate\.batch_invariant: LlamaForSequence.* on cpu"):
        forward_of(model)


def test_a_kernel_that_heeds_places_within_a_block_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, rows = torch.randn(8, 16), torch.randn(5, 16)
    with torch.no_grad(), FixedShapes(proving=True):
        linear(rows, weight)
    given = torch.mm

    def uneven(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        given(left, right, out=out)
        out[BLOCK // 2] *= 1 + 1e-6
        return out

    monkeypatch.setattr(torch, "mm", uneven)
    with (
        torch.no_grad(),
        FixedShapes(proving=True),
        pytest.raises(UnfitError, match="16 × 8 gives a row other bits"),
    ):
        linear(rows, weight)


def test_products_take_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any number of rows, with a bias or none; their values are those of the plain product."""
    shapes = set()
    given = torch.mm, torch.addmm

    def noted(product: Any, *args: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        shapes.add(args[-2].shape[0])
        return product(*args, out=out)

    monkeypatch.setattr(torch, "mm", partial(noted, given[0]))
    monkeypatch.setattr(torch, "addmm", partial(noted, given[1]))
    weight, bias = torch.randn(8, 16), torch.randn(8)
    for rows in (1, BLOCK - 1, BLOCK, 2 * BLOCK + 5):
        hidden = torch.randn(1, rows, 16)
        for b in (None, bias):
            expected = linear(hidden, weight, b)
            with torch.no_grad(), FixedShapes():
                torch.testing.assert_close(linear(hidden, weight, b), expected)
    assert shapes == {BLOCK}


def test_attention_by_tiles_is_that_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = ((1, 1, 2), (TILE - 1, 1, TILE), (TILE, TILE + 1), (150, 5, 97, 70))
    tokens = sum(map(sum, lengths))
    query, key, value = (torch.randn(1, heads, tokens, 8) for heads in (4, 2, 2))
    expected = by_row(query, key, value, lengths, None)
    asked = set()

    def noted(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked.add((q.shape[2], k.shape[2] % TILE))
        return scaled_dot_product_attention(q, k, *args, **kwargs)

    monkeypatch.setattr(fixed_shapes, "scaled_dot_product_attention", noted)
    torch.testing.assert_close(by_tile(query, key, value, lengths, None), expected)
    assert asked == {(TILE, 0)}


def test_one_thread_computes(caplog: pytest.LogCaptureFixture) -> None:
    torch.set_num_threads(2)
    try:
        forward_of(tiny_classifier("bert"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert "one thread computes here, of 2; give cpus_per_actor: 1 and more actors" in caplog.text


def test_the_setting_is_part_of_the_key_where_it_is_on(tmp_path: Path) -> None:
    saved(tmp_path / "reward", "llama")
    write(tmp_path / "in" / "0.jsonl", 0, 3)
    keys = []
    for more in ({}, {"batch_invariant": False}, {"batch_invariant": True}):
        config = growing(tmp_path)
        section = json.loads(config.annotate.model_dump_json(exclude_unset=True)) | more
        keys.append(place(growing(tmp_path, annotate=section), "annotate").uri)
    assert keys[0] == keys[1] != keys[2]
    on = growing(tmp_path, annotate=section)
    assert "batch_invariant" not in growing(tmp_path).annotate.identity()
    (note,) = (note for note in plan(on).notes if "batch_invariant" in note)
    assert "the same bits whatever is scored beside it" in note
    assert not [note for note in plan(growing(tmp_path)).notes if "batch_invariant" in note]


def test_pools_on_unlike_devices_are_refused() -> None:
    """Before any worker: either of them may score a pair."""
    given = {"output_dir": "runs/x", "prepare": {"sources": [{"path": "pairs.jsonl"}]}}
    gpu = {"gpus_per_actor": 1}
    for pools in ([{}, gpu], [gpu, gpu | {"accelerator_type": "L4"}]):
        with pytest.raises(ConfigError, match=r"annotate.*batch_invariant: pools on .*one kind"):
            parse_config(given | {"annotate": {"batch_invariant": True, "pools": pools}})
        parse_config(given | {"annotate": {"pools": pools}})
    alike = [gpu, {"gpus_per_actor": 0.5}]
    parse_config(given | {"annotate": {"batch_invariant": True, "pools": alike}})


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_local")
def test_a_run_that_grew_has_the_scores_of_one_that_did_not(tmp_path: Path) -> None:
    """On Ray, with the real `prepare`; other shards, budget and actors in the fresh run."""
    saved(tmp_path / "reward", "llama")
    write(tmp_path / "in" / "0.jsonl", 0, 40)
    config = growing(tmp_path)
    section = json.loads(config.annotate.model_dump_json(exclude_unset=True))
    section |= {"batch_invariant": True}
    annotated(growing(tmp_path, annotate=section))
    write(tmp_path / "in" / "1.jsonl", 40, 55)
    counts, today = annotated(growing(tmp_path, annotate=section))
    assert (counts["rows"], counts["reused"]) == (55, 40)
    section |= {"max_tokens_per_batch": 100, "num_actors": 2}
    prepare = json.loads(config.prepare.model_dump_json(exclude_unset=True)) | {"rows_per_shard": 7}
    other = {"output_dir": str(tmp_path / "other"), "annotate": section, "prepare": prepare}
    _, afresh = annotated(growing(tmp_path, **other))
    assert today == afresh
