"""What the bodies of all routes have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from ridgeline.server.errors import bad_request


@dataclass(frozen=True, slots=True)
class Accepts:
    """The settings of a field that change nothing: one of `values`, and any at all where these are None."""

    values: tuple[object, ...] | None

    def __call__(self, value: object) -> bool:
        return self.values is None or any(
            _kind(value) is _kind(each) and value == each for each in self.values
        )

    @property
    def schema(self) -> dict[str, Any]:
        return {} if self.values is None else {"enum": [*self.values, None]}


def _kind(value: object) -> type:
    """JSON has one kind of numbers, and truth values are not of it."""
    return float if type(value) is int else type(value)


anything = Accepts(None)
"""For fields that never change an answer."""


def only(*values: object) -> Accepts:
    """For fields of which we have one setting, or a few that are the same to us."""
    return Accepts(values)


def _described(schema: dict[str, Any], kind: type[BaseModel]) -> None:
    """Add to a body's description what `refuse_unsupported` lets pass: nulls, and what changes nothing."""
    assert issubclass(kind, Body)
    fields = schema.setdefault("properties", {})
    for name in fields.keys() - set(schema.get("required", ())):
        field = fields[name]
        if {"type": "null"} not in field.get("anyOf", ()):
            about = {key: field.pop(key) for key in ("title", "default") if key in field}
            fields[name] = {"anyOf": [field, {"type": "null"}], **about}
    fields.update({name: accepts.schema for name, accepts in kind.unsupported.items()})
    schema["additionalProperties"] = {"type": "null"}


class Body(BaseModel):
    """A request's body: types are strict, unknown fields refused.

    `unsupported` has the fields of other servers that we do not implement, each with the settings that change
    nothing: these pass, as null does, and every other is refused by name.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, json_schema_extra=_described
    )
    unsupported: ClassVar[Mapping[str, Accepts]] = {}

    @classmethod
    def refuse_unsupported(cls, value: dict[str, Any]) -> None:
        """Take fields that change nothing out of `value`. Raises HttpError 400 for one that would."""
        for name in [name for name in value if name in cls.unsupported]:
            given = value.pop(name)
            if given is not None and not cls.unsupported[name](given):
                raise bad_request(
                    f"field {name!r} is not supported with this value", name, "unsupported_parameter"
                )
        # A null is what a client sends for a field that it leaves alone.
        for name in [name for name, given in value.items() if given is None]:
            del value[name]
