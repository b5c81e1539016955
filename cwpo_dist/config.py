"""What a run is told: one typed, frozen section a stage, each field with its default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

Split = Literal["labelled", "unlabelled", "validation", "test"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


Tracker = Literal["tensorboard", "mlflow", "wandb"]


class ConfigError(ValueError):
    """A configuration that cannot run; the message names field, value and remedy."""


class Section(BaseModel):
    """Base of all sections: unknown keys are refused and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # Fields that say how or where work is done, not what comes out: they stay out of content keys.
    compute_fields: ClassVar[frozenset[str]] = frozenset()

    def identity(self) -> dict[str, Any]:
        """The settings that decide a stage's output, ready to be hashed into its key."""
        return self.model_dump(mode="json", exclude=set(self.compute_fields))


class Source(Section):
    """One source of pairs: files (JSONL, gzip, Parquet, CSV), a folder, or a hub id."""

    path: str = Field(description="file, glob, folder, URI, or a Hugging Face hub id")
    name: str | None = Field(None, description="subset of a hub data set")
    data_dir: str | None = Field(None, description="folder inside a hub data set (harmless-base)")
    split: str = Field("train", description="split of a hub data set or local folder")
    revision: str | None = Field(None, description="commit of a hub data set")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="our name → theirs, for prompt, chosen, rejected, response_a, response_b, "
        "label, votes_a, votes_b",
    )
    format: Literal["auto", "text", "conversational", "hh"] = Field(
        "auto", description="hh: transcripts '\\n\\nHuman: … \\n\\nAssistant: …'"
    )
    into: Literal["train", "validation", "test"] | None = Field(
        None, description="every row of this source goes to this side; null: split by hash"
    )
    limit: PositiveInt | None = Field(None, description="read at most this many rows")


class PrepareConfig(Section):
    """Sources → pairs: what is read and how it is split."""

    compute_fields: ClassVar[frozenset[str]] = frozenset({"num_cpus", "max_reject_fraction"})

    sources: list[Source] = Field(min_length=1)
    labelled_fraction: Fraction = Field(
        0.3, description="share of training prompts whose labels may be used; 1: all there are"
    )
    validation_fraction: Fraction = 0.0
    test_fraction: Fraction = 0.1
    flipped_labels: Fraction = Field(
        0.0, description="share of training labels turned round, for experiments with poisoned ones"
    )
    group_column: str | None = Field(
        None, description="rows that share its value stay on one side; null: the prompt"
    )
    keep_columns: list[str] = Field(default_factory=list, description="carried along untouched")
    max_reject_fraction: Fraction = Field(
        0.05, description="the stage fails when more rows, or more files (damaged), are set aside"
    )
    rows_per_shard: PositiveInt = Field(1024, description="about a minute's work of an annotator")
    num_cpus: PositiveFloat = Field(0.5, description="CPUs of one reading task")


class ModelConfig(Section):
    """A causal language model and how text becomes its tokens."""

    model_name_or_path: str
    revision: str | None = None
    num_hidden_layers: PositiveInt | None = Field(None, description="keep the first N layers")
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    torch_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on CUDA, float32 on CPU"
    )
    chat_template: str = Field("tokenizer", description="tokenizer, plain, or a Jinja file")
    max_length: PositiveInt = Field(512, description="tokens of prompt + the longer answer")
    over_length: Literal["drop", "truncate"] = "drop"


