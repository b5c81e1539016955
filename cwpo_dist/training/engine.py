"""A module and a config in, a DeepSpeed engine out: ZeRO-0 to -3, on CUDA or on CPU with gloo.

The only file that imports deepspeed. What differs from its examples, and why:
- a step's micro-batches are planned by tokens, so their number varies: accumulation is steered by
  `set_gradient_accumulation_boundary`, and DeepSpeed's own scaling by a fixed number is off;
- the optimizer is torch's: DeepSpeed's own would be compiled first, for minutes;
- on CPU the `shm_comm` extension (150 s of g++) is left out, and gloo does all communication.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from cwpo_dist.config import ConfigError, TrainingConfig
from cwpo_dist.config.training import BUCKET_NUMBERS
from cwpo_dist.lm.modules import accumulate_in_place
from cwpo_dist.lm.rows import RowBatch
from cwpo_dist.training.loop import fresh_state
from cwpo_dist.training.optim import STATE_KEYS, make_optimizer, set_learning_rate
from cwpo_dist.training.shards import Share

logger = logging.getLogger(__name__)

# What a user's DeepSpeed section may not set, and what sets it here.
OURS = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "global_batch_size and max_tokens_per_micro_batch",
    "optimizer": "optim, learning_rate and weight_decay",
    "scheduler": "lr_scheduler_type and warmup_steps",
    "bf16": "torch_dtype of the model's section",
    "fp16": "torch_dtype of the model's section (bfloat16 or float32)",
    "gradient_clipping": "max_grad_norm",
}
_SAYS_NOTHING = {"enabled": False}  # of fp16 and bf16: what a JSON with both often has


def deepspeed_config(config: TrainingConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed configuration: ours, with the user's section (or HF JSON) merged over it.

    Args:
        config: `zero_stage`, `max_grad_norm`, and `deepspeed`, a section or a JSON file whose
            `auto`s are left to us.
        dtype: of the model's weights.

    Raises:
        ConfigError: when the section sets what other fields of ours set, or has keys or values
            under `zero_optimization` that DeepSpeed does not know.
    """
    half = dtype == torch.bfloat16
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # for its counters alone
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "steps_per_print": 10**9,
        "bf16": {"enabled": half},
        "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": BUCKET_NUMBERS},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if half:  # gradients of many micro-batches are summed in fp32
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    merged = _merged(ours, _users_section(config.deepspeed_section()))
    _refuse_unknown(merged["zero_optimization"])
    if (merged["zero_optimization"].get("offload_optimizer") or {}).get("device") == "nvme":
        raise ConfigError(
            "deepspeed.zero_optimization.offload_optimizer.device: 'nvme' is not supported, as "
            "checkpoints read the optimizer's state from memory; give 'cpu', or more workers"
        )
    if half and merged["zero_optimization"]["stage"] == 0:
        logger.warning("zero_stage 0 cannot sum bfloat16 gradients in float32: stage 1 is used")
        merged["zero_optimization"]["stage"] = 1
    return merged


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage that a merged configuration asks for."""
    return int(ds_config["zero_optimization"]["stage"])


def frozen_config(config: TrainingConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The same for a model that is only applied, under ZeRO-3."""
    settings = deepspeed_config(config, dtype)
    zero = {k: v for k, v in settings["zero_optimization"].items() if k != "offload_optimizer"}
    return settings | {"zero_optimization": zero | {"stage": 3}}


