"""What the stages of training hand to their workers: the loss and its numbers, seed, start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from world import World

from cwpo_dist.stages import (
    align,
    fit,
    sft,
    weigh,
)
from cwpo_dist.training.tasks import Preference
from cwpo_dist.training.train_rank import TrainSpec


def logp(text: str) -> float:
    """A log-prob by which each answer is known again."""
    return -3.0 - len(text) - 20.0 * ("won" in text) - 40.0 * ("high" in text)


def spec_of(world: World, stage: Any, role: str, patch: pytest.MonkeyPatch) -> TrainSpec:
    """What a stage hands to its workers."""
    specs: list[TrainSpec] = []
    patch.setattr(stage, "train", lambda spec: specs.append(spec) or {})
    node = world.node(role)
    stage.make(world.context, node)
    (spec,) = specs
    return spec


def preferences(world: World, spec: TrainSpec) -> tuple[Preference, Preference]:
    """What is trained on, and what training is followed by."""
    assert spec.make_held_out is not None
    task, held_out = spec.make_task(world.encoder), spec.make_held_out(world.encoder)
    assert isinstance(task, Preference)
    assert isinstance(held_out, Preference)
    return task, held_out


@pytest.mark.parametrize(
    ("section", "numbers"),
    [
        ({"loss_type": "robust", "beta": 0.07}, ("robust", 0.07, 0.1, 0.5)),
        ({"loss_type": "robust", "label_smoothing": 0.2}, ("robust", 0.5, 0.2, 0.5)),
        ({"loss_type": "simpo", "simpo_gamma": 0.9, "beta": 2.0}, ("simpo", 2.0, 0.0, 0.9)),
        ({"loss_type": "ipo", "sft_coefficient": 0.2}, ("ipo", 0.5, 0.0, 0.5)),
        ({"loss_type": "ropo", "ropo_alpha": 6.0}, ("ropo", 0.5, 0.0, 0.5)),
        ({"loss_type": "dr_dpo", "dr_dpo_beta": 2.0}, ("dr_dpo", 0.5, 0.0, 0.5)),
        ({"loss_type": "wpo"}, ("wpo", 0.5, 0.0, 0.5)),
        ({"loss_type": "sigmoid", "batch_by": "prompt"}, ("sigmoid", 0.5, 0.0, 0.5)),
    ],
)
def test_workers_are_told_the_loss_and_its_numbers(
    section: dict[str, Any],
    numbers: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(tmp_path, ["proportional", "weak"], align=section)
    world.score()
    world.tokenise()
    if "reference" in world.graphs["proportional"]:
        world.log_probs("reference", None, logp)
    weigh.make(world.context, world.node("weigh"))
    for task in preferences(world, spec_of(world, align, "align", monkeypatch)):
        told = (task.loss_type, task.beta, task.label_smoothing, task.simpo_gamma)
        assert told == numbers
        assert task.sft_coefficient == section.get("sft_coefficient", 0.0)
        assert task.ropo_alpha == section.get("ropo_alpha", 14.0)
        assert task.dr_dpo_beta == section.get("dr_dpo_beta", 1.0)
        assert task.batch_by == section.get("batch_by", "pair")
        assert (task.references is None) == (section["loss_type"] == "simpo")


def test_what_follows_training_counts_each_pair_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People's choices of validation pairs: no weight, no soft label and no draw of the arm's."""
    for arm in ("proportional", "soft", "cw_mean"):
        world = World(tmp_path / arm, [arm])
        world.score()
        world.tokenise()
        world.log_probs("reference", None, logp)
        weigh.make(world.context, world.node("weigh"))
        _, held_out = preferences(world, spec_of(world, align, "align", monkeypatch))
        assert set(held_out.weights) == {1.0}
        assert (held_out.normalization, held_out.sampling) == ("none", None)
        assert held_out.probabilities is None
        assert held_out.references is not None
        assert {i.split("-")[0] for i in held_out.pair_ids} == {"validation"}


def test_each_training_has_its_seed_and_starts_where_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, ["cw"], fit={"seeds": [7], "batch_by": "prompt"}, seed=5)
    world.score()
    fitted, tuned, aligned = (
        spec_of(world, stage, role, monkeypatch)
        for stage, role in ((fit, "fit"), (sft, "sft"), (align, "align"))
    )
    assert (fitted.seed, tuned.seed, aligned.seed) == (7, 5, 5)
    given = world.config.policy
    assert given is not None
    assert tuned.model == given
    assert fitted.model == world.config.weak
    assert aligned.model.model_name_or_path == world.place("sft").child("model").uri
    assert fitted.make_task(world.encoder).batch_by == "prompt"
    assert (fitted.head, tuned.head, aligned.head) == ("scores", "logps", "logps")
    seeds = {
        role: world.node(role).settings.identity()["seed"]
        for role in ("prepare", "fit", "sft", "align")
    }
    assert seeds == {"prepare": 5, "fit": 7, "sft": 5, "align": 5}
    plain = World(tmp_path / "plain", ["cw"], seed=5)
    assert spec_of(plain, fit, "fit", monkeypatch).seed == 5
