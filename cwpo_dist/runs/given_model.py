"""A model that the configuration names, as it is now; what the keys of its readers know of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cwpo_dist.canonical import digest
from cwpo_dist.config import ModelConfig
from cwpo_dist.file_marks import Mark
from cwpo_dist.lm.fingerprints import model_fingerprint, of_tokenizer

# Tokens depend on the tokenizer, not on weights, depth or attention implementation.
_OF_TOKENS = {"model_name_or_path", "revision", "chat_template", "template_date"}
_OF_TOKENS |= {"max_length", "over_length"}


@dataclass(frozen=True)
class GivenModel:
    """One model.

    Attributes:
        field: that names it: `weak`, `policy`, `annotate.model`, …
        config: how it is read.
        template: the name of its chat template, or the digest of its file: moved it is the same,
            edited it is another.
        now: marks of its files, or its commit.
    """

    field: str
    config: ModelConfig
    template: str
    now: list[Mark]

    @classmethod
    def of(cls, field: str, config: ModelConfig) -> GivenModel:
        """The model as it is now.

        Raises:
            ModelError: for a model that is not there.
        """
        return cls(field, config, _template(config), model_fingerprint(config))

    def identity(self) -> dict[str, object]:
        """What decides its numbers."""
        model = self.config.identity() | {"chat_template": self.template}
        return {"model": model, "model_now": self.now}

    def token_identity(self) -> dict[str, object]:
        """What decides the tokens that it makes of texts."""
        model = self.config.model_dump(mode="json", include=_OF_TOKENS)
        return model | {"chat_template": self.template, "tokenizer_now": of_tokenizer(self.now)}


def _template(model: ModelConfig) -> str:
    if model.chat_template in {"tokenizer", "plain"}:
        return model.chat_template
    return digest(Path(model.chat_template).read_text(encoding="utf-8"))
