"""A model that stages apply, and the GPUs there are, in; GPUs too small for its weights out.

What else they hold is an estimate; but weights alone that exceed a GPU's memory end every actor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

from cwpo_dist.config import Config, ModelConfig, Pool
from cwpo_dist.placement import Machine, gpus, uses_gpu
from cwpo_dist.runs.scored_by import Scorers
from cwpo_dist.runs.sizes import ModelSize

# GB of a GPU, by Ray's name of its kind: the most that is sold under that name.
GPU_GB = {
    **{"T4": 16, "P100": 16, "V100": 32, "A10G": 24, "L4": 24, "L40S": 48, "RTX-PRO-6000": 96},
    **{"A100": 80, "A100-40G": 40, "A100-80G": 80, "H100": 96, "H20": 141, "H200": 141},
    **{"B200": 192, "GB200": 192, "B300": 288, "GB300": 288},
}
_KIND = "accelerator_type:"  # of Ray's resources
_FILLED = 0.8  # of a GPU, by weights that leave room to compute


def room_faults(
    config: Config,
    stages: Set[str],
    field: str,
    model: ModelConfig,
    size: ModelSize,
    machines: Sequence[Machine],
) -> Iterator[str]:
    """One line a stage: how much is to be held, by what, and what to set.

    Args:
        config: the run.
        stages: those that it reaches.
        field: that names the model.
        model: what it says.
        size: of it.
        machines: the nodes there are.
    """
    held = size.parameters * (4 if model.torch_dtype == "float32" else 2) / 1e9
    for stage, remedy, parts, kind in _holders(config, stages, field, machines):
        if kind is not None and held / parts > GPU_GB[kind]:
            enough = 2 ** int(held / (_FILLED * GPU_GB[kind])).bit_length()
            yield (
                f"{field}.model_name_or_path: {stage} holds {held:,.0f} GB of weights on "
                f"{parts} × {GPU_GB[kind]} GB ({kind}); {remedy.format(n=enough)}"
            )


def _holders(
    config: Config, stages: Set[str], field: str, machines: Sequence[Machine]
) -> Iterator[tuple[str, str, int, str | None]]:
    """Stages that apply a model, what to set, on how many GPUs it lies, and of what kind."""
    judge = config.evaluate
    if field == "policy" and "evaluate" in stages and judge.num_prompts:
        remedy = "set evaluate.engine to vllm, and its gpus_per_actor to {n}"
        for pool in judge.actor_pools():
            yield "evaluate", remedy, max(1, int(pool.gpus_per_actor)), _kind(pool, machines)
    stage, trained, by = _scorers(config, field)
    if stage not in stages:
        return
    if by.workers is None:
        remedy = f"set {stage}.sharded to true, and {trained}.num_workers to {{n}}"
        for pool in by.section.actor_pools():
            yield stage, remedy, 1, _kind(pool, machines)
    elif uses_gpu(by.workers, gpus(machines)):
        remedy = f"raise {trained}.num_workers to {{n}}"
        yield stage, remedy, by.workers.min_workers, _largest(machines)


def _scorers(config: Config, field: str) -> tuple[str, str, Scorers]:
    """The stage that scores with a model, the section whose workers may share it, and both."""
    if field == "policy":
        return "reference", "align", Scorers(config.reference, config.align)
    if field == "evaluate.gold_model":
        return "evaluate", "align", Scorers(config.evaluate, config.align)
    return "annotate", "fit", Scorers(config.annotate, config.fit)


def _kind(pool: Pool, machines: Sequence[Machine]) -> str | None:
    """Of the GPUs that an actor gets, the largest it may be; None: it has none, or nobody knows."""
    if not pool.gpus_per_actor:
        return None
    if pool.accelerator_type is None:
        return _largest(machines)
    return pool.accelerator_type if pool.accelerator_type in GPU_GB else None


def _largest(machines: Sequence[Machine]) -> str | None:
    """The kind of the largest GPUs there are; None where a node's are not known."""
    kinds = [
        {name.removeprefix(_KIND) for name in machine.resources} & GPU_GB.keys()
        for machine in machines
        if machine.gpus
    ]
    found = [kind for of_node in kinds for kind in of_node]
    return max(found, key=GPU_GB.__getitem__, default=None) if all(kinds) else None
