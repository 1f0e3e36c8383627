"""Number formats by their unambiguous names: `W4A8-g32` is 4-bit weights, 8-bit activations, groups of 32."""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.types import ConfigError


@dataclass(frozen=True, slots=True)
class Format:
    """How a linear layer holds its weights and takes its activations.

    `group` is the number of neighbouring values of a row that share a scale, 0 where there are no scales.
    Weights of 4 bits also have a minimum for each group; all other quantised values are symmetric.
    """

    name: str
    weight_bits: int
    activation_bits: int
    group: int

    @property
    def quantises_activations(self) -> bool:
        return self.activation_bits < 32


FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format("W4A8-g32", 4, 8, 32),
        Format("W8A8-g32", 8, 8, 32),
        Format("W32A32", 32, 32, 0),
    )
}


def parse_format(name: str) -> Format:
    """The format of that name. Raises ConfigError, with the names that are accepted."""
    fmt = FORMATS.get(name)
    if fmt is None:
        raise ConfigError(f"number format is {name!r}; accepted: {', '.join(FORMATS)}")
    return fmt