class LoraConfig(Section):
    """Low-rank adapters (peft), with peft's names."""

    r: PositiveInt = 8
    lora_alpha: PositiveInt = 16
    lora_dropout: Fraction = 0.05
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class TrainingConfig(Section):
    """What `fit`, `sft` and `align` share: schedule, batch, DeepSpeed and workers."""

    compute_fields: ClassVar[frozenset[str]] = frozenset(
        {
            "max_tokens_per_micro_batch",
            "gradient_checkpointing",
            "zero_stage",
            "deepspeed",
            "num_workers",
            "use_gpu",
            "cpus_per_worker",
            "resources_per_worker",
            "save_steps",
            "save_minutes",
            "save_total_limit",
            "logging_steps",
            "report_to",
            "eval_steps",
            "eval_pairs",
            "max_failures",
            "step_timeout_s",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
        }
    )

    learning_rate: PositiveFloat
    num_train_epochs: PositiveFloat = 1.0
    max_steps: int = Field(-1, description="stop after this many steps; -1: by epochs")
    global_batch_size: PositiveInt = Field(64, description="pairs a step, over all workers")
    per_device_train_batch_size: PositiveInt | None = Field(
        None, description="TRL's name; with gradient_accumulation_steps it sets global_batch_size"
    )
    gradient_accumulation_steps: PositiveInt | None = None
    max_tokens_per_micro_batch: PositiveInt = Field(4096, description="tokens, with any padding")
    optim: Literal["adamw", "sgd"] = "adamw"
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    zero_stage: Literal[0, 1, 2, 3] = 2
    deepspeed: dict[str, Any] | str | None = Field(
        None, description="a section, or a Hugging Face DeepSpeed JSON file, merged over ours"
    )
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        1,
        description="so many; [min, max]: as many as there is room for, fewer when nodes are lost, "
        "more when they come; what is computed stays the same",
    )
    use_gpu: bool | Literal["auto"] = Field("auto", description="auto: when the cluster has GPUs")
    cpus_per_worker: PositiveFloat = 1.0
    resources_per_worker: dict[str, float] = Field(default_factory=dict)
    save_steps: PositiveInt = 100
    save_minutes: PositiveFloat | None = Field(
        None, description="a checkpoint also when the last one is so old"
    )
    save_total_limit: PositiveInt = 2
    logging_steps: PositiveInt = 1
    report_to: list[Tracker] = Field(
        ["tensorboard"], description="tensorboard, mlflow, wandb; none: metrics.jsonl alone"
    )
    eval_steps: PositiveInt | None = Field(
        None, description="held-out loss and accuracy every so many steps; null: never"
    )
    eval_pairs: PositiveInt = Field(
        128, description="of `validation`, else of evaluate.split; the same ones each time"
    )
    max_failures: Annotated[int, Field(ge=-1)] = 3
    step_timeout_s: PositiveFloat = Field(
        1800.0, description="no step for so long: stacks are dumped, the workers restarted"
    )

    @property
    def min_workers(self) -> int:
        """The fewest workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    def deepspeed_section(self) -> dict[str, Any]:
        """The DeepSpeed section: as given, or read from the JSON file that it names.

        Raises:
            ConfigError: for a file that is missing or no JSON.
        """
        if not isinstance(self.deepspeed, str):
            return self.deepspeed or {}
        try:
            section: dict[str, Any] = json.loads(Path(self.deepspeed).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError(f"deepspeed: cannot read {self.deepspeed!r}: {error}") from None
        return section

    @model_validator(mode="after")
    def _workers_in_order(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers: {self.num_workers}; give [min, max], min first")
        return self

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_none(cls, value: Any) -> Any:
        """`report_to: wandb` and `report_to: none` are how people write it."""
        if isinstance(value, str):
            return [] if value == "none" else [value]
        return value or []

    @model_validator(mode="before")
    @classmethod
    def _resolve_global_batch(cls, data: Any) -> Any:
        """TRL's per-device batch × accumulation × workers becomes one global batch, once."""
        if not isinstance(data, dict):
            return data
        if data.get("per_device_train_batch_size") is None:
            if data.get("gradient_accumulation_steps") is not None:
                raise ValueError(
                    "gradient_accumulation_steps is given without per_device_train_batch_size: "
                    "give both, or global_batch_size alone"
                )
            return data
        if isinstance(data.get("num_workers"), list | tuple):
            raise ValueError(
                "per_device_train_batch_size is given with num_workers [min, max], whose batch "
                "would change with the workers: give global_batch_size instead"
            )
        workers = int(data.get("num_workers", 1))
        per_device = int(data["per_device_train_batch_size"])
        total = per_device * int(data.get("gradient_accumulation_steps") or 1) * workers
        given = data.get("global_batch_size")
        if given is not None and int(given) != total:
            raise ValueError(
                f"global_batch_size is {given}, but per_device_train_batch_size × "
                f"gradient_accumulation_steps × num_workers = {total}: give one of the two"
            )
        return {**data, "global_batch_size": total}