def wrap_frozen(module: nn.Module, ds_config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around a module that `sharded_loading` loaded; no optimizer."""
    join_process_group()
    engine, *_ = deepspeed.initialize(model=module, config=ds_config)
    engine.eval()
    return engine


@contextmanager
def sharded_loading(ds_config: dict[str, Any]) -> Iterator[None]:
    """Within it, under ZeRO-3, `from_pretrained` hands each rank its shard and no more.

    transformers keeps a weak reference to the object made here: it must outlive the loading.
    """
    join_process_group()  # else `from_pretrained` would have DeepSpeed do it, and compile
    if zero_stage(ds_config) < 3:
        yield
        return
    alive = HfDeepSpeedConfig(ds_config)
    try:
        yield
    finally:
        del alive
        unset_hf_deepspeed_config()


def join_process_group() -> None:
    """Lets DeepSpeed use the process group that is already there.

    Without CUDA, DeepSpeed would compile `shm_comm`, a faster all-reduce within one machine. An
    empty table of what can be compiled leaves pure gloo, which all else falls back to anyway.
    """
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that this torch calls deprecated, in every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(dist.get_backend(), verbose=False)


class DeepSpeedEngine:
    """An `Engine` (see loop.py) of all ranks of the process group."""

    def __init__(self, module: nn.Module, config: TrainingConfig, ds_config: dict[str, Any]):
        """Wraps a module; its parameters must already require gradients or not, for good.

        Args:
            module: on the CPU, or sharded by `sharded_loading`.
            config: the optimizer's settings.
            ds_config: from `deepspeed_config`.
        """
        join_process_group()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.stage = zero_stage(ds_config)
        self.replicated = self.stage == 0
        self.state_keys = STATE_KEYS[config.optim]
        self._max_grad_norm = config.max_grad_norm
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=make_optimizer(module, config), config=ds_config
        )
        if self.stage == 0:
            # Gradients are exchanged in `step`, in buckets of our size: DeepSpeed's own, of 2 GB,
            # would copy all of them at once.
            self._engine.enable_backward_allreduce = False
            accumulate_in_place(module)
        self.module = module
        self.device = torch.device(self._engine.device)
        self._make_states()

    @property
    def sharded(self) -> bool:
        """True where a parameter's data is empty unless gathered (ZeRO-3)."""
        return self.stage == 3

    def forward(self, batch: RowBatch) -> Tensor:
        """Outputs [P, K]."""
        output_PK: Tensor = self._engine(batch)
        return output_PK

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the loss's gradient, averaged over ranks; a collective under ZeRO-2 and -3."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clips, updates, forgets gradients; returns the gradient norm before clipping."""
        set_learning_rate(self._engine.optimizer, learning_rate)
        if self.stage > 0:
            self._engine.step()
            return float(self._engine.get_global_grad_norm())
        if self.world_size > 1:
            self._engine.allreduce_gradients(bucket_size=BUCKET_NUMBERS)
        # Plain fp32 stage 0 reports no norm.
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        self._engine.step()
        return norm

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over ranks of a small float64 tensor on the CPU."""
        shared = numbers.to(self.device)
        dist.all_reduce(shared)
        return shared.cpu()

    def shares(self, key: str | None) -> Iterator[Share]:
        """What this rank keeps of each trainable fp32 parameter (key None) or of its state."""
        for name, parameter in self.module.named_parameters():
            share = self._share(parameter, key) if parameter.requires_grad else None
            if share is not None:
                start, values = share
                yield Share(name, start, values.detach())

    def publish(self) -> None:
        """Copies fp32 masters, written to through `shares`, into the weights computed with."""
        outer = self._engine.optimizer
        if self.stage in (1, 2):
            outer.update_lp_params()
        elif self.stage == 3:
            whole = outer.persistent_parameters  # small ones, kept gathered
            if whole:
                whole[0].partition(whole)
            for group in range(len(outer.fp32_partitioned_groups_flat)):
                outer._reassign_or_swap_out_partitioned_parameters(group)
            if whole:
                whole[0].all_gather(whole)

    def start_at(self, step: int) -> None:
        """Tells the optimizer that its state has seen `step` updates."""
        for flat in self._optimized_tensors():
            state = self._states[flat]
            if state:
                state["step"].fill_(step)

    def gathered(self, parameters: list[nn.Parameter]) -> Any:
        """A context in which the data of these parameters is whole on every rank."""
        return deepspeed.zero.GatheredParameters(parameters, enabled=self.sharded)

    def close(self) -> None:
        """Removes DeepSpeed's hooks from the module."""
        self._engine.destroy()

    def _make_states(self) -> None:
        """Optimizer state of zeros, before any update.

        A checkpoint can only be loaded into state that is there. And left alone, DeepSpeed links
        parameters to their state after the update of the first parameter group (stages 1 and 2),
        when that of the second does not exist yet.
        """
        for flat in self._optimized_tensors():
            self._states[flat] = fresh_state(flat, self.state_keys)
        if self.stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _states(self) -> Any:
        """State by tensor, of torch's optimizer inside DeepSpeed's."""
        outer = self._engine.optimizer
        return outer.state if self.stage == 0 else outer.optimizer.state

    def _optimized_tensors(self) -> list[Tensor]:
        """What torch's optimizer updates: parameters, or this rank's flat shards of them."""
        outer = self._engine.optimizer
        if self.stage == 3:
            return list(outer.fp32_partitioned_groups_flat)
        groups = outer.param_groups if self.stage == 0 else outer.optimizer.param_groups
        return [tensor for group in groups for tensor in group["params"]]

    def _share(self, parameter: Any, key: str | None) -> tuple[int, Tensor] | None:
        """Where this rank's stretch of a parameter starts, and its values; None where it has none.

        DeepSpeed's own accessors copy, gather, or forget that the last shard is padded.
        """
        if self.stage == 0:
            whole: Tensor = parameter.detach() if key is None else self._states[parameter][key]
            return 0, whole.view(-1)
        if self.stage < 3:
            fragment = parameter._hp_mapping
            if fragment is None:
                return None
            return fragment.lp_fragment_address.start, fragment.get_hp_fragment(key)
        shard, _ = self._engine.optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=key
        )
        start = self.rank * shard.numel()
        left = parameter.ds_numel - start
        return (start, shard[:left]) if left > 0 else None


def _users_section(section: dict[str, Any]) -> dict[str, Any]:
    """The user's section without `auto`s, and without what it says in vain."""
    concrete = _without_autos(section)
    concrete = {k: v for k, v in concrete.items() if k not in OURS or v != _SAYS_NOTHING}
    for name in ("optimizer", "scheduler"):
        if set(concrete.get(name, {})) == {"type"}:
            logger.warning(
                "deepspeed.%s: %s is not used, %s decide", name, concrete.pop(name), OURS[name]
            )
    for name, field in OURS.items():
        if name in concrete:
            raise ConfigError(
                f"deepspeed.{name}: {concrete[name]!r} is not ours to take; set {field}, and "
                f"remove it here (or write 'auto')"
            )
    return concrete


def _refuse_unknown(zero: Any) -> None:
    """DeepSpeed says the same, once every worker has loaded its model."""
    try:
        DeepSpeedZeroConfig.model_validate(zero)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(map(str, ("deepspeed", "zero_optimization", *fault["loc"])))
        raise ConfigError(
            f"{field}: {fault['input']!r}: DeepSpeed says: {fault['msg']}; correct or remove it"
        ) from None


def _without_autos(section: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in section.items():
        inner = _without_autos(value) if isinstance(value, dict) else value
        if inner != "auto" and (inner != {} or value == {}):
            kept[name] = inner
    return kept


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for name, value in theirs.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both else value
    return merged
