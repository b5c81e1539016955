"""A configuration in; everything that would stop it later, said now, and the sizes of its models.

No worker is started and no weight is read. Faults are collected and raised together; those of the
cluster's nodes come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import ray

from cwpo_dist.config import (
    Config,
    ConfigError,
    ModelConfig,
    PoolConfig,
    TrainingConfig,
)
from cwpo_dist.evaluation.gold_function import load_function
from cwpo_dist.lm.encoder import Encoder
from cwpo_dist.pairs.locate import reads_below
from cwpo_dist.pairs.sources import plan as plan_sources
from cwpo_dist.placement import (
    Machine,
    alive_machines,
    pool_faults,
    task_faults,
    this_machine,
    training_faults,
)
from cwpo_dist.runs.arms import implicit_arms, judged_arms, needs_annotator
from cwpo_dist.runs.cluster import connect, named_cluster, refuse_unreachable
from cwpo_dist.runs.engine_checks import vllm_faults
from cwpo_dist.runs.model_checks import CheckedModel, check_model
from cwpo_dist.runs.named_loss import objective
from cwpo_dist.runs.node_probes import node_faults
from cwpo_dist.runs.own_checks import own_faults
from cwpo_dist.runs.room_checks import room_faults
from cwpo_dist.runs.sizes import Loader, ModelSize, annotator, policy, reward_model
from cwpo_dist.runs.training_checks import deepspeed_faults, setting_faults
from cwpo_dist.runs.trials import Trial, baseline, by_loss, section, starting
from cwpo_dist.runs.weighing_checks import weighing_faults
from cwpo_dist.storage import StorageError, Store


@dataclass(frozen=True)
class Checked:
    """What a configuration without faults has.

    Attributes:
        sizes: by the field that names a model (`weak`, `policy`, `annotate.model`, …).
        machines: this machine, or the nodes of the cluster that we are in.
        encoders: what turns pairs into each model's tokens, by the same fields.
        notes: what to know of the models that is no fault.
    """

    sizes: dict[str, ModelSize]
    machines: tuple[Machine, ...]
    encoders: dict[str, Encoder]
    notes: tuple[str, ...] = ()

    def with_model(self, field: str, found: CheckedModel) -> Checked:
        """With what is known of one more model."""
        notes = tuple(dict.fromkeys((*self.notes, *found.notes)))
        if found.size is None or found.encoder is None:
            return replace(self, notes=notes)
        sizes, encoders = self.sizes | {field: found.size}, self.encoders | {field: found.encoder}
        return replace(self, sizes=sizes, encoders=encoders, notes=notes)


def check(config: Config, until: str | None = None) -> Checked:
    """Refuses what cannot run.

    Args:
        config: the run.
        until: the stage that it stops after; None: all.

    Raises:
        ConfigError: one line a fault: field, value, remedy.
    """
    machines = tuple(available())
    if ray.is_initialized() and (unfit := node_faults(config.output_dir)):
        raise ConfigError("\n".join(unfit))  # whatever else is wrong may follow from these
    try:
        Store(config.output_dir).check()
    except StorageError as error:
        raise ConfigError(f"output_dir: {error}") from error
    faults = [*_config_faults(config, until)]
    checked = Checked({}, machines, {})
    for field, model, load in models(config, until):
        found = check_model(field, model, load, _trainings_of(config, until, field, load))
        checked = checked.with_model(field, found)
        faults += found.faults
        if field in checked.sizes:
            stages, size = reached(config, until), checked.sizes[field]
            faults += room_faults(config, stages, field, model, size, machines)
    faults += _engine_faults(config, until, checked.sizes.get("policy"))
    for name, training, trained in trainings(config, until):
        faults += setting_faults(name, training, trained, machines)
    for model in _shared_by_fit(config, until):
        faults += deepspeed_faults("fit", config.fit, model, machines)
    faults += (f"{fault}{elsewhere()}" for fault in _placement_faults(config, until, machines))
    if faults:
        raise ConfigError("\n".join(faults))
    return checked


def _engine_faults(config: Config, until: str | None, size: ModelSize | None) -> Iterator[str]:
    """What speaks against writing answers by another engine, where a policy's size is known."""
    if _writes_by_vllm(config, until) and size is not None:
        assert config.policy is not None, "its size is known"
        yield from vllm_faults(config, config.policy, size)


def _writes_by_vllm(config: Config, until: str | None) -> bool:
    judge = config.evaluate
    return (
        judge.engine == "vllm" and bool(judge.num_prompts) and "evaluate" in reached(config, until)
    )


