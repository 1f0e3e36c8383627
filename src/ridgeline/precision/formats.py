"""Number formats by their unambiguous names: `W4A8-g32` is 4-bit weights, 8-bit activations, groups of 32.

Some can be chosen, and weights are quantised to them. The others are what weights of files are in, where a
device runs these as they are.

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
    How a group's codes become values is its storage's matter: a format has several of them.
    """

    name: str
    weight_bits: int
    activation_bits: int
    group: int


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
"""The formats that can be chosen: our quantiser writes them."""

FILE_FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format("W2A8-g16", 2, 8, 16),
        Format("W2A8-g256", 2, 8, 256),
        Format("W3A8-g16", 3, 8, 16),
        Format("W5A8-g32", 5, 8, 32),
        Format("W6A8-g16", 6, 8, 16),
    )
}
"""The formats that only weights of files have, which run as they are."""

# By the bits of the weights: the storages that every device runs as they are; our own quantiser's first.
_COMMON = {4: ("Q4_1", "Q4_0"), 8: ("Q8_0",), 16: ("BF16",), 32: ("F32",)}
# And what integer kernels for each of them run besides.
_PACKED = {
    "W4A8-g32": ("Q4_K", "IQ4_NL", "IQ4_XS", "MXFP4"),
    "W2A8-g16": ("Q2_K",),
    "W2A8-g256": ("TQ1_0", "TQ2_0"),
    "W3A8-g16": ("Q3_K",),
    "W5A8-g32": ("Q5_0", "Q5_1", "Q5_K"),
    "W6A8-g16": ("Q6_K",),
}


def native_storages(fmt: Format, device: str) -> tuple[str, ...]:
    """The storages whose tensors run in this format as they are on a device.

    The reference, which decodes everything, takes what a CPU takes.
    """
    packed = () if device == "cuda" else _PACKED.get(fmt.name, ())
    return _COMMON.get(fmt.weight_bits, ()) + packed


def encoded_storage(fmt: Format) -> str:
    """The storage that our quantiser writes for a format. Raises ValueError for one of FILE_FORMATS."""
    if fmt.name not in FORMATS:
        raise ValueError(f"nothing is quantised to {fmt.name}; accepted: {', '.join(FORMATS)}")
    return _COMMON[fmt.weight_bits][0]


def parse_format(name: str) -> Format:
    """The format of that name, of those that can be chosen. Raises ConfigError, with their names."""
    fmt = FORMATS.get(name)
    if fmt is None:
        raise ConfigError(f"number format is {name!r}; accepted: {', '.join(FORMATS)}")
    return fmt


DEVICE_FORMATS: dict[str, tuple[str, ...]] = {
    "cpu": ("W4A8-g32", "W8A8-g32", "W16A16", "W32A32"),
    "cuda": tuple(FORMATS),
    "reference": tuple(FORMATS),
}
"""The formats that can be chosen for each device."""

# For each storage, what a CPU and a GPU run it in. A GPU has kernels for few of them; the others take the
# nearest format that loses next to nothing: 8 bits, since 4 bits of another grid would round a second time.
_AUTO = {
    "F32": ("W8A8-g32", "W16A16"),
    "F16": ("W8A8-g32", "W16A16"),
    "BF16": ("W8A8-g32", "W16A16"),
    "Q8_0": ("W8A8-g32", "W8A16-g32"),
    "Q4_0": ("W4A8-g32", "W4A16-g32"),
    "Q4_1": ("W4A8-g32", "W4A16-g32"),
    "Q5_0": ("W5A8-g32", "W8A16-g32"),
    "Q5_1": ("W5A8-g32", "W8A16-g32"),
    "Q2_K": ("W2A8-g16", "W8A16-g32"),
    "Q3_K": ("W3A8-g16", "W8A16-g32"),
    "Q4_K": ("W4A8-g32", "W8A16-g32"),
    "Q5_K": ("W5A8-g32", "W8A16-g32"),
    "Q6_K": ("W6A8-g16", "W8A16-g32"),
    "IQ4_NL": ("W4A8-g32", "W8A16-g32"),
    "IQ4_XS": ("W4A8-g32", "W8A16-g32"),
    "MXFP4": ("W4A8-g32", "W8A16-g32"),
    "TQ1_0": ("W2A8-g256", "W8A16-g32"),
    "TQ2_0": ("W2A8-g256", "W8A16-g32"),
}


def auto_format(storage: str, device: str, decoded: bool = False) -> Format:
    """The format in which a device runs a weight of some storage when nobody chose one.

    A weight that is `decoded` on its way, because its values change or it is transposed, has codes no more,
    and on a CPU takes 8 bits. A CPU multiplies 8-bit integers fastest, and a GPU has arithmetic to spare
    beside its memory, which it spends on activations of 16 bits. A storage that is not read, which loading
    refuses, counts as unquantised.
    """
    on_cpu, on_gpu = _AUTO.get(storage, _AUTO["F32"])
    if device == "cuda":
        return FORMATS[on_gpu]
    return FORMATS["W8A8-g32"] if decoded else (FORMATS | FILE_FORMATS)[on_cpu]


def check_device_format(name: str, device: str) -> None:
    """Raise ConfigError unless `device` runs the format of that name, or the name is "auto"."""
    accepted = DEVICE_FORMATS[device]
    if name != "auto" and name not in accepted:
        raise ConfigError(f"weights is {name!r}; accepted on {device}: auto, {', '.join(accepted)}")
