"""Configurations: what is refused and how it is said; overrides, layers, batch arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cwpo_dist.config import ARMS, Config, ConfigError, PrepareConfig
from cwpo_dist.config.load import load_config, parse_config, to_yaml

SMALL: dict[str, Any] = {"output_dir": "runs/x", "prepare": {"sources": [{"path": "pairs.jsonl"}]}}


def written(folder: Path, data: Any, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def fault(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({**SMALL, **changes})
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"output_dri": "x"}, ["output_dri", "unknown key", "did you mean 'output_dir'?"]),
        ({"align": {"betta": 1}}, ["align.betta", "unknown key; did you mean 'beta'?"]),
        ({"align": {"zzz": 1}}, ["align.zzz", "remove it or check its spelling"]),
        ({"prepare": {}}, ["prepare.sources", "missing", "add it to the config"]),
        ({"prepare": {"sources": []}}, ["prepare.sources: []; give 1 or more entries"]),
        ({"prepare": {"sources": [{}]}}, ["prepare.sources.0.path", "missing"]),
        (
            {"prepare": {**SMALL["prepare"], "labelled_fraction": 1.5}},
            ["prepare.labelled_fraction: 1.5; give at most 1"],
        ),
        ({"align": {"beta": 0}}, ["align.beta: 0; give a number above 0"]),
        ({"weigh": {"top_fraction": 0}}, ["weigh.top_fraction: 0; give a number above 0"]),
        ({"seed": -1}, ["seed: -1; give 0 or more"]),
        ({"fit": {"seeds": [0, -1]}}, ["fit.seeds.1: -1; give 0 or more"]),
        ({"compare": {"seeds": [2**32]}}, ["compare.seeds.0: 4294967296; give "]),
        (
            {"align": {"label_smoothing": 0.5}},
            ["align.label_smoothing: 0.5; give a number below"],
        ),
        ({"sft": {"lora": {"lora_dropout": 1}}}, ["sft.lora.lora_dropout: 1; give a number below"]),
        (
            {"sft": {"step_timeout_s": 1e10}},
            ["sft.step_timeout_s: 10000000000.0; give at most 1e+09"],
        ),
        ({"fit": {"zero_stage": 4}}, ["fit.zero_stage: 4; give 0, 1, 2 or 3"]),
        ({"weak": {}}, ["weak.model_name_or_path", "missing"]),
        (
            {"policy": {"model_name_or_path": "x", "max_length": 0}},
            ["policy.max_length: 0; give a number above 0"],
        ),
        ({"arms": []}, ["arms: []; give 1 or more entries"]),
        ({"arms": ["cw", "best"]}, ["'best' is unknown", "choose from", "cw_mean", "human100"]),
        ({"sft": {"learning_rate": "fast"}}, ['sft.learning_rate: "fast"; give a number']),
        ({"seed": "one"}, ['seed: "one"; give a whole number']),
        ({"seed": None}, ["seed: null; give a whole number"]),
        ({"output_dir": 5}, ["output_dir: 5; give text, in quotes"]),
        ({"simulated_labels": "maybe"}, ['simulated_labels: "maybe"; give true or false']),
        ({"arms": "cw"}, ['arms: "cw"; give a list: [cw]']),
        ({"fit": None}, ["fit: null; give a section", "or leave it out"]),
        ({"policy": "gpt2"}, ['policy: "gpt2"; give policy.model_name_or_path: gpt2']),
        ({"annotate": {"labels": [1]}}, ["annotate.labels: [1]; give `key: value` lines below"]),
        ({"weigh": {"temperature": "x"}}, ["weigh.temperature: \"x\"; give a number, or 'fitted'"]),
        (
            {"annotate": {"pools": [{"num_actors": "x"}]}},
            ['annotate.pools.0.num_actors: "x"; give a whole number, or a list of two'],
        ),
        (
            {"annotate": {"pools": [{"num_actors": [3, 1]}]}},
            ["annotate.pools.0.num_actors: [min, max] is (3, 1); min is above max"],
        ),
    ],
)
def test_a_bad_value_is_refused_with_field_value_and_remedy(
    changes: dict[str, Any], parts: list[str]
) -> None:
    message = fault(**changes)
    for part in parts:
        assert part in message
    assert "\n" not in message
    assert "Input should" not in message


def test_every_fault_has_its_line() -> None:
    lines = fault(align={"beta": -1}, fit={"zero_stage": 9}, sead=1).splitlines()
    assert [line.split(":")[0] for line in lines] == ["fit.zero_stage", "align.beta", "sead"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("output_dir: [1", "is not valid YAML"),
        ("- a\n- b\n", "must hold a mapping of sections"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        load_config(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_overrides_are_yaml_and_go_from_left_to_right(tmp_path: Path) -> None:
    overrides = [
        "arms=[human, cw]",
        "align.beta=0.1",
        "align.beta=0.2",
        "fit.learning_rate=1e-4",
        "prepare.sources.0.split=test",
        "sft=none",
        "policy.model_name_or_path=gpt2",
        "weigh.top_fraction=",
    ]
    config = load_config(written(tmp_path, SMALL), overrides)
    assert config.arms == ["human", "cw"]
    assert config.align.beta == 0.2
    assert config.fit.learning_rate == 1e-4
    assert config.prepare.sources[0].split == "test"
    assert config.sft is None
    assert config.policy is not None
    assert config.policy.model_name_or_path == "gpt2"
    assert config.weigh.top_fraction is None


def test_a_further_file_is_laid_over_section_by_section(tmp_path: Path) -> None:
    base = written(tmp_path, {**SMALL, "align": {"beta": 0.3, "num_train_epochs": 2}})
    over = written(tmp_path, {"align": {"beta": 0.4}, "arms": ["weak"]}, "over.yaml")
    config = load_config(base, ["align.beta=0.5", str(over)])
    assert (config.align.beta, config.align.num_train_epochs) == (0.4, 2)
    assert config.arms == ["weak"]
    assert config.prepare.sources[0].path == "pairs.jsonl"


def test_pools_laid_over_a_recipe_replace_its_one_pool(tmp_path: Path) -> None:
    recipe = {"num_actors": 4, "gpus_per_actor": 1, "max_tokens_per_batch": 32768}
    base = written(tmp_path, {**SMALL, "annotate": recipe})
    pools = [{"num_actors": 2, "cpus_per_actor": 3}, {"gpus_per_actor": 0.5}]
    over = written(tmp_path, {"annotate": {"pools": pools}}, "over.yaml")
    for override in (str(over), f"annotate.pools={json.dumps(pools)}"):
        annotate = load_config(base, [override]).annotate
        assert [pool.gpus_per_actor for pool in annotate.actor_pools()] == [0.0, 0.5]
        assert annotate.max_tokens_per_batch == 32768
    assert load_config(base, ["annotate.pools=[]"]).annotate.num_actors == 4
    with pytest.raises(ConfigError, match=r"given beside num_actors; .*pools: \[\]"):
        load_config(base, [str(over), "annotate.num_actors=8"])


def test_a_configuration_written_whole_is_read_back_the_same(tmp_path: Path) -> None:
    config = parse_config({**SMALL, "align": {"num_workers": [1, 4]}, "compare": {}, "sft": "none"})
    text = to_yaml(config)
    assert load_config(written(tmp_path, text)) == config
    assert "\nseed: 0\n" in text  # defaults too


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("seed", "write key.sub=value"),
        ("fit.learning_rate=[1", "fit.learning_rate=.* is not valid YAML"),
        (
            "prepare.sources.7.split=test",
            r"'prepare\.sources\.7\.split=test': there is no",
        ),
        ("output_dir.deeper.still=1", r"'output_dir\.deeper\.still=1': there is no such place"),
        ("align.gamma=1", r"align\.gamma: unknown key"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        load_config(written(tmp_path, SMALL), [override])


@given(per_device=st.integers(1, 64), accumulation=st.integers(1, 16), workers=st.integers(1, 16))
def test_trl_batch_names_give_one_global_batch(
    per_device: int, accumulation: int, workers: int
) -> None:
    section = {
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "num_workers": workers,
    }
    config = parse_config({**SMALL, "align": section})
    assert config.align.global_batch_size == per_device * accumulation * workers


def test_two_ways_to_say_the_batch_must_agree() -> None:
    section = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_workers": 3}
    message = fault(align={**section, "global_batch_size": 32})
    assert "global_batch_size is 32" in message
    assert "= 24: give one of the two" in message
    agreeing = parse_config({**SMALL, "align": {**section, "global_batch_size": 24}})
    assert agreeing.align.global_batch_size == 24


def test_a_resolved_config_reads_back_the_same() -> None:
    section = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    config = parse_config(
        {**SMALL, "align": section, "sft": "none", "weak": {"model_name_or_path": "x"}}
    )
    again = parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert again == config


def test_what_only_says_where_work_is_done_stays_out_of_keys() -> None:
    one, two = (
        parse_config({**SMALL, "align": {"num_workers": workers, "zero_stage": workers}})
        for workers in (1, 2)
    )
    assert one.align.identity() == two.align.identity()
    other = parse_config({**SMALL, "align": {"beta": 0.4}})
    assert other.align.identity() != one.align.identity()


def test_a_config_cannot_change() -> None:
    config = parse_config(SMALL)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 2  # type: ignore[misc]  # that this is an error is the point


def test_only_human_arms_read_the_labels_of_unlabelled_rows() -> None:
    for name, arm in ARMS.items():
        reads = arm.labels == "human" and "unlabelled" in arm.splits
        assert reads == (name.startswith("human") and arm.judged is None)


def test_defaults_are_complete() -> None:
    config = parse_config(SMALL)
    assert isinstance(config, Config)
    assert config.arms == ["cw"]
    assert config.sft is not None


def test_who_brings_a_test_part_draws_none_unless_told() -> None:
    plain, test = {"path": "a"}, {"path": "b", "into": "test"}
    assert PrepareConfig(sources=[plain]).test_fraction == 0.1
    assert PrepareConfig(sources=[plain, test | {"into": "validation"}]).test_fraction == 0.1
    made = PrepareConfig(sources=[plain, test])
    assert made.test_fraction == 0.0
    assert PrepareConfig.model_validate(made.model_dump()) == made
    assert PrepareConfig(sources=[*made.sources]).test_fraction == 0.0
    assert PrepareConfig(sources=[plain, test], test_fraction=0.1).test_fraction == 0.1


def test_accumulation_alone_says_nothing_about_the_batch() -> None:
    data = {"output_dir": "x", "prepare": {"sources": [{"path": "a"}]}}
    with pytest.raises(ConfigError, match="without per_device_train_batch_size: give both"):
        parse_config(data | {"align": {"gradient_accumulation_steps": 8}})


def test_workers_are_so_many_or_from_few_to_many() -> None:
    config = parse_config({**SMALL, "align": {"num_workers": [2, 8]}})
    assert (config.align.min_workers, config.align.max_workers) == (2, 8)
    with pytest.raises(ConfigError, match=r"\[min, max\], min first"):
        parse_config({**SMALL, "align": {"num_workers": [8, 2]}})
    with pytest.raises(ConfigError, match="give global_batch_size instead"):
        parse_config({**SMALL, "align": {"num_workers": [1, 2], "per_device_train_batch_size": 4}})


def test_workers_that_share_sequences_are_whole_groups_of_them() -> None:
    shared = {"sequence_parallel_size": 2}
    config = parse_config({**SMALL, "align": {"num_workers": 4, **shared}})
    assert config.align.identity() == parse_config({**SMALL}).align.identity(), "the same result"
    for workers in (1, 3, [2, 4]):
        with pytest.raises(ConfigError, match=r"align.*num_workers: .* is a multiple of 2"):
            parse_config({**SMALL, "align": {"num_workers": workers, **shared}})


def test_a_section_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: x\nannotate: {num_actors: 2}\nannotate: {num_actors: 3}\n")
    with pytest.raises(ConfigError, match="annotate appears twice, in lines 2 and 3"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path)