def _config_faults(config: Config, until: str | None) -> Iterator[str]:
    """What can be said without a look at models and machines."""
    stages = reached(config, until)
    yield from _source_faults(config, stages)
    yield from _missing_models(config, until)
    yield from _gold_faults(config)
    yield from objective_faults(config) if "align" in stages else ()
    yield from weighing_faults(config) if "weigh" in stages else ()
    yield from _head_faults(config, stages) if config.fit.heads > 1 else ()


def _trainings_of(
    config: Config, until: str | None, field: str, load: Loader
) -> dict[str, TrainingConfig]:
    """The sections that train the model of a field; the weak one as a policy trains as `fit`."""
    if load is reward_model:
        return {}
    if field == "weak":
        return {"fit": config.fit}
    return {name: each for name, each, _ in trainings(config, until) if name != "fit"}


def _shared_by_fit(config: Config, until: str | None) -> list[ModelConfig]:
    """Ready reward models that the workers of `fit` share, which train nothing then."""
    stages = reached(config, until)
    if not config.annotate.sharded or "annotate" not in stages or "fit" in stages:
        return []
    return [model for _, model in config.annotate.ready()]


def check_trials(config: Config, found: Sequence[Trial]) -> Checked:
    """Refuses a comparison in which a trial could not run.

    Raises:
        ConfigError: one line a fault: field, value, remedy.
    """
    baseline(config, found)
    checked = [check(run) for run in by_loss(config, found)]
    if section(config).ask:
        checked.append(check(starting(config, section(config).seeds[0]), "annotate"))
    sizes = {name: size for each in checked for name, size in each.sizes.items()}
    encoders = {name: encoder for each in checked for name, encoder in each.encoders.items()}
    notes = dict.fromkeys(note for each in checked for note in each.notes)
    return Checked(sizes, checked[0].machines, encoders, tuple(notes))


def _placement_faults(
    config: Config, until: str | None, machines: tuple[Machine, ...]
) -> Iterator[str]:
    """Tasks, workers and actors that these machines could never hold."""
    yield from task_faults("prepare.", "num_cpus", config.prepare.num_cpus, machines)
    for name, training, _ in trainings(config, until):
        yield from training_faults(name, training, machines)
    for _ in _shared_by_fit(config, until)[:1]:
        yield from training_faults("fit", config.fit, machines)
    for name, pool in pools(config, until):
        yield from pool_faults(f"{name}.", pool, machines)


def elsewhere() -> str:
    """What else can be asked, where it was this machine; nothing in a cluster."""
    if named_cluster() is not None:
        return ""
    return " (to ask a cluster instead of this machine: cwpo submit plan CONFIG --address URL)"


def available() -> list[Machine]:
    """The cluster that RAY_ADDRESS names, else what a local Ray would take from this machine.

    Raises:
        ClusterError: where there is no such cluster, or Ray could not start here.
    """
    if not ray.is_initialized():
        if named_cluster() is None:
            refuse_unreachable(None)
            return [this_machine()]
        connect()
    return alive_machines()


def models(config: Config, until: str | None = None) -> Iterator[tuple[str, ModelConfig, Loader]]:
    """Every model that is read up to a stage, with the field that names it."""
    stages = reached(config, until)
    teacher = config.weak if implicit_arms(config) else None
    named: list[tuple[str, str, ModelConfig | None, Loader]] = [
        ("implicit", "weak", teacher, policy),
        ("fit", "weak", config.weak, annotator),
        *(("annotate", field, model, reward_model) for field, model in config.annotate.ready()),
        ("align", "policy", config.policy, policy),
        ("evaluate", "evaluate.gold_model", config.evaluate.gold_model, reward_model),
    ]
    for stage, field, model, load in named:
        if stage in stages and model is not None:
            yield field, model, load


def trainings(
    config: Config, until: str | None = None
) -> Iterator[tuple[str, TrainingConfig, ModelConfig | None]]:
    """The training sections that are used up to a stage, and the models that they train."""
    stages = reached(config, until)
    for name, training in config.sections(TrainingConfig).items():
        if name in stages:
            yield name, training, config.weak if name == "fit" else config.policy


def pools(config: Config, until: str | None = None) -> Iterator[tuple[str, PoolConfig]]:
    """The actor pools that are used up to a stage."""
    stages = reached(config, until)
    for name, pool in config.sections(PoolConfig).items():
        # Else workers do it; but the actors of `evaluate` write answers, too.
        if name in stages and (not pool.sharded or name == "evaluate"):
            yield name, pool


