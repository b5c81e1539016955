"""What a setting decides: each arm's preset, the user's word over it, and whose key it changes."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from tiny import save_tiny

import cwpo_dist
from cwpo_dist.config import ARMS, Config, FitConfig, PoolConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.config.reference import everything
from cwpo_dist.graph import graph
from cwpo_dist.runs.arms import held_out_split, weighting
from cwpo_dist.runs.output_key import Node

CONFIDENT = {"labels": "annotator", "weight_function": "confidence"}
# What the README says of each arm, and what of it is not as it is for `weak`.
PRESETS: dict[str, dict[str, Any]] = {
    "human": {"labels": "human"},
    "human100": {"labels": "human", "splits": ("labelled", "unlabelled")},
    "labelled_only": {"labels": "human", "splits": ("labelled",)},
    "human_weighed": {"labels": "human", "splits": ("labelled",)}
    | {"judged": "weighed", "weight_function": "sigmoid"},
    "human_madpo": {"labels": "human", "splits": ("labelled",)}
    | {"judged": "weighed", "weight_function": "madpo"},
    "human_cleaned": {"labels": "human", "splits": ("labelled",), "judged": "cleaned"},
    "ws_dpo": {"annotator": "implicit"},
    "weak": {},
    "cw": CONFIDENT,
    "cw_mean": CONFIDENT | {"weight_normalization": "dataset"},
    "semi": CONFIDENT | {"with_human": True, "splits": ("labelled", "unlabelled")},
    "cw_calibrated": CONFIDENT | {"temperature": "fitted"},
    "ensemble": {"weight_function": "lower_confidence"},
    "proportional": CONFIDENT | {"sampling": "proportional"},
    "soft": {"soft_labels": True},
    "top30": {"top_fraction": 0.3},
    "own": CONFIDENT | {"labels": "own", "splits": ("labelled", "unlabelled")},
}
WEAK = {
    "labels": "annotator",
    "with_own": False,
    "with_human": False,
    "judged": None,
    "annotator": "fitted",
    "splits": ("unlabelled",),
    "weight_function": "one",
    "top_fraction": None,
    "temperature": None,
    "weight_normalization": "none",
    "sampling": None,
    "soft_labels": False,
}


def test_every_arm_is_what_the_readme_says() -> None:
    assert {name: arm.model_dump() for name, arm in ARMS.items()} == {
        name: WEAK | preset for name, preset in PRESETS.items()
    }


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration in which every setting is read by something."""
    folder = tmp_path_factory.mktemp("settings")
    save_tiny(folder / "model", "llama", 0)
    (folder / "pairs.jsonl").write_text(
        json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n"
    )
    model = {"model_name_or_path": str(folder / "model")}
    config = {
        "output_dir": str(folder / "run"),
        "arms": ["cw_calibrated"],
        "prepare": {
            "sources": [{"path": str(folder / "pairs.jsonl")}],
            "validation_fraction": 0.1,
        },
        "weak": model,
        "policy": model,
        "fit": {"lora": {}, "num_workers": 2},
        "sft": {"num_workers": 2},
        "align": {"num_workers": 2},
    }
    return parse_config(config).model_dump(mode="json")


def with_value(given: dict[str, Any], field: str, value: Any) -> Config:
    """The configuration with one setting, by its dotted name, changed."""
    changed = json.loads(json.dumps(given))
    *above, name = field.split(".")
    section = changed
    for part in above:
        section = section[int(part)] if isinstance(section, list) else section[part]
    section[name] = value
    return parse_config(changed)


def weighed(given: dict[str, Any], arm: str, **weigh: Any) -> dict[str, Any]:
    return weighting(with_value(given, "weigh", weigh), ARMS[arm]).identity()


def test_another_weight_function_is_for_arms_that_weigh(given: dict[str, Any]) -> None:
    for arm, preset in ARMS.items():
        found = weighed(given, arm, weight_function="sigmoid")["weight_function"]
        own = preset.weight_function
        assert found == (own if preset.labels == "human" or own == "one" else "sigmoid"), arm
        assert weighed(given, arm)["weight_function"] == own


