"""A module and a config in, a DeepSpeed engine out: ZeRO-0 to -3, on CUDA or on CPU with gloo.

What differs from its examples, and why:
- a step's micro-batches are planned by tokens, so their number varies: accumulation is steered by
  `set_gradient_accumulation_boundary`, and DeepSpeed's own scaling by a fixed number is off;
- the optimizer is torch's: DeepSpeed's own would be compiled first, for minutes;
- on CPU the `shm_comm` extension (150 s of g++) is left out, and gloo does all communication.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from cwpo_dist.config import TrainingConfig
from cwpo_dist.config.deepspeed import zero_stage
from cwpo_dist.config.training import BUCKET_NUMBERS
from cwpo_dist.lm.modules import accumulate_in_place
from cwpo_dist.lm.rows import RowBatch
from cwpo_dist.lm.sequence import SequenceGroup
from cwpo_dist.training.deepspeed_settings import deepspeed_config, frozen_config
from cwpo_dist.training.optim import STATE_KEYS, fresh_state, make_optimizer, set_learning_rate
from cwpo_dist.training.shards import Share

__all__ = [
    "DeepSpeedEngine",
    "deepspeed_config",
    "frozen_config",
    "join_process_group",
    "sharded_loading",
    "wrap_frozen",
    "zero_stage",
]


def wrap_frozen(module: nn.Module, ds_config: dict[str, object]) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine around a module that `sharded_loading` loaded; no optimizer."""
    join_process_group()
    engine, *_ = deepspeed.initialize(model=module, config=ds_config)
    engine.eval()
    return engine


@contextmanager
def sharded_loading(ds_config: dict[str, object]) -> Iterator[None]:
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
    # DeepSpeed calls collectives by names that this torch calls deprecated, in every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(dist.get_backend(), verbose=False)


class DeepSpeedEngine:
    """An `Engine` (see loop.py) of all ranks of the process group."""

    def __init__(self, module: nn.Module, config: TrainingConfig, ds_config: dict[str, object]):
        """Wraps a module; its parameters must already require gradients or not, for good.

        Args:
            module: on the CPU, or sharded by `sharded_loading`.
            config: the optimizer's settings.
            ds_config: from `deepspeed_config`.
        """
        join_process_group()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        timeout = timedelta(seconds=config.step_timeout_s + 60)
        self.sequence = SequenceGroup.joined(config.sequence_parallel_size, timeout)
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
        """One number an answer [A]."""
        output_A: Tensor = self._engine(batch)
        return output_A

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
        """The sum over ranks of a small float64 tensor, on the CPU."""
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

    def gathered(self, parameters: list[nn.Parameter]) -> deepspeed.zero.GatheredParameters:
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
    def _states(self) -> dict[Tensor, dict[str, Tensor]]:
        """State by tensor, of torch's optimizer inside DeepSpeed's."""
        outer = self._engine.optimizer
        inner: torch.optim.Optimizer = outer if self.stage == 0 else outer.optimizer
        return inner.state

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
