"""A module and a config in, the optimizer and the learning rate of each step out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from cwpo_dist.config import TrainingConfig
from cwpo_dist.lm.modules import whole_shape

# The state of each optimizer that a checkpoint holds, by torch's names.
STATE_KEYS: dict[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


def make_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW (torch's defaults) or plain SGD over the trainable parameters.

    As in `transformers.Trainer`, vectors (biases and norms) are not decayed.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trainable if len(whole_shape(p)) > 1]
    others = [p for p in trainable if len(whole_shape(p)) <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    kind: Callable[..., torch.optim.Optimizer] = (
        torch.optim.AdamW if config.optim == "adamw" else torch.optim.SGD
    )
    # fused: one pass over weights and state, and no copies of them on the way
    return kind(groups, lr=config.learning_rate, fused=True)


def learning_rates(config: TrainingConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate of each step (from 0) as a function of the step alone.

    It is `transformers`' schedule without its state, so a resumed run needs none.
    """
    unit = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        config.lr_scheduler_type,
        unit,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=total_steps,
    )
    assert isinstance(schedule, LambdaLR)
    factor = schedule.lr_lambdas[0]
    return lambda step: float(config.learning_rate * factor(step))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The same rate for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def fresh_state(like: Tensor, keys: tuple[str, ...]) -> dict[str, Tensor]:
    """Optimizer state of zeros, in torch's form, of a tensor that has seen no update."""
    if not keys:
        return {}
    # On the parameter's device: on CUDA, fused AdamW reads the step through a pointer there.
    step = torch.zeros((), dtype=torch.float32, device=like.device)
    return {"step": step, **{key: torch.zeros_like(like) for key in keys}}