def reached(config: Config, until: str | None) -> set[str]:
    """The stages with settings of their own up to `until`; `implicit`: the weak one as policy."""
    labelling = {"annotate"} if config.annotate.ready() else {"fit", "annotate"}
    if until == "prepare":
        return set()
    if until in labelling:
        return {"fit"} if until == "fit" else labelling
    judges = needs_annotator(config) or judged_arms(config)
    found = {"weigh"} | (labelling if judges else set())
    found |= {"implicit", "reference"} if implicit_arms(config) else set()
    if until == "weigh":
        return found
    placed = config.sections(TrainingConfig).keys() | config.sections(PoolConfig).keys()
    return found | (placed - {"fit", "annotate"})  # `aligned` is `reference` of another model


def _source_faults(config: Config, stages: set[str]) -> Iterator[str]:
    """Sources that cannot be read, lack what a stage needs, or would read what the run writes."""
    try:
        planned = plan_sources(config.prepare)
    except ConfigError as error:
        yield str(error)
        return
    yield from own_faults(config, planned) if "weigh" in stages else ()
    yield from _column_faults(config, [piece.layout.columns for piece in planned.pieces], stages)
    for index, source in enumerate(config.prepare.sources):
        if reads_below(source, config.output_dir):
            yield (
                f"output_dir: {config.output_dir!r} lies in prepare.sources.{index} "
                f"({source.path!r}), which would read what the run leaves there as data; name "
                "another"
            )


def _column_faults(
    config: Config, columns: Sequence[Mapping[str, str]], stages: set[str]
) -> Iterator[str]:
    """Columns that a stage needs, of which no source has any."""
    alone = all("response" in each for each in columns)
    if alone and config.prepare.pairing == "given" and stages & {"fit", "weigh"}:
        yield (
            "prepare.pairing: given, but its sources have one response a row, of which no pair is "
            "made to learn from or to weigh; set it to all (weigh.pairing: best_worst then keeps "
            "the best and the worst of each prompt), or end with `cwpo annotate`"
        )
    voted = any("votes_a" in each for each in columns)
    if "fit" in stages and config.fit.labels == "votes" and not voted:
        yield (
            "fit.labels: 'votes', but no source has votes_a and votes_b; say which they are under "
            "prepare.sources.N.columns, or give hard"
        )


def _head_faults(config: Config, stages: set[str]) -> Iterator[str]:
    """Several heads where no annotator is fitted that could have them."""
    for field, _ in config.annotate.ready()[:1]:
        yield (
            f"fit.heads: {config.fit.heads}, but {field} is ready, and nothing is fitted; leave "
            f"fit.heads out, or {field}"
        )
    fitted = "fit" in stages or config.annotate.ready() or config.compare  # whose arms are parted
    if "implicit" in stages and not fitted:
        yield (
            f"fit.heads: {config.fit.heads}, but arm 'ws_dpo' labels by its model's log-probs, "
            "which have no heads; leave fit.heads out, or add an arm with a fitted annotator"
        )


def _gold_faults(config: Config) -> Iterator[str]:
    if config.evaluate.gold_function is not None:
        try:
            load_function(config.evaluate.gold_function)
        except ValueError as error:
            yield str(error)


def objective_faults(config: Config) -> Iterator[str]:
    """A loss that there is not, settings that it would ignore, or an arm that it cannot serve."""
    column, found = config.align.beta_column, []
    if column is not None and column not in config.prepare.keep_columns:
        found.append(f"align.beta_column: {column!r} is none of prepare.keep_columns; add it there")
    for arm in config.arms:
        try:
            objective(config.align, soft_labels=config.arm(arm).soft_labels)
        except ConfigError as error:
            found.append(str(error))
    yield from dict.fromkeys(found)  # most faults are every arm's


def _missing_models(config: Config, until: str | None) -> Iterator[str]:
    """Models that a stage needs and the config lacks."""
    stages = reached(config, until)
    if "fit" in stages and config.weak is None:
        yield (
            "weak: an annotator is needed; give weak.model_name_or_path to fit one, or "
            "annotate.model for a ready one-label reward model"
        )
    implicit = implicit_arms(config) if "implicit" in stages else []
    if implicit and config.weak is None:
        yield f"weak: arm {implicit[0]!r} trains it by SFT and DPO; give weak.model_name_or_path"
    if "align" in stages and config.policy is None:
        yield f"policy: arm {config.arms[0]!r} aligns a policy; give policy.model_name_or_path"
