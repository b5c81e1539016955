"""Scoring: pools of actors, and what `annotate`, `reference` and `evaluate` are told."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cwpo_dist.config.base import Fraction, PositiveFloat, PositiveInt, Section, Split
from cwpo_dist.config.models import ModelConfig

Engine = Literal["transformers", "vllm"]  # what writes answers


class Pool(Section):
    """Actors of one kind, and the nodes that they may run on."""

    num_actors: PositiveInt | tuple[Annotated[int, Field(ge=0)], PositiveInt] = Field(
        1,
        description="actors: so many, or as many of them as there is room for; [min, max]: at "
        "least min (0: its nodes may come later), at most max",
    )
    cpus_per_actor: PositiveFloat = Field(1.0, description="CPUs that one actor reserves")
    gpus_per_actor: Annotated[float, Field(ge=0.0)] = Field(
        0.0,
        description="GPUs that one actor reserves; 0.5: two share one; 0: on CPUs; more than 1 in "
        "`evaluate` alone, with vllm",
    )
    accelerator_type: str | None = Field(
        None, description="GPU as Ray names it: H100, L4, …; null: any"
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="labels of the nodes: a value, !value, in(a,b) or !in(a,b)",
    )
    resources: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="custom Ray resources of one actor"
    )

    @property
    def min_actors(self) -> int:
        """How many must find a place."""
        return 1 if isinstance(self.num_actors, int) else self.num_actors[0]

    @property
    def max_actors(self) -> int:
        """How many there are where there is room."""
        return self.num_actors if isinstance(self.num_actors, int) else self.num_actors[1]

    def by_single_gpus(self) -> Pool:
        """The same devices, for actors that compute on one GPU each."""
        number = max(1, int(self.gpus_per_actor))
        changes = {
            "num_actors": [self.min_actors * number, self.max_actors * number],
            "cpus_per_actor": self.cpus_per_actor / number,
            "gpus_per_actor": min(1.0, self.gpus_per_actor),
            "resources": {name: amount / number for name, amount in self.resources.items()},
        }
        told = {name: getattr(self, name) for name in Pool.model_fields}
        return Pool.model_validate(told | changes)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.min_actors > self.max_actors:
            raise ValueError(f"num_actors: [min, max] is {self.num_actors}; min is above max")
        if self.gpus_per_actor > 1 and not self.gpus_per_actor.is_integer():
            raise ValueError(f"gpus_per_actor: {self.gpus_per_actor:g}; give a whole number")
        for name in self.resources.keys() & {"CPU", "GPU"}:  # which Ray takes by its own words
            raise ValueError(f"resources.{name}: give {name.lower()}s_per_actor in its place")
        return self


class PoolConfig(Pool):
    """A stage's Ray Data actors: one pool, or several on different devices."""

    max_tokens_per_batch: PositiveInt = Field(
        4096, description="tokens of one forward pass, with any padding"
    )
    sharded: bool = Field(
        False,
        description="score with a model that exceeds one device: by the workers of `align` (for "
        "`annotate`: of `fit`), under ZeRO-3",
    )
    pools: list[Pool] = Field(
        default_factory=list,
        description="several pools that share the work, each with its own num_actors, …",
    )

    def actor_pools(self) -> list[Pool]:
        """The pools, or the one that the section itself describes."""
        return self.pools or [self]

    def one_gpu_an_actor(self) -> PoolConfig:
        """The same devices, for actors that compute on one GPU each."""
        if self._most_gpus <= 1:
            return self
        return self.model_copy(
            update={"pools": [pool.by_single_gpus() for pool in self.actor_pools()]}
        )

    @property
    def fewest_gpus(self) -> int:
        """Devices that an actor computes on, of those pools that have the fewest."""
        return max(1, int(min(pool.gpus_per_actor for pool in self.actor_pools())))

    @property
    def _most_gpus(self) -> float:
        return max(pool.gpus_per_actor for pool in self.actor_pools())

    def _instead_of_several(self) -> str | None:
        """What else a model that exceeds one GPU takes; None: an actor computes on all it has."""
        return "for a model that exceeds one GPU: sharded: true"

    @model_validator(mode="after")
    def _gpus_that_work(self) -> Self:
        remedy = self._instead_of_several()
        if self._most_gpus > 1 and remedy is not None:
            raise ValueError(
                f"gpus_per_actor: {self._most_gpus:g}; an actor computes on one GPU and would hold "
                f"the others in vain: give 1, or a share of one such as 0.5; {remedy}"
            )
        return self

    @property
    def most_actors(self) -> int:
        """How many actors there are, over all pools, where there is room."""
        return sum(pool.max_actors for pool in self.actor_pools())

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        plain = Pool()
        given = [name for name in Pool.model_fields if getattr(self, name) != getattr(plain, name)]
        if self.pools and given:
            raise ValueError(
                f"pools: given beside {', '.join(given)}; put these into each pool, or give "
                "pools: [] for the one pool that they describe"
            )
        return self