class FitConfig(TrainingConfig):
    """The annotator's training, Bradley–Terry (paper eq. 4–5, table 7)."""

    # Each seed is in the key of the annotator that it makes.
    compute_fields: ClassVar[frozenset[str]] = TrainingConfig.compute_fields | {"seeds"}

    learning_rate: PositiveFloat = 1e-5
    num_train_epochs: PositiveFloat = 5.0
    global_batch_size: PositiveInt = 32
    seeds: list[int] | None = Field(
        None, min_length=1, description="an ensemble, one annotator a seed; null: the run's seed"
    )

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int] | None) -> list[int] | None:
        if seeds is not None and len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands twice; equal seeds make the same annotator")
        return seeds


class SftConfig(TrainingConfig):
    """Supervised fine-tuning of the policy on the chosen answers (paper table 8)."""

    learning_rate: PositiveFloat = 1e-5
    num_train_epochs: PositiveFloat = 3.0
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    lora: LoraConfig | None = LoraConfig()


class AlignConfig(TrainingConfig):
    """Confidence-weighted preference optimisation (paper eq. 7–11, table 9)."""

    learning_rate: PositiveFloat = 5e-6
    num_train_epochs: PositiveFloat = 5.0
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    lora: LoraConfig | None = LoraConfig()
    loss_type: str = Field(
        "sigmoid",
        description="TRL's names: sigmoid (DPO), ipo (summed, the paper's), ipo_norm (per token, "
        "TRL's ipo), robust (rDPO), hinge, simpo, orpo",
    )
    beta: PositiveFloat = 0.5
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] | None = Field(
        None,
        description="ε: of robust its share of flipped labels (null: the paper's 0.1), of sigmoid "
        "conservative DPO, of simpo the same (null: 0)",
    )
    simpo_gamma: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="γ, SimPO's target margin (null: TRL's 0.5)"
    )
    weight_normalization: Literal["none", "batch", "dataset"] | None = Field(
        None, description="overrides the arm's: none (paper), by ΣC of the batch, by mean C"
    )


class Pool(Section):
    """Actors of one kind, and the nodes that they may run on."""

    num_actors: PositiveInt | tuple[Annotated[int, Field(ge=0)], PositiveInt] = Field(
        1,
        description="so many, or as many of them as there is room for; [min, max]: at least min "
        "(0: its nodes may come later), at most max",
    )
    cpus_per_actor: PositiveFloat = 1.0
    gpus_per_actor: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="0.5: two actors share a GPU"
    )
    accelerator_type: str | None = Field(None, description="as Ray names it: H100, L4, …")
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

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.min_actors > self.max_actors:
            raise ValueError(f"num_actors: [min, max] is {self.num_actors}; min is above max")
        if self.gpus_per_actor > 1 and not self.gpus_per_actor.is_integer():
            raise ValueError(
                f"gpus_per_actor: {self.gpus_per_actor}; Ray shares one GPU, or gives whole ones"
            )
        return self


