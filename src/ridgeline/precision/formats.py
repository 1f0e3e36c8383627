"""Number formats by their unambiguous names: `W4A8-g32` is 4-bit weights, 8-bit activations, groups of 32.

Activations of 8 bits are A8-g32, of 16 bits bfloat16, of 32 bits float32. With activations of 16 bits the
weights are multiplied as bfloat16 too: a value that codes and scales stand for is rounded once more.
"""

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
    def storages(self) -> tuple[str, ...]:
        """The storages whose tensors run in this format as they are; the first is our own quantiser's."""
        return _STORAGES[self.weight_bits]


_STORAGES = {4: ("Q4_1", "Q4_0"), 8: ("Q8_0",), 16: ("BF16",), 32: ("F32",)}


FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format("W4A8-g32", 4, 8, 32),
        Format("W8A8-g32", 8, 8, 32),
        Format("W4A16-g32", 4, 16, 32),
        Format("W8A16-g32", 8, 16, 32),
        Format("W16A16", 16, 16, 0),
        Format("W32A32", 32, 32, 0),
    )
}


def parse_format(name: str) -> Format:
    """The format of that name. Raises ConfigError, with the names that are accepted."""
    fmt = FORMATS.get(name)
    if fmt is None:
        raise ConfigError(f"number format is {name!r}; accepted: {', '.join(FORMATS)}")
    return fmt


DEVICE_FORMATS: dict[str, tuple[str, ...]] = {
    "cpu": ("W4A8-g32", "W8A8-g32", "W16A16", "W32A32"),
    "cuda": tuple(FORMATS),
    "reference": tuple(FORMATS),
}
"""The formats that each device runs."""

# For each storage, what a CPU and a GPU run it in. Where no format has its codes, that is the nearest one
# that loses next to nothing: 8 bits, since 4 bits of another grid would round a second time.
_AUTO = {
    "F32": ("W8A8-g32", "W16A16"),
    "F16": ("W8A8-g32", "W16A16"),
    "BF16": ("W8A8-g32", "W16A16"),
    "Q8_0": ("W8A8-g32", "W8A16-g32"),
    "Q4_0": ("W4A8-g32", "W4A16-g32"),
    "Q4_1": ("W4A8-g32", "W4A16-g32"),
    "Q5_0": ("W8A8-g32", "W8A16-g32"),
    "Q5_1": ("W8A8-g32", "W8A16-g32"),
    "Q2_K": ("W8A8-g32", "W8A16-g32"),
    "Q3_K": ("W8A8-g32", "W8A16-g32"),
    "Q4_K": ("W8A8-g32", "W8A16-g32"),
    "Q5_K": ("W8A8-g32", "W8A16-g32"),
    "Q6_K": ("W8A8-g32", "W8A16-g32"),
    "IQ4_NL": ("W8A8-g32", "W8A16-g32"),
    "IQ4_XS": ("W8A8-g32", "W8A16-g32"),
    "MXFP4": ("W8A8-g32", "W8A16-g32"),
    "TQ1_0": ("W8A8-g32", "W8A16-g32"),
    "TQ2_0": ("W8A8-g32", "W8A16-g32"),
}


def auto_format(storage: str, device: str) -> Format:
    """The format in which a device runs a weight of some storage when nobody chose one.

    Weights of 4 and 8 bits whose codes a format has keep them; other quantised ones take 8 bits. A CPU
    multiplies 8-bit integers fastest, and a GPU has arithmetic to spare beside its memory, which it spends
    on activations of 16 bits. A storage that is not read, which loading refuses, counts as unquantised.
    """
    on_cpu, on_gpu = _AUTO.get(storage, _AUTO["F32"])
    return FORMATS[on_gpu if device == "cuda" else on_cpu]


def check_device_format(name: str, device: str) -> None:
    """Raise ConfigError unless `device` runs the format of that name, or the name is "auto"."""
    accepted = DEVICE_FORMATS[device]
    if name != "auto" and name not in accepted:
        raise ConfigError(f"weights is {name!r}; accepted on {device}: auto, {', '.join(accepted)}")