class AnnotateConfig(PoolConfig):
    """Whose answers are scored, and by whom."""

    compute_fields: ClassVar[frozenset[str]] = frozenset(
        {*PoolConfig.model_fields, "max_reject_fraction", "model", "models"}
    )

    model: ModelConfig | None = Field(
        None, description="any one-label reward model; null: the annotator that `fit` made"
    )
    models: list[ModelConfig] = Field(
        default_factory=list, description="several reward models, an ensemble; instead of `model`"
    )
    splits: list[Split] | None = Field(
        None,
        description="whose answers are scored; null: all, but for an annotator of ours not "
        "those it was trained on",
    )
    max_reject_fraction: Fraction = Field(
        0.05,
        description="share of answers without a score, and of pairs whose answers are alike to the "
        "model, above which the stage fails",
    )
    batch_invariant: bool = Field(
        False,
        description="a score has the same bits whatever is scored beside it, on one kind of device",
    )

    def identity(self) -> dict[str, object]:
        """As of any section; without the setting that older keys do not know, where it is off."""
        settings = super().identity()
        if not self.batch_invariant:
            del settings["batch_invariant"]
        return settings

    @model_validator(mode="after")
    def _promises_bits(self) -> Self:
        if self.sharded and self.batch_invariant:
            raise ValueError(
                "batch_invariant: workers that share a model (sharded: true) cannot promise it; "
                "leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _one_kind_of_device(self) -> Self:
        kinds = {(pool.gpus_per_actor > 0, pool.accelerator_type) for pool in self.actor_pools()}
        if self.batch_invariant and len(kinds) > 1:
            named = sorted(accelerator or ("a GPU" if gpu else "CPU") for gpu, accelerator in kinds)
            raise ValueError(
                f"batch_invariant: pools on {', '.join(named)}; a score has other bits on another "
                "kind of device, and either may score an answer: give pools of one kind, or leave "
                "batch_invariant out"
            )
        return self

    @model_validator(mode="after")
    def _one_list(self) -> Self:
        if self.model is not None and self.models:
            raise ValueError("model and models are both given; put all of them into models")
        if any(model in self.models[:k] for k, model in enumerate(self.models)):
            raise ValueError("models: one appears twice; its scores would count double")
        return self

    def ready(self) -> list[tuple[str, ModelConfig]]:
        """The given reward models, each with the field that names it; none: `fit` makes them."""
        if self.model is not None:
            return [("annotate.model", self.model)]
        return [(f"annotate.models.{k}", model) for k, model in enumerate(self.models)]

    def scored_splits(self) -> list[Split]:
        """The splits whose answers are scored."""
        if self.splits is not None:
            return self.splits
        rest: list[Split] = ["unlabelled", "validation", "test"]
        return ["labelled", *rest] if self.ready() else rest


class ReferenceConfig(PoolConfig):
    """Log-probs of the frozen SFT policy."""

    compute_fields: ClassVar[frozenset[str]] = frozenset(PoolConfig.model_fields)


class EvaluateConfig(PoolConfig):
    """Held-out accuracy and gold reward accuracy."""

    # An answer's noise is a function of its prompt, whatever else is answered beside it. The engine
    # is in the key of `generate`, which is an input.
    compute_fields: ClassVar[frozenset[str]] = frozenset(
        {*PoolConfig.model_fields, "generation_batch_size", "engine"}
    )

    split: Literal["validation", "test"] = Field("test", description="whose pairs give the figures")
    gold_function: str | None = Field(
        None,
        description="'package.module:function(prompt, answer)', a number as gold reward; read "
        "where there is no gold_model; null: none",
    )
    gold_model: ModelConfig | None = Field(
        None, description="a one-label reward model as gold; null: none"
    )
    num_prompts: Annotated[int, Field(ge=0)] = Field(
        256, description="prompts to generate answers for; 0: none, so there is no GRA"
    )
    max_new_tokens: PositiveInt = Field(512, description="tokens of an answer, at most")
    temperature: Annotated[float, Field(ge=0.0)] = Field(
        0.95, description="of sampled answers; 0: greedy"
    )
    engine: Engine = Field(
        "transformers",
        description="what writes answers; vllm (an extra): also by policies that exceed one GPU, "
        "over all that an actor reserves",
    )
    generation_batch_size: PositiveInt = Field(16, description="prompts answered side by side")
    kl: bool = Field(
        False,
        description="also estimate the KL divergence from the SFT model, in nats, on sampled "
        "answers",
    )

    def _instead_of_several(self) -> str | None:
        return None if self.engine == "vllm" else "or several with engine: vllm"

    @model_validator(mode="after")
    def _whole_gpus(self) -> Self:
        if self.engine == "vllm" and any(
            0 < pool.gpus_per_actor < 1 for pool in self.actor_pools()
        ):
            raise ValueError("gpus_per_actor: vLLM takes the memory of whole GPUs; give 1 or more")
        return self