class PoolConfig(Pool):
    """A stage's Ray Data actors: one pool, or several on different devices."""

    max_tokens_per_batch: PositiveInt = Field(
        4096, description="tokens of one forward pass, with any padding"
    )
    pools: list[Pool] = Field(
        default_factory=list,
        description="several pools that share the work, each with its own num_actors, …",
    )

    def actor_pools(self) -> list[Pool]:
        """The pools, or the one that the section itself describes."""
        return self.pools or [self]

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
    """Which pairs are scored, and by whom."""

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
        None, description="null: all, but for an annotator of ours not those it was trained on"
    )
    max_reject_fraction: Fraction = 0.05

    @model_validator(mode="after")
    def _one_list(self) -> Self:
        if self.model is not None and self.models:
            raise ValueError("model and models are both given; put all of them into models")
        if any(model in self.models[:k] for k, model in enumerate(self.models)):
            raise ValueError("models: one stands twice; its scores would count double")
        return self

    def ready(self) -> list[tuple[str, ModelConfig]]:
        """The given reward models, each with the field that names it; none: `fit` makes them."""
        if self.model is not None:
            return [("annotate.model", self.model)]
        return [(f"annotate.models.{k}", model) for k, model in enumerate(self.models)]

    def scored_splits(self) -> list[Split]:
        """The splits whose pairs are scored."""
        if self.splits is not None:
            return self.splits
        rest: list[Split] = ["unlabelled", "validation", "test"]
        return ["labelled", *rest] if self.ready() else rest


class WeighConfig(Section):
    """margin → confidence → weight."""

    weight_function: (
        Literal["confidence", "sigmoid", "clipped", "clipped_fifth", "one", "lower_confidence"]
        | None
    ) = Field(
        None,
        description="overrides the arm's; C, σ(m), min(m,1), min(0.2m,1), 1, C(m − disagreement)",
    )
    top_fraction: Fraction | None = Field(None, description="keep the most confident share")
    min_confidence: Fraction | None = Field(None, description="keep pairs at least so confident")
    temperature: PositiveFloat | Literal["fitted"] | None = Field(
        None, description="margins are divided by it; fitted: to human labels; null: the arm's"
    )
    calibration_split: Literal["validation", "labelled"] = Field(
        "validation", description="where temperatures are fitted; labelled: ready models only"
    )


class ReferenceConfig(PoolConfig):
    """Log-probs of the frozen SFT policy."""

    compute_fields: ClassVar[frozenset[str]] = frozenset({*PoolConfig.model_fields, "sharded"})

    sharded: bool = Field(
        False,
        description="for a policy that exceeds one device: by the workers of `align`, under ZeRO-3",
    )


class EvaluateConfig(PoolConfig):
    """Held-out accuracy and gold reward accuracy."""

    compute_fields: ClassVar[frozenset[str]] = frozenset(PoolConfig.model_fields)

    split: Literal["validation", "test"] = "test"
    gold_function: str | None = Field(None, description="'package.module:function(prompt, answer)'")
    gold_model: ModelConfig | None = Field(None, description="a one-label reward model as gold")
    num_prompts: Annotated[int, Field(ge=0)] = Field(256, description="prompts to generate for")
    max_new_tokens: PositiveInt = 512
    temperature: Annotated[float, Field(ge=0.0)] = Field(0.95, description="0: greedy")
    generation_batch_size: PositiveInt = 16
    kl: bool = Field(
        False, description="also estimate the KL divergence from the SFT model, on sampled answers"
    )


class Grid(Section):
    """Trials to compare: every arm × loss × labelled share × share of flipped labels."""

    arms: list[str] = Field(min_length=1)
    losses: list[str] | None = Field(None, description="null: align.loss_type")
    labelled_fractions: list[Fraction] | None = Field(
        None, description="null: prepare.labelled_fraction"
    )
    flipped_labels: list[Fraction] | None = Field(None, description="null: prepare.flipped_labels")


class CompareConfig(Section):
    """What `cwpo compare` runs, each trial once a seed."""

    seeds: list[int] = Field([0, 1, 2], min_length=1)
    grids: list[Grid] = Field(default_factory=list, description="none: the run's arms")
    learning_rates: list[PositiveFloat] = Field(
        default_factory=list,
        description="of align: each trial takes the best on validation, with the first seed; "
        "none: align.learning_rate",
    )
    baseline: str | None = Field(None, description="whom others are paired with; null: the first")