def test_a_selection_and_a_temperature_are_for_arms_with_confidences(
    given: dict[str, Any],
) -> None:
    """Over what the preset says; a human's choice is certain, and no arm of them selects."""
    told = {"top_fraction": 0.5, "min_confidence": 0.2, "temperature": 2.0}
    for arm, preset in ARMS.items():
        found = {name: weighed(given, arm, **told)[name] for name in told}
        assert found == (dict.fromkeys(told) if preset.labels == "human" else told), arm
        plain = {name: weighed(given, arm)[name] for name in told}
        assert plain == {
            "top_fraction": preset.top_fraction,
            "min_confidence": None,
            "temperature": preset.temperature,
        }


def test_another_normalization_is_for_every_arm(given: dict[str, Any]) -> None:
    """By batch it is the loss's denominator; by the data set's mean it is in the weights."""
    for arm in ("weak", "cw", "cw_mean"):
        for told in ("batch", "dataset", None):
            changed = with_value(given, "align.weight_normalization", told)
            made = graph(changed.model_copy(update={"arms": [arm]}), arm)
            expected = "batch" if told == "batch" else "none"
            assert made["align"].settings.identity()["weight_normalization"] == expected
            by_mean = (told or ARMS[arm].weight_normalization) == "dataset" and arm != "weak"
            assert ("divided_by_mean" in made["weigh"].settings.identity()) == by_mean


def test_training_is_followed_on_validation_where_a_run_has_it(given: dict[str, Any]) -> None:
    """By its share, or by a source of its own; else on the split that is judged."""
    assert held_out_split(parse_config(given)) == "validation"
    none = with_value(given, "prepare.validation_fraction", 0.0).model_dump(mode="json")
    assert held_out_split(parse_config(none)) == "test"
    for into, split in (("validation", "validation"), ("test", "test"), ("train", "test")):
        assert held_out_split(with_value(none, "prepare.sources.0.into", into)) == split


def splits_of(config: Config, arm: str, role: str) -> list[str]:
    return list(
        graph(config.model_copy(update={"arms": [arm]}), arm)[role].settings.identity()["splits"]
    )


def test_references_are_of_what_is_trained_on_measured_and_followed(given: dict[str, Any]) -> None:
    config = parse_config(given)
    assert splits_of(config, "cw", "reference") == ["test", "unlabelled", "validation"]
    assert splits_of(config, "labelled_only", "reference") == ["labelled", "test", "validation"]
    assert splits_of(config, "ws_dpo", "teacher_reference") == ["labelled", "test", "validation"]
    for arm, preset in ARMS.items():
        assert set(preset.splits) <= set(splits_of(config, arm, "reference"))
        assert splits_of(config, arm, "weigh") == list(preset.splits)


def test_who_reads_the_policy_at_which_stage_of_its_training(given: dict[str, Any]) -> None:
    """DPO starts from the SFT model and is held against it; what was aligned is what is judged."""
    made = graph(parse_config(given), "cw_calibrated")

    def model(node: Node) -> str | None:
        return node.inputs["model"].key if "model" in node.inputs else None

    sft, align = made["sft"].key, made["align"].key
    assert {role: model(made[role]) for role in made if made[role].stage != "evaluate"} == (
        dict.fromkeys(made.keys() - {"evaluate"})
        | {"reference": sft, "align": sft, "aligned": align}
        | {"answers_sft": sft, "answers_aligned": align}
    )
    ws = graph(parse_config(given | {"arms": ["ws_dpo"]}), "ws_dpo")
    assert model(ws["teacher_before"]) == ws["teacher_sft"].key
    assert model(ws["teacher_after"]) == ws["teacher_align"].key


def test_the_teachers_rewards_have_the_beta_of_the_run(given: dict[str, Any]) -> None:
    made = graph(with_value(given, "align.beta", 0.07), "ws_dpo")
    assert made["teacher_align"].settings.identity()["beta"] == 0.07
    assert made["annotate"].settings.identity()["beta"] == 0.07


