"""GPTQ, as AutoGPTQ and GPTQModel write it, of 2, 3, 4 and 8 bits.

Where a layer has inputs I, outputs O, bits B and groups G, its weight lies in

- qweight, int32 (I * B / 32, O): the codes of an output, one input after another;
- qzeros, int32 (G, O * B / 32): the zeros of a group, one output after another; less 1 modulo 2**B in the
  format "gptq", and as they are in "gptq_v2";
- scales, floating (G, O);
- g_idx, int32 (I): the group of each input. Without it groups follow one another.
"""

from __future__ import annotations

import re
from functools import partial

import numpy as np

from ridgeline.model.checkpoint.quantised.grid import Grid, Int16Array, Int32Array, in_order, on_grid
from ridgeline.model.checkpoint.quantised.logical import Found, Logical
from ridgeline.model.checkpoint.quantised.parts import FLOATS, Parts, unpack
from ridgeline.model.checkpoint.quantised.settings import Settings
from ridgeline.types import ByteArray, Float32Array

_BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")
# Families whose layers have biases only where their config says so. Writers of 2023 gave every quantised
# layer one, of zeros.
_WITHOUT_BIAS = ("llama", "mistral")


def read(parts: Parts, settings: Settings) -> Found:
    bits, group = settings.choice("bits", _BITS), settings.size("group_size", -1)
    key = "checkpoint_format" if settings.values.get("checkpoint_format") is not None else "format"
    offset = 1 if settings.choice(key, _FORMATS, "gptq") == "gptq" else 0
    settings.choice("pack_dtype", ("int32",), "int32")
    settings.refuse("is_marlin_format", "false")
    _refuse_overrides(settings)
    tensors, hidden = {}, set()
    for stem in parts.stems(".qweight"):
        tensors[f"{stem}.weight"] = _layer(parts, stem, bits, group, offset)
        if _has_empty_bias(parts, stem):
            hidden.add(f"{stem}.bias")
    return Found(tensors, hidden)


def _refuse_overrides(settings: Settings) -> None:
    """Entries of `dynamic` that start with "-:" only say which modules are left as they are."""
    dynamic = settings.section("dynamic")
    for pattern, changes in dynamic.values.items():
        if not pattern.startswith("-:") and changes:
            raise dynamic.error(pattern, "modules that are left out ('-:...'), the same settings for others")


def _has_empty_bias(parts: Parts, stem: str) -> bool:
    name = f"{stem}.bias"
    config = parts.metadata
    if name not in parts or config.get("model_type") not in _WITHOUT_BIAS:
        return False
    stated = config.get("attention_bias" if re.search(r"\.self_attn\.", stem) else "mlp_bias")
    if stated or len(parts.info(name).shape) != 1 or parts.info(name).storage not in FLOATS:
        return False
    return not parts.floats(name).any()


def _layer(parts: Parts, stem: str, bits: int, group: int, offset: int) -> Logical:
    codes, zeros, scales, order = (f"{stem}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
    words, outputs = parts.check(codes, ("I32",))
    inputs = words * 32 // bits
    if words * 32 % bits or outputs * bits % 32:
        parts.refuse(codes, f"whole words of {bits}-bit codes, in inputs and in outputs")
    group = inputs if group == -1 else group
    groups = -(-inputs // group)
    parts.check(zeros, ("I32",), (groups, outputs * bits // 32))
    parts.check(scales, FLOATS, (groups, outputs))
    names = [codes, zeros, scales]
    group_of = in_order(inputs, group)
    if order in parts:
        parts.check(order, ("I32",), (inputs,))
        names.append(order)
        group_of = read_order(parts, order, groups)

    def read_codes(rows: slice) -> ByteArray:
        return unpack(parts.array(codes)[:, rows].T, bits)

    grid = Grid(
        (outputs, inputs),
        bits,
        read_codes,
        partial(_scales, parts, scales),
        group_of,
        partial(_zeros, parts, zeros, bits, offset),
    )
    return on_grid(grid, tuple(names))


def read_order(parts: Parts, name: str, groups: int) -> Int32Array:
    """The group of each input. CheckpointError where there is no such group."""
    order = parts.array(name).astype(np.int32)
    if order.min() < 0 or order.max() >= groups:
        parts.refuse(name, f"groups from 0 to {groups - 1}; seen: {order.min()} to {order.max()}")
    return order


def _scales(parts: Parts, name: str) -> Float32Array:
    return np.ascontiguousarray(parts.floats(name).T)


def _zeros(parts: Parts, name: str, bits: int, offset: int) -> Int16Array:
    zeros = unpack(parts.array(name), bits).astype(np.int16) + np.int16(offset)
    return np.ascontiguousarray((zeros & np.int16((1 << bits) - 1)).T)