class Config(Section):
    """A whole run."""

    output_dir: str
    seed: int = 0
    arms: list[str] = Field(default_factory=lambda: ["cw"], min_length=1)
    simulated_labels: bool = Field(False, description="labels come from a rule; shown everywhere")
    prepare: PrepareConfig
    weak: ModelConfig | None = Field(None, description="the weak model that becomes the annotator")
    policy: ModelConfig | None = Field(None, description="the policy to align")
    fit: FitConfig = FitConfig()
    annotate: AnnotateConfig = AnnotateConfig()
    weigh: WeighConfig = WeighConfig()
    sft: SftConfig | None = Field(
        default_factory=SftConfig, description="null (or none) for policies already instructed"
    )
    reference: ReferenceConfig = ReferenceConfig()
    align: AlignConfig = AlignConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig | None = Field(None, description="read by `cwpo compare` and `plan`")

    @model_validator(mode="before")
    @classmethod
    def _sft_none(cls, data: Any) -> Any:
        """`sft: none` is how people write it."""
        if isinstance(data, dict) and data.get("sft") == "none":
            return {**data, "sft": None}
        return data

    @model_validator(mode="after")
    def _no_credentials(self) -> Self:
        """URIs are written into manifests, reports and trackers: secrets must not be in them."""
        models = {"weak": self.weak, "policy": self.policy}
        models |= dict(self.annotate.ready()) | {"evaluate.gold_model": self.evaluate.gold_model}
        named = [("output_dir", self.output_dir)]
        named += [(f"prepare.sources.{i}.path", s.path) for i, s in enumerate(self.prepare.sources)]
        named += [(f"{k}.model_name_or_path", m.model_name_or_path) for k, m in models.items() if m]
        for field, uri in named:
            if "@" in urlsplit(uri).netloc:
                raise ValueError(
                    f"{field}: the URI carries credentials; pass them by environment variables"
                )
        return self

    @model_validator(mode="after")
    def _known_arms(self) -> Self:
        named = [("arms", self.arms)]
        for k, grid in enumerate(self.compare.grids if self.compare else []):
            named.append((f"compare.grids.{k}.arms", grid.arms))
        for field, arms in named:
            for arm in arms:
                if arm not in ARMS:
                    known = ", ".join(sorted(ARMS))
                    raise ValueError(f"{field}: {arm!r} is unknown; choose from {known}")
        return self


class Arm(Section):
    """A named preset over `weigh` and `align`."""

    labels: Literal["human", "annotator"]
    annotator: Literal["fitted", "implicit"] = "fitted"  # implicit: rewards of a weak DPO policy
    splits: tuple[Split, ...] = ("unlabelled",)
    weight_function: Literal["confidence", "one", "lower_confidence"] = "one"
    top_fraction: float | None = None
    temperature: Literal["fitted"] | None = None
    weight_normalization: Literal["none", "batch", "dataset"] = "none"
    sampling: Literal["proportional"] | None = None  # C says how often, not how much
    soft_labels: bool = False  # the annotator's probability in place of a weight


# All presets in one table. `human*` arms alone may read labels of unlabelled rows.
ARMS: dict[str, Arm] = {
    "human": Arm(labels="human"),
    "human100": Arm(labels="human", splits=("labelled", "unlabelled")),
    "labelled_only": Arm(labels="human", splits=("labelled",)),
    "ws_dpo": Arm(labels="annotator", annotator="implicit"),
    "weak": Arm(labels="annotator"),
    "cw": Arm(labels="annotator", weight_function="confidence"),
    "cw_mean": Arm(
        labels="annotator", weight_function="confidence", weight_normalization="dataset"
    ),
    "cw_calibrated": Arm(labels="annotator", weight_function="confidence", temperature="fitted"),
    "ensemble": Arm(labels="annotator", weight_function="lower_confidence"),
    "proportional": Arm(labels="annotator", weight_function="confidence", sampling="proportional"),
    "soft": Arm(labels="annotator", soft_labels=True),
    "top30": Arm(labels="annotator", top_fraction=0.3),
}
