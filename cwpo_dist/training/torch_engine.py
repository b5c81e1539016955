"""An engine without DeepSpeed, of one process: what checks, tests and benchmarks compare with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cwpo_dist.config import TrainingConfig
from cwpo_dist.lm.modules import accumulate_in_place
from cwpo_dist.lm.rows import RowBatch
from cwpo_dist.lm.sequence import ALONE
from cwpo_dist.training.optim import STATE_KEYS, fresh_state, make_optimizer, set_learning_rate
from cwpo_dist.training.shards import Share


class TorchEngine:
    """An `Engine` (see loop.py) of one process."""

    rank = 0
    world_size = 1
    replicated = True
    sequence = ALONE

    def __init__(
        self, module: nn.Module, config: TrainingConfig, device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.module = module.to(self.device)
        accumulate_in_place(self.module)
        self.optimizer = make_optimizer(module, config)
        self.state_keys = STATE_KEYS[config.optim]
        self._max_grad_norm = config.max_grad_norm
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter] = fresh_state(parameter, self.state_keys)

    def forward(self, batch: RowBatch) -> Tensor:
        """One number an answer [A]."""
        output_A: Tensor = self.module(batch)
        return output_A

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the loss's gradient."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Clips, updates, forgets gradients; returns the gradient norm before clipping."""
        set_learning_rate(self.optimizer, learning_rate)
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(trainable, self._max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def total(self, numbers: Tensor) -> Tensor:
        """The numbers themselves, as there is one rank, on the CPU."""
        return numbers.cpu()

    def shares(self, key: str | None) -> Iterator[Share]:
        """All of each trainable parameter, or of its optimizer state."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                held: dict[str | None, Tensor] = {None: parameter.detach()}
                yield Share(name, 0, (held | self.optimizer.state[parameter])[key].view(-1))

    def publish(self) -> None:
        """Nothing to do: the module computes with the very parameters."""

    def start_at(self, step: int) -> None:
        """Tells the optimizer that its state has seen `step` updates."""
        for state in self.optimizer.state.values():
            if state:
                state["step"].fill_(step)
