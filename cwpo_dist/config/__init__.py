"""What a run is told: one typed, frozen section a stage, each field with its default."""

from cwpo_dist.config.base import ConfigError, Fraction, PositiveFloat, PositiveInt, Section, Split
from cwpo_dist.config.config import (
    ARMS,
    TRAINING,
    Arm,
    AskTrials,
    CompareConfig,
    Config,
    Grid,
    Strategies,
    WeighConfig,
    WeighPairing,
)
from cwpo_dist.config.data import LabelColumn, Pairing, PrepareConfig, Source
from cwpo_dist.config.models import TEMPLATE_DATE, LoraConfig, ModelConfig
from cwpo_dist.config.pairwise import AlignConfig, FitConfig, PairsConfig
from cwpo_dist.config.scoring import (
    AnnotateConfig,
    Engine,
    EvaluateConfig,
    Pool,
    PoolConfig,
    ReferenceConfig,
)
from cwpo_dist.config.training import BatchBy, SftConfig, Tracker, TrainingConfig

__all__ = [
    "ARMS",
    "TEMPLATE_DATE",
    "TRAINING",
    "AlignConfig",
    "AnnotateConfig",
    "Arm",
    "AskTrials",
    "BatchBy",
    "CompareConfig",
    "Config",
    "ConfigError",
    "Engine",
    "EvaluateConfig",
    "FitConfig",
    "Fraction",
    "Grid",
    "LabelColumn",
    "LoraConfig",
    "ModelConfig",
    "Pairing",
    "PairsConfig",
    "Pool",
    "PoolConfig",
    "PositiveFloat",
    "PositiveInt",
    "PrepareConfig",
    "ReferenceConfig",
    "Section",
    "SftConfig",
    "Source",
    "Split",
    "Strategies",
    "Tracker",
    "TrainingConfig",
    "WeighConfig",
    "WeighPairing",
]
