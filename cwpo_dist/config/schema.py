"""The configuration's models in; the JSON Schema of a configuration file out, for editors."""

from __future__ import annotations

import json

from pydantic.json_schema import GenerateJsonSchema

from cwpo_dist.config import Config


class _Untitled(GenerateJsonSchema):
    """Without a title a field, which would only be its name again."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False


def schema() -> str:
    """JSON text.

    No field is required there, though a whole configuration needs some: a file may be a part that
    is laid over others, or leave a field to an override.
    """
    described = Config.model_json_schema(schema_generator=_Untitled)
    for section in (described, *described["$defs"].values()):
        section.pop("required", None)
    draft = {"$schema": _Untitled.schema_dialect}
    return json.dumps(draft | described, indent=1, ensure_ascii=False) + "\n"