# Which settings say how and where work is done; every other one decides what comes out.
_POOL = set(PoolConfig.model_fields)
_TRAINING = {
    *("max_tokens_per_micro_batch", "gradient_checkpointing", "zero_stage", "deepspeed"),
    *("num_workers", "sequence_parallel_size"),
    *("use_gpu", "cpus_per_worker", "resources_per_worker", "max_failures"),
    *("save_steps", "save_minutes", "save_total_limit", "logging_steps", "report_to"),
    *("eval_steps", "eval_pairs", "step_timeout_s"),
}
HOW = {
    "prepare": {"num_cpus", "max_reject_fraction"},
    "fit": _TRAINING,
    "sft": _TRAINING,
    "align": _TRAINING,
    "annotate": _POOL | {"max_reject_fraction"},
    "reference": _POOL,
    "evaluate": _POOL | {"generation_batch_size"},
}
# Not walked: what has tests of its own, and TRL's spelling of `global_batch_size`.
ELSEWHERE = {
    *("output_dir", "arms", "simulated_labels", "compare", "annotate.model", "annotate.models"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    # A file has no subsets; and what is new with columns and votes has tests of its own.
    *("prepare.sources.0.name", "prepare.sources.0.data_dir", "prepare.sources.0.revision"),
    "prepare.sources.0.split",
    *("fit.labels", "fit.folds", "prepare.ties", "weigh.from_", "weigh.column"),
}
_TOKENS = {"model_name_or_path", "revision", "chat_template", "template_date"}
_TOKENS |= {"max_length", "over_length"}
_SAMPLING = {"split", "num_prompts", "max_new_tokens", "temperature", "engine"}
# Values for settings whose other value their type does not tell.
OTHER: dict[str, Any] = {
    "chat_template": "plain",
    "columns": {"prompt": "prompt"},
    "template_date": "2020-02-29",
    "deepspeed": {"zero_optimization": {"overlap_comm": True}},
    "dr_dpo_beta": 2.0,
    "eval_steps": 5,
    "gold_function": "cwpo_dist.demo.gold:score",
    "keep_columns": ["source"],
    "label_smoothing": 0.2,
    "labels": {"zone": "a"},
    "limit": 7,
    "loss_type": "orpo",
    "min_confidence": 0.2,
    "num_hidden_layers": 1,
    "pools": [{"num_actors": 2}],
    "report_to": [],
    "resources": {"x": 1.0},
    "resources_per_worker": {"x": 1.0},
    "ropo_alpha": 6.0,
    "save_minutes": 5.0,
    "seeds": [3],
    "simpo_gamma": 0.3,
    "splits": ["unlabelled"],
    "target_modules": ["q_proj"],
    "temperature": 2.0,
    "top_fraction": 0.5,
    "use_gpu": True,
    "weight_function": "sigmoid",
    "weight_normalization": "batch",
}
# The losses that read what `simpo` does not.
READS = {"align.ropo_alpha": "ropo", "align.dr_dpo_beta": "dr_dpo"}


def settings(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of all settings with their types, lists of sections by their first."""
    for name, field in section.model_fields.items():
        inner = [kind for kind in _types(field.annotation) if _is_section(kind)]
        if {name, f"{prefix}{name}"} & ELSEWHERE or name == "gold_model":
            continue
        if not inner or name in OTHER:
            yield f"{prefix}{name}", field.annotation
        elif get_origin(field.annotation) is list:
            yield from settings(inner[0], f"{prefix}{name}.0.")
        else:
            yield from settings(inner[0], f"{prefix}{name}.")


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types(part)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def another(name: str, annotation: Any, value: Any) -> Any:
    """A value that the setting may have and has not."""
    if name in OTHER:
        return OTHER[name]
    if name in {"path", "model_name_or_path"}:
        return copy_of(Path(value))
    literals = (kind for kind in _types(annotation) if get_origin(kind) is Literal)
    choices = [choice for kind in literals for choice in get_args(kind)]
    if choices:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.25
    return f"{value or ''}x"


def copy_of(place: Path) -> str:
    """Another file, or folder, of the same content."""
    other = place.with_name(f"other-{place.name}")
    if place.is_dir():
        shutil.copytree(place, other, dirs_exist_ok=True)
    else:
        shutil.copy(place, other)
    return str(other)


def value_of(given: Any, field: str) -> Any:
    for part in field.split("."):
        given = given[int(part)] if isinstance(given, list) else given[part]
    return given


def first_of(field: str) -> str:
    """The role of the first output that a setting decides."""
    section, _, name = field.partition(".")
    if section == "policy":
        return "tokens" if name in _TOKENS else "sft"
    if section == "evaluate":
        return "answers_base" if name in _SAMPLING else "evaluate"
    return {"seed": "prepare", "weak": "fit"}.get(section, section)


def ancestors(node: Node) -> set[str]:
    return {node.key}.union(*(ancestors(given) for given in node.inputs.values()))


def unread(section: type[BaseModel]) -> set[str]:
    """The fields of a section, and of those in it, that no code reads by name."""
    package = Path(cwpo_dist.__file__).parent
    trees = [ast.parse(file.read_text()) for file in package.rglob("*.py")]
    read = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    return {field for field in _fields(section) if field.rpartition(".")[2] not in read}


def _fields(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for kind in _types(field.annotation):
            if _is_section(kind):
                yield from _fields(kind, f"{prefix}{name}.")


def test_no_field_of_the_configuration_is_dead() -> None:
    """A field in no key could act nowhere, and one in a key make work anew for nothing."""
    by_text = {"a", "b", "tie", "none"}  # LabelColumn.values names them in a loop
    assert unread(Config) <= {f"prepare.sources.columns.{name}" for name in by_text}

    class WithDead(FitConfig):
        compute_fields = FitConfig.compute_fields | {"how_nobody_asked"}
        how_nobody_asked: int = 0
        what_nobody_asked: int = 0

    assert unread(WithDead) == {"how_nobody_asked", "what_nobody_asked"}


def test_the_reference_calls_the_same_settings_those_that_change_no_result() -> None:
    """But for what of a DeepSpeed section decides numbers."""
    told: dict[str, set[str]] = {}
    for each in everything():
        section, _, name = each.path.partition(".")
        if name and "." not in name and each.effect in ("no", "in part"):
            told.setdefault(section, set()).add(name)
    assert {section: told[section] for section in HOW} == HOW


def test_a_setting_changes_the_key_of_the_first_output_that_it_decides(
    given: dict[str, Any],
) -> None:
    """And of no output before it; what says how or where work is done changes none, but is told."""

    @cache
    def reading(loss_type: str) -> tuple[dict[str, Any], Any]:
        told = with_value(given, "align.loss_type", loss_type).model_dump(mode="json")
        return told, graph(parse_config(told), "cw_calibrated")

    wrong, seen = [], 0
    for field, annotation in settings(Config):
        told, before = reading(READS.get(field, "simpo"))
        section, _, name = field.partition(".")
        value = another(field.rpartition(".")[2], annotation, value_of(told, field))
        after = graph(with_value(told, field, value), "cw_calibrated")
        changed = {role for role, node in before.items() if after[role].key != node.key}
        seen += 1
        if name in HOW.get(section, set()):
            wrong += [f"{field} = {value}: {changed} changed"] if changed else []
            if all(after[role].settings == node.settings for role, node in before.items()):
                wrong.append(f"{field} = {value}: reaches no stage")
            continue
        first = first_of(field)
        above = ancestors(before[first]) - {before[first].key}
        if first not in changed:
            wrong.append(f"{field} = {value}: {first} stays the same")
        wrong += [f"{field}: {role} changed" for role in changed if before[role].key in above]
    assert wrong == []
    assert seen > 100
