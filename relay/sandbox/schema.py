"""Validates a batch by the published description of the API, `lucent-openapi.json` (MIT) beside this file.

Rules:
1. The description decides. There is no rule of our own here, and none of the relay's intake is used.
2. OpenAPI's `nullable: true`, which JSON Schema does not know, is translated where the description is loaded.
3. Numbers are JavaScript's: `3.0` is an integer, as JSON Schema 2020-12 has it too.
"""

from __future__ import annotations

import itertools
from importlib import resources
from typing import Any

import jsonschema_rs
import orjson

MAX_ISSUES = 20
"""Issues named in an answer; a batch of 500 bad events would otherwise be answered with 1 500."""

_ZOD_CODES = {
    "required": "invalid_type",
    "type": "invalid_type",
    "enum": "invalid_value",
    "minLength": "too_small",
    "minItems": "too_small",
    "minimum": "too_small",
}
"""JSON Schema keyword to the code that zod, upstream's validator, gives the same mistake."""


def load_description() -> dict[str, Any]:
    """Return the published OpenAPI description as it is."""
    text = resources.files("relay.sandbox").joinpath("lucent-openapi.json").read_bytes()
    description: dict[str, Any] = orjson.loads(text)
    return description


def translate_nullable(schema: Any) -> Any:
    """Return a copy in which `{"type": T, "nullable": true}` is `{"type": [T, "null"]}`, at any depth."""
    if isinstance(schema, list):
        return [translate_nullable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    translated = {name: translate_nullable(value) for name, value in schema.items()}
    if translated.pop("nullable", False) is True:
        translated["type"] = [translated["type"], "null"]
    return translated


def well_formed(value: Any) -> Any:
    """Return a copy without lone surrogates, which the validator cannot take where it has something to say of them."""
    if isinstance(value, str):
        return as_utf8(value)
    if isinstance(value, list):
        return [well_formed(item) for item in value]
    if isinstance(value, dict):
        return {as_utf8(name): well_formed(item) for name, item in value.items()}
    return value


def as_utf8(text: str) -> str:
    """Replace lone surrogates, as Node does where a string becomes UTF-8 on its way to storage."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class BatchSchema:
    """The ReplayBatch schema, compiled."""

    def __init__(self, description: dict[str, Any]) -> None:
        self._validator = jsonschema_rs.Draft202012Validator(
            {
                "$ref": "#/components/schemas/ReplayBatch",
                "components": {"schemas": translate_nullable(description["components"]["schemas"])},
            },
            # Messages shall not repeat what somebody recorded.
            mask="value",
        )

    def issues(self, batch: Any) -> list[dict[str, Any]]:
        """Return what is wrong with a batch, in zod's shape; empty where it is valid."""
        try:
            if self._validator.is_valid(batch):
                return []
        except UnicodeEncodeError:
            pass  # it came to a lone surrogate
        try:
            batch = well_formed(batch)
        except RecursionError:
            return [{"code": "custom", "path": [], "message": "Nested too deeply to say what is wrong"}]
        errors = itertools.islice(self._validator.iter_errors(batch), MAX_ISSUES)
        return [_issue(error) for error in errors]


def _issue(error: jsonschema_rs.ValidationError) -> dict[str, Any]:
    keyword = str(error.schema_path[-1])
    path = list(error.instance_path)
    if keyword == "required":
        # zod names the missing member, JSON Schema the object that lacks it.
        path.append(error.kind.as_dict()["property"])
    return {"code": _ZOD_CODES.get(keyword, "custom"), "path": path, "message": error.message}
