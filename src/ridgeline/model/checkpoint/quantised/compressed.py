"""compressed-tensors, as llm-compressor writes it: whole codes packed or in int8, and FP8.

- "pack-quantized", 4 or 8 bits: weight_packed, int32 (outputs, inputs * bits / 32, rounded up), with one code
  after another; weight_shape, the two sizes; weight_scale; where it is not symmetric weight_zero_point,
  packed in the same way along the outputs, (outputs * bits / 32, groups); weight_g_idx, the group of each
  input, where they are not in order. Packed codes and zeros are those of int8 plus half of their range.
- "int-quantized" and "naive-quantized": weight, int8; weight_scale; weight_zero_point, int8.
- "float-quantized" and "naive-quantized" of 8 bits: weight, FP8; weight_scale.

Scales are one for the tensor, (outputs, 1) for the strategy "channel", (outputs, groups) for "group", and for
FP8 also one for each block of `block_structure`. Scales of activations and of the KV cache are hidden: both
are quantised as ours always are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ridgeline.model.checkpoint.quantised.floats import STORAGE as FLOAT8
from ridgeline.model.checkpoint.quantised.floats import activation_scales, scaled_floats
from ridgeline.model.checkpoint.quantised.gptq import read_order
from ridgeline.model.checkpoint.quantised.grid import Grid, Int16Array, in_order, on_grid
from ridgeline.model.checkpoint.quantised.logical import Found, Logical
from ridgeline.model.checkpoint.quantised.parts import FLOATS, Parts, unpack
from ridgeline.model.checkpoint.quantised.settings import Settings
from ridgeline.types import ByteArray, Float32Array

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True, slots=True)
class _Scheme:
    """What the settings say about all quantised weights. `group` is -1 for whole rows."""

    format: str
    bits: int
    kind: str
    strategy: str
    group: int
    block: tuple[int, int] | None


def read(parts: Parts, settings: Settings) -> Found:
    sparsity = settings.section("sparsity_config")
    sparsity.choice("format", ("dense",), "dense")
    transforms = settings.section("transform_config")
    transforms.refuse("config_groups", "no transforms")
    scheme = _scheme(settings)
    if scheme is None:
        return Found({}, activation_scales(parts))
    if scheme.format == "pack-quantized":
        stems = parts.stems(".weight_packed")
        tensors = {f"{stem}.weight": _packed(parts, stem, scheme) for stem in stems}
        return Found(tensors, activation_scales(parts))
    storage, layer = (FLOAT8, _float8) if scheme.kind == "float" else ("I8", _int8)
    tensors, hidden = {}, activation_scales(parts)
    for stem in parts.stems(".weight"):
        if parts.info(f"{stem}.weight").storage == storage:
            tensors[f"{stem}.weight"] = layer(parts, stem, scheme)
            if scheme.kind == "float":
                hidden |= {f"{stem}.weight_zero_point"}  # of zeros: FP8 is symmetric
    return Found(tensors, hidden)


def _scheme(settings: Settings) -> _Scheme | None:
    """What all groups of layers have in common; groups that differ are refused.

    None where no weights are quantised, but the KV cache or activations.
    """
    section = settings.section("config_groups")
    groups = [section.section(name) for name in section.values]
    if not groups and not settings.values.get("kv_cache_scheme"):
        raise settings.error("config_groups", "at least one group of layers")
    schemes = [_scheme_of(settings, group) for group in groups if group.values.get("weights") is not None]
    if not schemes:
        return None
    if any(scheme != schemes[0] for scheme in schemes):
        raise settings.error("config_groups", "groups of layers whose weights are quantised alike")
    return schemes[0]


def _scheme_of(settings: Settings, group: Settings) -> _Scheme:
    holder = group if settings.values.get("format") == "mixed-precision" else settings
    layout = holder.choice("format", _FORMATS)
    weights = group.section("weights")
    kind = weights.choice("type", ("float",) if layout == "float-quantized" else ("int", "float"), "int")
    if layout in ("pack-quantized", "int-quantized") and kind == "float":
        raise weights.error("type", f"int for {layout}")
    packed = layout == "pack-quantized"
    bits = weights.choice("num_bits", (4, 8) if packed or kind == "int" else (8,), 8)
    size = -1 if weights.values.get("group_size") is None else weights.size("group_size")
    strategies = ("tensor", "channel", "group", *(("block",) if kind == "float" else ()))
    default = "group" if size > 0 else "channel" if weights.values.get("group_size") else "tensor"
    strategy = weights.choice("strategy", strategies, default)
    block = weights.block("block_structure")
    if (strategy == "group" and size < 1) or (strategy == "block" and block is None):
        key = "group_size" if strategy == "group" else "block_structure"
        raise weights.error(key, f"a size, for the strategy {strategy}")
    return _Scheme(
        layout,
        bits,
        kind,
        strategy,
        size if strategy == "group" else -1,
        block if strategy == "block" else None,
    )


def _float8(parts: Parts, stem: str, scheme: _Scheme) -> Logical:
    block = (1, scheme.group) if scheme.strategy == "group" else scheme.block
    return scaled_floats(parts, f"{stem}.weight", f"{stem}.weight_scale", block)


def _packed(parts: Parts, stem: str, scheme: _Scheme) -> Logical:
    codes, shape, order = (f"{stem}.weight_{part}" for part in ("packed", "shape", "g_idx"))
    bits = scheme.bits
    outputs, words = parts.check(codes, ("I32",))
    parts.check(shape, ("I64", "I32"), (2,))
    stated = parts.array(shape).tolist()
    inputs = int(stated[1])
    if stated[0] != outputs or inputs < 1 or -(-inputs * bits // 32) != words:
        parts.refuse(codes, f"the {bits}-bit codes of {shape!r}, {stated}")
    groups = _group_count(inputs, scheme)
    names, zeros = [codes, shape], None
    zero = f"{stem}.weight_zero_point"
    if zero in parts:
        parts.check(zero, ("I32",), (-(-outputs * bits // 32), groups))
        names.append(zero)
        zeros = partial(_packed_zeros, parts, zero, bits, outputs)
    group_of = in_order(inputs, scheme.group if scheme.group > 0 else inputs)
    if order in parts:
        parts.check(order, ("I32",), (inputs,))
        names.append(order)
        group_of = read_order(parts, order, groups)

    def read_codes(rows: slice) -> ByteArray:
        return unpack(parts.array(codes)[rows], bits)[:, :inputs]

    scales = _scales_of(parts, stem, outputs, groups, names)
    return on_grid(Grid((outputs, inputs), bits, read_codes, scales, group_of, zeros), tuple(names))


def _int8(parts: Parts, stem: str, scheme: _Scheme) -> Logical:
    codes, zero = f"{stem}.weight", f"{stem}.weight_zero_point"
    outputs, inputs = shape = parts.check(codes, ("I8",))
    groups = _group_count(inputs, scheme)
    names, zeros = [codes], None
    if zero in parts:
        parts.check(zero, ("I8",), (outputs, groups), *_short(outputs, groups))
        names.append(zero)
        zeros = partial(_int8_zeros, parts, zero, outputs, groups)

    def read_codes(rows: slice) -> ByteArray:
        return offset_codes(parts, codes, rows)

    scales = _scales_of(parts, stem, outputs, groups, names)
    group_of = in_order(inputs, scheme.group if scheme.group > 0 else inputs)
    return on_grid(Grid((shape[0], shape[1]), 8, read_codes, scales, group_of, zeros), tuple(names))


def offset_codes(parts: Parts, name: str, rows: slice) -> ByteArray:
    """Codes of int8 plus 128."""
    codes: ByteArray = parts.array(name)[rows].view(np.uint8) ^ np.uint8(128)
    return codes


def _group_count(inputs: int, scheme: _Scheme) -> int:
    return -(-inputs // scheme.group) if scheme.group > 0 else 1


def _short(outputs: int, groups: int) -> tuple[tuple[int, ...], ...]:
    """Other shapes of what stands once for each output, or once for the tensor."""
    return ((outputs,), (1,), (1, 1), ()) if groups == 1 else ()


def _scales_of(
    parts: Parts, stem: str, outputs: int, groups: int, names: list[str]
) -> Callable[[], Float32Array]:
    """Checks the scales and adds them to `names`; the function gives float32 (outputs, groups)."""
    name = f"{stem}.weight_scale"
    parts.check(name, FLOATS, (outputs, groups), *_short(outputs, groups))
    names.append(name)

    def read_scales() -> Float32Array:
        return np.broadcast_to(parts.floats(name).reshape(-1, groups), (outputs, groups))

    return read_scales


def _packed_zeros(parts: Parts, name: str, bits: int, outputs: int) -> Int16Array:
    return unpack(parts.array(name).T, bits)[:, :outputs].T.astype(np.int16)


def _int8_zeros(parts: Parts, name: str, outputs: int, groups: int) -> Int16Array:
    zeros = parts.array(name).astype(np.int16) + np.int16(128)
    return np.broadcast_to(zeros.reshape(-1, groups), (outputs, groups))
