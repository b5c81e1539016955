"""The paper's recipes: every combination parses, and says what the paper's tables say."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from cwpo_dist.config import Config, LoraConfig, Source
from cwpo_dist.config.load import load_config
from cwpo_dist.runs.named_loss import objective
from cwpo_dist.runs.trials import baseline, names, section, trials

RECIPES = Path(__file__).parents[1] / "jobs" / "recipes"
DATA = ("hh-harmless", "hh-helpful", "tldr", "ultrafeedback")
# weak and policy
MODELS = {
    "opt-1.3b": ("facebook/opt-125m", "facebook/opt-1.3b"),
    "opt-13b": ("facebook/opt-125m", "facebook/opt-13b"),
    "qwen2.5-7b": ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B"),
    "qwen2.5-14b": ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-14B"),
}
WHOLE = ("small", "hh-compare", "hh-gold")
LAID_OVER = ("ukp-compare", "gold-compare")
COMBINATIONS = list(itertools.product(DATA, MODELS))
LONGEST = {"hh-harmless": 512, "hh-helpful": 512, "tldr": 1024, "ultrafeedback": 512}
UNPINNED = {"opt-1.3b", "opt-13b", "tldr"}
COMMIT = re.compile(r"[0-9a-f]{40}")


def recipe(data: str, models: str) -> Config:
    files = [str(RECIPES / f"{name}.yaml") for name in ("paper", data, models)]
    return load_config(files[0], files[1:])


def test_every_file_is_known() -> None:
    known = {"paper", *DATA, *MODELS, *WHOLE, *LAID_OVER}
    assert {path.stem for path in RECIPES.glob("*.yaml")} == known


@pytest.mark.parametrize("name", WHOLE)
def test_a_recipe_of_one_file_is_complete(name: str) -> None:
    config = load_config(RECIPES / f"{name}.yaml")
    assert config.policy is not None
    assert config.weak is not None


@pytest.mark.parametrize("models", MODELS)
def test_an_actor_with_a_gpu_has_the_processors_to_feed_it(models: str) -> None:
    """One launches, one lays out; where text is read, its tokenizer has several."""
    config = recipe("hh-harmless", models)
    assert all(
        pool.gpus_per_actor and pool.cpus_per_actor >= processors
        for section, processors in (
            (config.annotate, 8),
            (config.reference, 2),
            (config.evaluate, 8),
        )
        for pool in section.actor_pools()
    )


def test_comparisons_have_trials_of_the_papers_questions() -> None:
    hh, ukp = (str(RECIPES / f"{name}-compare.yaml") for name in ("hh", "ukp"))
    config = load_config(hh)
    told = list(names(trials(config)).values())
    assert told[:3] == ["human", "human100", "ws_dpo"]
    assert {"weak", "cw, 30 % labelled", "cw, 20 % labelled"} <= set(told)
    assert baseline(config, trials(config)) == "human"
    assert section(config).seeds == [0, 1, 2, 3, 4]
    told = list(names(trials(load_config(hh, [ukp]))).values())
    assert told == ["human", "weak", "cw"]


@pytest.mark.parametrize(("data", "models"), COMBINATIONS)
def test_a_recipe_has_the_papers_settings(data: str, models: str) -> None:
    config = recipe(data, models)
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05)
    assert config.arms == ["human", "weak", "cw"]
    assert config.prepare.labelled_fraction == 0.3
    fit, sft, align = config.fit, config.sft, config.align
    assert sft is not None
    assert (fit.num_train_epochs, fit.learning_rate, fit.global_batch_size) == (5, 1e-5, 32)
    assert fit.lora is None
    assert (sft.num_train_epochs, sft.learning_rate, sft.global_batch_size) == (3, 1e-5, 16 * 4)
    assert (align.num_train_epochs, align.learning_rate) == (5, 5e-6)
    assert (align.global_batch_size, align.beta) == (16 * 4, 0.5)
    robust = align.model_copy(update={"loss_type": "robust"})
    assert objective(robust)[1].label_smoothing == 0.1
    for training in (sft, align):
        assert training.lora == lora
        assert (training.lr_scheduler_type, training.warmup_steps) == ("cosine", 100)
        assert (training.weight_decay, training.gradient_checkpointing) == (0.05, True)
    assert (config.evaluate.temperature, config.evaluate.max_new_tokens) == (0.95, 512)


@pytest.mark.parametrize(("data", "models"), COMBINATIONS)
def test_a_recipe_names_its_models_and_lengths(data: str, models: str) -> None:
    config = recipe(data, models)
    assert config.weak is not None
    assert config.policy is not None
    names = (config.weak.model_name_or_path, config.policy.model_name_or_path)
    assert names == MODELS[models]
    assert config.weak.max_length == config.policy.max_length == LONGEST[data]
    gold = config.evaluate.gold_model
    assert gold is not None
    wanted = "OpenAssistant/reward-model-deberta" if data == "tldr" else "Skywork/Skywork-Reward-V2"
    assert gold.model_name_or_path.startswith(wanted)


@pytest.mark.parametrize("data", DATA)
def test_training_and_test_pairs_come_from_their_own_sides(data: str) -> None:
    train, test = recipe(data, "opt-1.3b").prepare.sources
    assert (train.into, test.into) == ("train", "test")
    assert train.split != test.split
    shared: set[str] = set(Source.model_fields) - {"split", "into", "limit"}
    assert train.model_dump(include=shared) == test.model_dump(include=shared)


def test_revisions_are_commits_but_for_files_that_say_why_not() -> None:
    for path in RECIPES.glob("*.yaml"):
        text = path.read_text()
        revisions = re.findall(r"^\s*revision: (\S+)", text, flags=re.MULTILINE)
        unpinned = [revision for revision in revisions if not COMMIT.fullmatch(revision)]
        assert bool(unpinned) == (path.stem in UNPINNED), path
        assert not unpinned or "pin" in text.split("prepare:")[0].split("weak:")[0], path


def test_the_gold_comparison_flips_the_labels_of_annotator_and_people_alike() -> None:
    demo = RECIPES.parents[1] / "cwpo_dist" / "demo" / "demo.yaml"
    config = load_config(demo, [str(RECIPES / "gold-compare.yaml")])
    assert list(names(trials(config)).values()) == [
        "human100, 0 % flipped",
        "human100, 30 % flipped",
        "weak",
        "cw, 0 % flipped",
        "cw_mean",
        "semi",
        "labelled_only",
        "cw, 30 % flipped",
    ]
    assert config.align.max_steps == -1
    assert config.evaluate.gold_function == "cwpo_dist.demo.gold:score"
