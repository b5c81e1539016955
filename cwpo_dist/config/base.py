"""What all sections share: their base class, the types of fields, and how they are refused."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, ClassVar, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cwpo_dist.redaction import REMEDY, first_credential, redacted

Split = Literal["labelled", "unlabelled", "validation", "test"]


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]  # as torch and Arrow hold them


Seed = Annotated[int, Field(ge=0, lt=2**32)]  # as all generators of torch and NumPy take them


PositiveFloat = Annotated[float, Field(gt=0.0)]


Epochs = Annotated[
    float,
    Field(
        gt=0.0,
        le=1e6,
        description="passes over the training rows, a part of one also; max_steps goes first",
    ),
]


Place = Annotated[str, Field(min_length=1)]  # a path, URI or id: "" would be where we are


class ConfigError(ValueError):
    """A configuration that cannot run; the message names field, value and remedy.

    What a library says in it may repeat a signed URL: it is told without.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


def _kinds(annotation: object) -> set[object]:
    """The types that a field may be of: those of a union, and what `Annotated` is about."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return {kind for each in get_args(annotation) for kind in _kinds(each)}
    return {origin or annotation}


class Section(BaseModel):
    """Base of all sections: unknown keys are refused and values never change."""

    # What pydantic says of a fault is what it was given: that could be a credential.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    # Fields that say how or where work is done, not what comes out: they stay out of content keys.
    compute_fields: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _no_credentials(cls, given: object) -> object:
        """Before any fault is told: a message would repeat what it was given."""
        place = first_credential(given)
        if place is not None:
            raise ValueError(f"{place}: {REMEDY}")
        return given

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, given: object, field: ValidationInfo) -> object:
        """`beta: yes` would be 1.0."""
        kinds = _kinds(cls.model_fields[str(field.field_name)].annotation)
        if isinstance(given, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("give a number")
        return given

    def identity(self) -> dict[str, object]:
        """The settings that decide a stage's output, ready to be hashed into its key."""
        return self.model_dump(mode="json", exclude=set(self.compute_fields))


def section_in(annotation: object) -> type[Section] | None:
    """The section that a field holds, also in a list or beside None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    found = (section_in(inner) for inner in get_args(annotation))
    return next((section for section in found if section is not None), None)
