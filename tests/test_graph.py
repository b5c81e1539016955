"""Content keys: what changes a stage's output changes its key, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from tiny import save_tiny

from cwpo_dist.config import Config, ConfigError, ModelConfig
from cwpo_dist.config.load import parse_config
from cwpo_dist.graph import graph, nodes_until
from cwpo_dist.runs import arms, given_model
from cwpo_dist.runs.output_key import Node, retry_manifest
from cwpo_dist.storage import Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph")
    save_tiny(path / "model", "llama", 0)
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    (path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    return path


def keys(folder: Path, arm: str = "cw", **changes: Any) -> dict[str, str]:
    config: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "arms": [arm],
        "prepare": {"sources": [{"path": str(folder / "pairs.jsonl")}]},
        "weak": {"model_name_or_path": str(folder / "model"), "num_hidden_layers": 1},
        "policy": {"model_name_or_path": str(folder / "model")},
    }
    for dotted, value in changes.items():
        section, _, name = dotted.partition("__")
        if name:
            config.setdefault(section, {})[name] = value
        else:
            config[section] = value
    return {role: node.key for role, node in graph(parse_config(config), arm).items()}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {role for role in before if before[role] != after[role]}


ALIGNED = {"align", "aligned", "answers_aligned", "evaluate"}


def test_another_weighting_annotates_nothing_and_computes_no_reference(folder: Path) -> None:
    after = keys(folder, weigh__weight_function="sigmoid")
    assert changed(keys(folder), after) == {"weigh"} | ALIGNED


def test_arms_with_the_same_labels_share_all_but_weighing_and_aligning(folder: Path) -> None:
    arms = ["weak", "cw", "cw_mean", "top30"]
    tables = [keys(folder, arms=arms)] + [keys(folder, arm, arms=arms) for arm in arms]
    for role in tables[0].keys() - ALIGNED - {"weigh"}:
        assert len({table[role] for table in tables}) == 1, role
    assert len({table["align"] for table in tables}) == 4


@pytest.mark.parametrize(("own", "joint"), [("annotator", False), ("both", True)])
def test_sft_knows_the_temperatures_that_decide_who_won(
    folder: Path, own: str, joint: bool
) -> None:
    """Of one opinion none does; of two, one of them the data's own, those of their mean do."""
    weigh = {"weigh__from": own} | ({"weigh__column": "scores"} if joint else {})
    raw, fitted = (keys(folder, arm, sft={}, **weigh) for arm in ("cw", "cw_calibrated"))
    assert raw["weigh"] != fitted["weigh"]
    assert (raw["sft"] != fitted["sft"]) == joint


def test_evaluation_knows_on_which_split_its_temperatures_are_fitted(folder: Path) -> None:
    """Also of an arm that fits none for itself."""
    before = keys(folder, "weak", prepare__validation_fraction=0.2)
    splits = {"weigh__calibration_split": "labelled", "prepare__validation_fraction": 0.2}
    assert "evaluate" in changed(before, keys(folder, "weak", **splits))


def test_objectives_without_a_reference_skip_its_stage(folder: Path) -> None:
    for loss_type in ("simpo", "orpo"):
        made = keys(folder, align__loss_type=loss_type)
        assert keys(folder).keys() - made.keys() == {"reference"}
    with pytest.raises(ConfigError, match=r"align\.loss_type: 'simppo' is unknown; choose from"):
        keys(folder, align__loss_type="simppo")
    with pytest.raises(ConfigError, match="'hinge' takes no soft labels"):
        keys(folder, "soft", align__loss_type="hinge")


def test_sampling_and_soft_labels_change_the_alignment_alone(folder: Path) -> None:
    arms = ["cw", "proportional", "weak", "soft"]
    cw, proportional, weak, soft = (keys(folder, arm, arms=arms) for arm in arms)
    assert changed(cw, proportional) == ALIGNED
    assert changed(weak, soft) == ALIGNED


def test_how_and_where_work_is_done_changes_no_key(folder: Path) -> None:
    after = keys(
        folder,
        fit__num_workers=2,
        align__zero_stage=3,
        align__max_tokens_per_micro_batch=77,
        align__save_steps=1,
        annotate__num_actors=7,
        reference__cpus_per_actor=0.5,
    )
    assert changed(keys(folder), after) == set()


