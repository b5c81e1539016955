"""DeepSpeed files as people pass them round: taken, or refused before anything starts; and keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cwpo_dist.config import AlignConfig, ConfigError
from cwpo_dist.training.deepspeed_settings import deepspeed_config, frozen_config, unused

# In the shapes of the documentation of transformers and of its derivatives.
AUTOS: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
SCALING = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2}
ZERO3 = {
    "stage": 3,
    "overlap_comm": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_gather_16bit_weights_on_model_save": True,
}
OFFLOAD = {"device": "cpu", "pin_memory": True}
FILES: dict[str, dict[str, Any]] = {
    "half of both": AUTOS
    | {"fp16": {"enabled": "auto", "auto_cast": False} | SCALING, "bf16": {"enabled": "auto"}}
    | {"zero_optimization": ZERO3, "zero_allow_untested_optimizer": True},
    "trainer's optimizer": AUTOS
    | {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}},
        "zero_optimization": ZERO3 | {"offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
        "zero_force_ds_cpu_optimizer": True,
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    },
    "scaling under the wrong name": {"bf16": {"enabled": "auto"} | SCALING},
    "what DeepSpeed has no more, off": {
        "amp": {"enabled": "auto", "opt_level": "auto"},
        "elasticity": {"enabled": False},
        "sparse_gradients": False,
    },
    "as in old examples": {
        "zero_optimization": {"stage": 2, "cpu_offload": True},
        "activation_checkpointing": {"partition_activations": True},
        "aio": {"block_size": 1048576, "thread_count": 1},
    },
    "comments": {"_comment": "why", "zero_optimization": {"//": "how", "stage": 1}},
    "no ZeRO": {"zero_optimization": False},
    "said twice": {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 1,
        "optimizer": {
            "type": "Adam",
            "params": {"lr": 5e-6, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.05},
        },
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100, "warmup_min_lr": 0}},
    },
    "watching": {"flops_profiler": {"enabled": True, "profile_step": 2, "output_file": None}},
}


def taken(section: dict[str, Any] | str, dtype: torch.dtype, **changes: Any) -> dict[str, Any]:
    return deepspeed_config(AlignConfig(deepspeed=section, **changes), dtype)


def refusal(section: dict[str, Any] | str, dtype: torch.dtype, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        taken(section, dtype, **changes)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_as_people_have_them_are_taken(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(FILES[name]))
    merged = taken(str(file), dtype)
    assert merged["bf16"] == {"enabled": dtype == torch.bfloat16}
    assert merged["gradient_clipping"] == 1.0
    assert not {"fp16", "optimizer", "scheduler", "train_batch_size", "amp"} & merged.keys()
    assert "deepspeed" not in AlignConfig(deepspeed=str(file)).identity(), "no number is another"


def test_what_stands_there_reaches_deepspeed() -> None:
    merged = taken(FILES["trainer's optimizer"], torch.float32, zero_stage=0)
    zero = merged["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["offload_param"]) == (3, True, OFFLOAD)
    assert zero["reduce_bucket_size"] == 2**24
    assert merged["zero_force_ds_cpu_optimizer"] is False
    assert taken({"zero_optimization": True}, torch.float32)["zero_optimization"]["stage"] == 1


def test_what_is_not_used_is_said() -> None:
    def said(name: str, dtype: torch.dtype = torch.float32) -> str:
        return unused(AlignConfig(deepspeed=FILES[name]), dtype)

    assert said("comments") == ""
    assert said("half of both") == (
        "zero_allow_untested_optimizer (torch's own optimizers are tested here); fp16.auto_cast, "
        "fp16.hysteresis, fp16.initial_scale_power, fp16.loss_scale, fp16.loss_scale_window "
        "(nothing is float16 here)"
    )
    assert "scheduler.type 'WarmupDecayLR' (lr_scheduler_type decides, 'cosine')" in said(
        "trainer's optimizer"
    )
    off = AlignConfig(deepspeed={"bf16": {"enabled": False}})
    assert unused(off, torch.float32) == ""
    assert unused(off, torch.bfloat16) == "bf16.enabled False (torch_dtype decides, bfloat16)"


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"fp16": {"enabled": True} | SCALING}, "fp16.enabled: True, but the weights will be"),
        ({"bf16": {"enabled": True}}, "bf16.enabled: True, but the weights will be float32"),
        ({"bf16": True}, "bf16: True; give a section"),
        ({"gradient_clipping": 0.5}, "gradient_clipping: 0.5, but max_grad_norm is 1.0"),
        ({"train_batch_size": 32}, "train_batch_size: 32, but global_batch_size is 64"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu: 4, accumulated 1"),
        ({"train_micro_batch_size_per_gpu": 48} | AUTOS, None),
        ({"train_batch_size": "64"}, "train_batch_size: '64'; give a whole number"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            "optimizer.params.lr: 0.001, but learning_rate is 5e-06",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.99]}}},
            "optimizer.params.betas: [0.8, 0.99], but it is [0.9, 0.999] here",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"weigth_decay": "auto"}}},
            "optimizer.params.weigth_decay: 'auto': there is no such parameter",
        ),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type: 'Lion', but optim is 'adamw'"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type: 'OneCycle', but lr_scheduler_type"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}},
            "scheduler.params.warmup_num_steps: 5, but warmup_steps is 100",
        ),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation: {'stage': 3}: DeepSpeed has"),
        ({"train_batch_sze": "auto"}, "(but train_batch_size)"),
        (
            {"zero_optimization": {"stage3_param_persitance_threshold": 1}},
            "(but stage3_param_persistence_threshold)",
        ),
        (
            {"zero_optimization": {"stage3_max_live_parameter": "auto"}},
            "(but stage3_max_live_parameters)",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu", "pin_memry": True}}},
            "zero_optimization.offload_param.pin_memry: True: DeepSpeed has no such field",
        ),
        ({"fp16": {"enabled": False, "los_scale": 0}}, "fp16.los_scale: 0: DeepSpeed has no"),
        ({"flops_profiler": {"modul_depth": 1}}, "flops_profiler.modul_depth: 1: DeepSpeed has"),
        ({"wandb": {"enabled": False, "projct": "x"}}, "wandb.projct: 'x': DeepSpeed has no"),
        ({"checkpoint": {"parallel_write": {"stage": 1}}}, "checkpoint.parallel_write.stage: 1: "),
        ({"elasticity": {"enabled": True}}, "elasticity: {'enabled': True}: DeepSpeed says: Elas"),
        ({"amp": {"enabled": True}}, "amp: {'enabled': True}: DeepSpeed says: "),
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage: 5: DeepSpeed says: "),
        ({"zero_optimization": 3}, "zero_optimization: 3: DeepSpeed says: "),
        ({"communication_data_type": "bf17"}, "communication_data_type: 'bf17': DeepSpeed says: "),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
            "offload_optimizer.device: 'nvme' is not supported: checkpoints read",
        ),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: 'sum' is not supported"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size: 2 is not supp"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size: 2 is not supported"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile: True is not supported"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(section: dict[str, Any], field: str | None) -> None:
    if field is None:
        section = {"train_micro_batch_size_per_gpu": 48, "gradient_accumulation_steps": "auto"}
        field = "train_micro_batch_size_per_gpu: 48, accumulated auto times"
    (line,) = refusal(section, torch.float32)
    assert line.startswith("deepspeed.")
    assert field in line
    assert any(remedy in line for remedy in ("correct", "remove", "write 'auto'", "; give"))


def test_bfloat16_that_agrees_is_taken_and_every_fault_is_told_at_once() -> None:
    assert taken({"bf16": {"enabled": True} | SCALING}, torch.bfloat16)["bf16"] == {"enabled": True}
    assert len(refusal({"gradient_clipping": 2, "ampp": 1, "fp16": 3}, torch.float32)) == 3


def test_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    for text, fault in (
        ('{"zero_optimization": {"stage": 2}, "zero_optimization": {}}', "appears twice; keep one"),
        ("zero_stage: 3", "Expecting value"),
        ("[1]", "does not hold a JSON object"),
    ):
        file.write_text(text)
        (line,) = refusal(str(file), torch.float32)
        assert line.startswith("deepspeed: ")
        assert fault in line


def test_the_key_knows_what_changes_weights_and_nothing_else() -> None:
    plain = AlignConfig().identity()

    def added(section: dict[str, Any]) -> Any:
        identity = AlignConfig(deepspeed=section).identity()
        assert identity | plain == identity
        return identity.get("deepspeed")

    assert added({"communication_data_type": "bf16"}) == {"communication_data_type": "bf16"}
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    assert added(autocast | {"zero_optimization": ZERO3}) == autocast
    assert added({"torch_autocast": {"enabled": False}}) is None
    assert added({"data_types": {"grad_accum_dtype": "bf16"}}) is not None
    assert added({"bf16": {"enabled": "auto", "immediate_grad_update": True} | SCALING}) == {
        "bf16": {"immediate_grad_update": True}
    }
    to_come = {"zero_optimization": {"stage": 1, "a_field_to_come": 1}, "section_to_come": {"x": 1}}
    assert added(to_come) == {
        "zero_optimization": {"a_field_to_come": 1},
        "section_to_come": {"x": 1},
    }


def test_a_frozen_models_numbers_are_those_of_one_that_is_not_sharded() -> None:
    section = {"communication_data_type": "bf16", "zero_optimization": {"offload_param": OFFLOAD}}
    frozen = frozen_config(AlignConfig(deepspeed=section), torch.float32)
    assert "communication_data_type" not in frozen
    assert frozen["zero_optimization"]["stage"] == 3
    assert frozen["zero_optimization"]["offload_param"] == OFFLOAD
