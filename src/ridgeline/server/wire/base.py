"""What the bodies of all routes have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from ridgeline.server.errors import bad_request

Accepts = Callable[[Any], bool]


def anything(value: object) -> bool:
    """For fields that never change an answer."""
    return True


def only(*values: object) -> Accepts:
    """For fields of which we have one setting, or a few that are the same to us."""
    return lambda value: any(type(value) is type(each) and value == each for each in values)


def number(expected: float) -> Accepts:
    """For a number that switches a feature off."""
    return lambda value: type(value) in (int, float) and value == expected


class Body(BaseModel):
    """A request's body: types are strict, unknown fields refused.

    `unsupported` has the fields of other servers that we do not implement, each with the settings that change
    nothing: these pass, as null does, and every other is refused by name.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)
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