def test_every_stage_follows_what_it_reads(folder: Path) -> None:
    before = keys(folder)
    assert changed(before, keys(folder, fit__learning_rate=1e-3)) == {
        *("fit", "annotate", "sft", "reference", "weigh", "answers_sft"),
        *ALIGNED,
    }
    assert changed(before, keys(folder, align__beta=0.1)) == ALIGNED
    assert changed(before, keys(folder, seed=1)) == before.keys()


def test_inputs_that_changed_make_another_key(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    source.write_text(json.dumps(row) + "\n")
    prepare = {"sources": [{"path": str(source)}]}
    before = keys(folder, prepare=prepare)
    assert keys(folder, prepare=prepare) == before
    source.write_text(2 * (json.dumps(row) + "\n"))
    assert changed(before, keys(folder, prepare=prepare)) == before.keys()


def model_fields(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields that hold a model, or a list of them, wherever they stand."""
    for name, field in section.model_fields.items():
        for kind in _types(field.annotation):
            if kind is ModelConfig:
                yield f"{prefix}{name}"
            elif isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from model_fields(kind, f"{prefix}{name}.")


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types(part)


MODELS = sorted(set(model_fields(Config)))


def with_model(folder: Path, field: str, model: dict[str, Any]) -> Config:
    """A run of arms of all kinds that reads this model."""
    given: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "arms": ["cw"] if field.startswith("annotate") else ["human", "cw", "ws_dpo"],
        "prepare": {"sources": [{"path": str(folder / "pairs.jsonl")}]},
        "weak": {"model_name_or_path": str(folder / "model")},
        "policy": {"model_name_or_path": str(folder / "model")},
    }
    *above, name = field.split(".")
    section = given
    for part in above:
        section = section.setdefault(part, {})
    section[name] = [model] if name == "models" else model
    return parse_config(given)


def all_keys(config: Config) -> set[str]:
    return {node.key for arm in config.arms for node in graph(config, arm).values()}


def test_the_walk_over_the_configuration_finds_the_fields_that_hold_models() -> None:
    assert MODELS == ["annotate.model", "annotate.models", "evaluate.gold_model", "policy", "weak"]


@pytest.mark.parametrize("field", MODELS)
def test_other_weights_in_a_models_folder_change_a_key(
    field: str, folder: Path, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "model", "llama", 0)
    model = {"model_name_or_path": str(tmp_path / "model")}
    before = all_keys(with_model(folder, field, model))
    assert all_keys(with_model(folder, field, model)) == before
    save_tiny(tmp_path / "model", "llama", 1)  # files of the same names and sizes
    after = all_keys(with_model(folder, field, model))
    assert after != before
    if field == "evaluate.gold_model":
        changed_keys = {node.stage for node in _changed_nodes(folder, field, model, before)}
        assert changed_keys == {"evaluate"}


def _changed_nodes(
    folder: Path, field: str, model: dict[str, Any], before: set[str]
) -> Iterator[Node]:
    config = with_model(folder, field, model)
    for arm in config.arms:
        yield from (node for node in graph(config, arm).values() if node.key not in before)


def test_a_gold_rule_that_was_edited_judges_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = tmp_path / "my_gold_rule.py"
    rule.write_text("def score(prompt, answer):\n    return len(answer)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = keys(folder, evaluate__gold_function="my_gold_rule:score")
    rule.write_text("def score(prompt, answer):\n    return -len(answer)\n")
    after = keys(folder, evaluate__gold_function="my_gold_rule:score")
    assert changed(before, after) == {"evaluate"}


def test_other_weights_under_the_same_tokenizer_make_no_tokens_anew_another_tokenizer_does(
    folder: Path, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "model", "llama", 0)
    policy = {"model_name_or_path": str(tmp_path / "model")}
    before = keys(folder, policy=policy)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    after = keys(folder, policy=policy)
    assert "tokens" not in changed(before, after)
    assert "sft" in changed(before, after)
    for name in ("tokenizer_config.json", "config.json"):  # … which says how many embeddings it has
        before = keys(folder, policy=policy)
        file = tmp_path / "model" / name
        file.write_text(file.read_text() + "\n")
        assert "tokens" in changed(before, keys(folder, policy=policy)), name


def test_a_template_file_counts_by_its_content(folder: Path, tmp_path: Path) -> None:
    made = []
    for name, text in (("one", "{{ messages }}"), ("moved", "{{ messages }}"), ("one", "{{ x }}")):
        template = tmp_path / f"{name}.jinja"
        template.write_text(text)
        model = {"model_name_or_path": str(folder / "model"), "chat_template": str(template)}
        made.append(keys(folder, policy=model, weak=model))
    assert changed(made[0], made[1]) == set()
    assert changed(made[0], made[2]) == made[0].keys() - {"prepare"}


def test_a_retry_of_rejects_changes_the_keys_of_what_reads_the_scores(folder: Path) -> None:
    before = keys(folder)
    output = Store(str(folder / "run")).child("annotate", before["annotate"])
    output.create_json(retry_manifest(1), {})
    assert changed(before, keys(folder)) == {
        *("sft", "reference", "weigh", "answers_sft"),
        *ALIGNED,
    }
    output.remove(retry_manifest(1))
    assert keys(folder) == before


def test_models_sampled_from_have_seeds_of_their_own(folder: Path) -> None:
    roles = ["answers_base", "answers_sft", "answers_aligned"]
    seeds = []
    for seed in (0, 1):
        config = with_model(folder, "policy", {"model_name_or_path": str(folder / "model")})
        made = graph(config.model_copy(update={"seed": seed}), "cw")
        seeds += [made[role].settings.identity()["seed"] for role in roles]
    assert len(set(seeds)) == 6


def test_annotating_alone_needs_no_policy(folder: Path) -> None:
    config = parse_config(
        {
            "output_dir": str(folder / "run"),
            "prepare": {"sources": [{"path": str(folder / "pairs.jsonl")}]},
            "annotate": {"model": {"model_name_or_path": str(folder / "model")}},
        }
    )
    assert list(nodes_until(config, "cw", "annotate")) == ["prepare", "annotate"]
    with pytest.raises(ConfigError, match=r"annotate\.model: given, so there is nothing to fit"):
        nodes_until(config, "cw", "fit")
    with pytest.raises(ConfigError, match=r"policy: arm 'cw' aligns a policy; give policy"):
        nodes_until(config, "cw", None)


@pytest.mark.parametrize("arm", ["human", "cw", "ws_dpo"])
def test_weighing_alone_needs_no_policy_and_makes_the_same(folder: Path, arm: str) -> None:
    config: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "arms": [arm],
        "prepare": {"sources": [{"path": str(folder / "pairs.jsonl")}]},
        "weak": {"model_name_or_path": str(folder / "model")},
    }
    alone = nodes_until(parse_config(config), arm, "weigh")
    policy = {"policy": {"model_name_or_path": str(folder / "model")}}
    with_policy = graph(parse_config(config | policy), arm)
    assert list(alone)[-1] == "weigh"
    assert {role: node.key for role, node in alone.items()}.items() <= {
        role: node.key for role, node in with_policy.items()
    }.items()


def test_a_ready_reward_model_scores_labelled_pairs_too_ours_not_what_it_learned(
    folder: Path,
) -> None:
    config: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "prepare": {"sources": [{"path": str(folder / "pairs.jsonl")}]},
        "weak": {"model_name_or_path": str(folder / "model")},
    }

    def splits(annotate: dict[str, Any]) -> list[str]:
        made = nodes_until(parse_config(config | {"annotate": annotate}), "cw", "annotate")
        return list(made["annotate"].settings.identity()["splits"])

    ready = {"model": {"model_name_or_path": str(folder / "model")}}
    assert splits(ready) == ["labelled", "test", "unlabelled", "validation"]
    assert splits({}) == ["test", "unlabelled", "validation"]
    assert splits({"splits": ["test"]}) == ["test"]


def test_sources_are_listed_and_each_model_marked_once_an_arm(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On object storage each listing is a wait, and two of them could differ."""
    asked: list[str] = []

    def counting(module: Any, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda given: asked.append(name) or real(given))

    counting(arms, "source_fingerprints")
    counting(given_model, "model_fingerprint")
    keys(folder)
    assert sorted(asked) == ["model_fingerprint"] * 2 + ["source_fingerprints"]
