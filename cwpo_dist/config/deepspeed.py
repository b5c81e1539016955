"""A DeepSpeed section or JSON file in; what it says, and what of that decides weights, out.

The shapes are those that people pass round: `auto` wherever a trainer fills a value in, sections
that are switched off, comments. What DeepSpeed itself knows of its fields is asked of it in
`training/deepspeed_settings.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cwpo_dist.config.base import ConfigError
from cwpo_dist.redaction import REMEDY, first_credential

AUTO = "auto"  # left to us
# What other fields of ours decide: an equal value is taken, another one refused.
COMPARED: Mapping[str, str] = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "global_batch_size and max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "global_batch_size and max_tokens_per_micro_batch",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "optim, learning_rate and weight_decay",
    "scheduler": "lr_scheduler_type, learning_rate and warmup_steps",
}
# Of fp16 and bf16. Whether they are enabled must agree with the weights' precision; what scales a
# loss in float16 has no effect, as nothing is computed in float16. People write it under both.
LOSS_SCALING = frozenset(
    {
        "auto_cast",
        "consecutive_hysteresis",
        "fp16_master_weights_and_grads",
        "hysteresis",
        "initial_scale_power",
        "loss_scale",
        "loss_scale_window",
        "min_loss_scale",
    }
)
# What has no effect here, and what decides in its place.
_OWN_LINES = "each step is told, and metrics.jsonl has its numbers"
UNUSED: Mapping[str, str] = {
    "activation_checkpointing": "gradient_checkpointing decides",
    "aio": "nothing is offloaded to NVMe",
    "checkpoint": "save_steps and save_total_limit decide",
    "comet": "report_to decides",
    "csv_monitor": "report_to decides, and metrics.jsonl is always written",
    "dataloader_drop_last": "no pair of an epoch is dropped",
    "dump_state": _OWN_LINES,
    "log_level": _OWN_LINES,
    "memory_breakdown": _OWN_LINES,
    "pipeline": "there are no pipeline stages",
    "seq_parallel_communication_data_type": "states are exchanged in the dtype that they have",
    "steps_per_print": _OWN_LINES,
    "tensorboard": "report_to decides",
    "timers": _OWN_LINES,
    "use_data_before_expert_parallelism": "there is no expert parallelism",
    "vocabulary_size": "the model has it",
    "wall_clock_breakdown": _OWN_LINES,
    "wandb": "report_to decides",
    "zero_allow_untested_optimizer": "torch's own optimizers are tested here",
    "zero_force_ds_cpu_optimizer": "torch's own optimizer also updates what is offloaded",
}
# DeepSpeed's names of what gradients may be summed in.
FLOAT32 = ("fp32", "float32", "float", "torch.float32")
BFLOAT16 = ("bf16", "bfloat16", "torch.bfloat16")
# What would train something else, or in a way that is not built here: the values that are taken,
# which ask for nothing, and why others are not. Dotted names, as deep as they go.
REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "autotuning.enabled": ((False,), "DeepSpeed's launcher tunes, and there is none here"),
    "bf16.bf16_master_weights_and_grads": ((False,), "checkpoints hold float32 masters"),
    "bf16.bf16_optimizer_states": ((False,), "checkpoints hold float32 state"),
    "compile.deepcompile": ((False,), "models are not compiled here"),
    "compile.autoep_non_moe": ((False,), "models are not compiled here"),
    "data_efficiency.enabled": ((False,), "the order of pairs is a function of seed and step"),
    "data_parallel_size": ((), "num_workers decides"),
    "data_types.buffer_dtype": ((None,), "buffers keep the dtype that they are loaded in"),
    "data_types.grad_accum_dtype": (
        (None, *FLOAT32, *BFLOAT16),
        "gradients are summed in float32 (fp32) or bfloat16 (bf16)",
    ),
    "data_types.param_dtype": ((None,), "torch_dtype of the model's section decides"),
    "datastates_ckpt": ((None, False), "save_steps and save_total_limit decide"),
    "expert_parallel.enabled": ((False,), "experts are sharded by ZeRO-3 alone"),
    "gradient_predivide_factor": ((1, 1.0), "gradients are summed in float32, as they are"),
    "prescale_gradients": ((False,), "gradients are summed in float32, as they are"),
    "gradient_allreduce_op": (("mean",), "a sum would grow with the number of workers"),
    "hybrid_engine.enabled": ((False,), "it generates with DeepSpeed's own kernels"),
    "managed_gradient_accumulation": ((True,), "a step's micro-batches are planned by tokens"),
    "sequence_parallel_size": ((1,), "the field of that name beside this section decides"),
    "tensor_parallel.autotp_size": ((0, 1), "models are sharded by ZeRO-3 alone"),
    "weight_quantization": ((None, {}), "weights are trained as they are"),
    "zero_optimization.compute_grad_norm": ((True,), "max_grad_norm clips by the norm"),
    "zero_optimization.legacy_stage1": ((False,), "DeepSpeed no longer has it"),
    "zero_optimization.offload_optimizer.device": (
        ("none", "cpu"),
        "checkpoints read the optimizer's state from memory",
    ),
    "zero_optimization.offload_optimizer.ratio": (
        (1, 1.0),
        "it takes DeepSpeed's own CPU optimizer, and torch's is used",
    ),
    "zero_optimization.offload_optimizer.super_offload": (
        (False,),
        "it takes DeepSpeed's own CPU optimizer, and torch's is used",
    ),
    "zero_optimization.offload_param.device": (
        ("none", "cpu"),
        "checkpoints read the weights from memory",
    ),
    "zero_optimization.zenflow": ((None,), "it updates weights late, and not all of them"),
    "zero_optimization.zero_quantized_gradients": ((False,), "it rounds what is summed"),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), "it rounds weights"),
    "zero_optimization.zero_quantized_weights": ((False,), "it rounds weights"),
}
# Handed on to DeepSpeed and in no key: what is measured on the way.
_MEASURED = {"comms_logger", "disable_python_gc", "flops_profiler"}
# Handed on and in no key: where numbers lie, when they are sent, and in how large pieces. They are
# those of the whole batch whatever is given, but for the order of additions.
_WHERE = {
    "stage",
    "offload_optimizer",
    "offload_param",
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "elastic_checkpoint",
    "enable_sanity_checks",
    "ignore_unused_parameters",
    "leaf_module",
    "load_from_fp32_weights",
    "log_trace_cache_warnings",
    "memory_efficient_linear",
    "override_module_apply",
    "overlap_comm",
    "parameter_alignment",
    "pipeline_loading_checkpoint",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "save_muon_momentum_buffer_in_memory",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
    "zero_hpz_partition_size",
    # Of ZeRO-3; DeepSpeed takes them with `stage3_` before and without.
    "allgather_sequential",
    "gather_16bit_weights_on_model_save",
    "gather_fp16_weights_on_model_save",
    "max_live_parameters",
    "max_reuse_distance",
    "model_persistence_threshold",
    "module_granularity_threshold",
    "param_persistence_threshold",
    "prefetch_bucket_size",
    "use_all_reduce_for_fetch_params",
}


def read_section(given: dict[str, object] | str | None) -> dict[str, object]:
    """The section as it was given, or read from the JSON file that it names; no comments.

    Raises:
        ConfigError: for a file that is missing, no JSON, or has a key twice.
    """
    if not isinstance(given, str):
        return _tidied(given or {})
    try:
        if Path(given).exists() and not Path(given).is_file():
            raise OSError("it is not a regular file")
        text = Path(given).read_text(encoding="utf-8-sig")
        section = json.loads(text, object_pairs_hook=_each_once)
    except (OSError, ValueError, RecursionError) as error:  # of no JSON and no UTF-8 alike
        raise ConfigError(
            f"deepspeed: cannot read {given!r}: {error}; give a DeepSpeed JSON file, or a section"
        ) from None
    if (place := first_credential(section)) is not None:
        raise ConfigError(f"deepspeed: {given!r}: {place}: {REMEDY}")
    if not isinstance(section, dict):
        raise ConfigError(
            f"deepspeed: {given!r} does not hold a JSON object; give a DeepSpeed JSON file"
        )
    return _tidied(section)


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} appears twice; keep one")
    return dict(pairs)


def _tidied(section: Mapping[str, object]) -> dict[str, object]:
    """A section without what people write into it for people, and in DeepSpeed's newer form."""
    kept = {}
    for name, value in section.items():
        if name == "zero_optimization" and isinstance(value, bool):
            value = {"stage": int(value)}
        if not name.startswith(("_", "//", "#")):  # DeepSpeed has no such names
            kept[name] = _tidied(value) if isinstance(value, Mapping) else value
    return kept


def said(section: Mapping[str, object]) -> dict[str, object]:
    """What a section says: no `auto`, and nothing left empty by that."""
    kept = {}
    for name, value in section.items():
        inner = said(value) if isinstance(value, Mapping) else value
        if inner != AUTO and (inner != {} or value == {}):
            kept[name] = inner
    return kept


def is_off(value: object) -> bool:
    """False, null, empty or `enabled: false`: it asks for nothing."""
    if isinstance(value, Mapping):
        return not value or value.get("enabled", True) is False
    return value is None or value is False


def handed_on(section: Mapping[str, object]) -> dict[str, object]:
    """What of a section DeepSpeed is given, once the rest was compared, refused or found unused."""
    ours = {*COMPARED, *UNUSED, "fp16", "bfloat16"}
    dropped = {name for name in REFUSED if "." not in name}
    dropped |= {name.partition(".")[0] for name in REFUSED} - {"zero_optimization", "data_types"}
    kept = {n: v for n, v in section.items() if n not in ours | dropped and not is_off(v)}
    bf16 = {n: v for n, v in bf16_of(section).items() if n not in LOSS_SCALING | {"enabled"}}
    return kept | ({"bf16": bf16} if bf16 else {})


def inside(section: Mapping[str, object], name: str) -> Mapping[str, object]:
    """A section in a section; empty where there is none."""
    found = section.get(name)
    return found if isinstance(found, Mapping) else {}


def zero_stage(section: Mapping[str, object], unsaid: int = 0) -> int:
    """The ZeRO stage that a section, or a merged configuration, asks for; `unsaid` without one."""
    stage = inside(section, "zero_optimization").get("stage", unsaid)
    assert isinstance(stage, int | float | str)  # DeepSpeed refuses others
    return int(stage)


def bf16_of(section: Mapping[str, object]) -> Mapping[str, object]:
    """The section of bfloat16, by its name or by its old one."""
    return inside(section, "bf16" if "bf16" in section else "bfloat16")


def decides_weights(section: Mapping[str, object]) -> dict[str, object]:
    """What of a section changes the numbers that are computed, and so belongs into a key.

    All that is handed on does, but what is known to say only how or where: a field that is not in
    the lists costs a training that was not needed, never a wrong model.
    """
    kept = {n: v for n, v in handed_on(said(section)).items() if n not in _MEASURED}
    zero = kept.pop("zero_optimization", {})
    if isinstance(zero, Mapping):
        known = _WHERE | {name.split(".")[1] for name in REFUSED if name.startswith("zero_")}
        rest = {n: v for n, v in zero.items() if n.removeprefix("stage3_") not in known}
        kept |= {"zero_optimization": rest} if rest else {}
    return kept
