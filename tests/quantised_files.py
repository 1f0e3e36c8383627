"""Tiny quantised safetensors folders, packed here from what is published about each layout.

Packing is by the definition and nothing else: a row of codes is one large integer whose digits they are. So
it shares no arithmetic with the readers, which shift and mask.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# The quantiles of the normal distribution that the QLoRA paper (appendix E) lists.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Tensors = dict[str, torch.Tensor]


@dataclass
class Packed:
    """The parts of one weight by what follows the module's name, and the values they stand for."""

    parts: Tensors
    values: np.ndarray


@dataclass
class Scheme:
    """How to pack a matrix, and what config.json says about it. `exact`: we keep every bit of its values."""

    settings: dict[str, Any]
    pack: Callable[[np.ndarray], Packed]
    storage: str = "Q4_0"
    exact: bool = True
    more: Tensors = field(default_factory=dict)


def digits(rows: np.ndarray, bits: int) -> torch.Tensor:
    """(rows, codes) to int32 (rows, words): the codes of a row as the digits of one little-endian number."""
    words = -(-rows.shape[1] * bits // 32)
    numbers = (sum(int(code) << bits * i for i, code in enumerate(row)) for row in rows)
    raw = b"".join(number.to_bytes(words * 4, "little") for number in numbers)
    return torch.from_numpy(np.frombuffer(raw, "<i4").reshape(len(rows), words).copy())


def half(values: np.ndarray, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(dtype)


@dataclass
class Rounded:
    """A matrix on a grid: codes from 0 (outputs, inputs), zeros and scales (outputs, groups)."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: torch.Tensor
    group_of: np.ndarray

    @property
    def values(self) -> np.ndarray:
        scales = self.scales.float().numpy().astype(np.float64)
        return (self.codes - self.zeros[:, self.group_of]) * scales[:, self.group_of]


def rounded(
    weight: np.ndarray,
    bits: int,
    group: int,
    symmetric: bool,
    order: np.ndarray | None = None,
    dtype: torch.dtype = torch.float16,
) -> Rounded:
    """`weight` rounded to the nearest codes; `order` is the group of each input where they are shuffled."""
    inputs = weight.shape[1]
    group_of = np.arange(inputs) // (inputs if group == -1 else group) if order is None else order
    top, groups = (1 << bits) - 1, int(group_of.max()) + 1
    scales, zeros = np.empty((len(weight), groups)), np.full((len(weight), groups), 1 << (bits - 1))
    for one in range(groups):
        part = weight[:, group_of == one].astype(np.float64)
        if symmetric:
            scales[:, one] = np.abs(part).max(1) / ((top - 1) / 2)
            continue
        low, high = np.minimum(part.min(1), -1e-3), np.maximum(part.max(1), 1e-3)
        scales[:, one] = (high - low) / top
        zeros[:, one] = np.clip(np.rint(-low / scales[:, one]), 1, top)
    held = half(scales, dtype)
    by_input = held.double().numpy()[:, group_of]
    codes = np.clip(np.rint(weight / by_input) + zeros[:, group_of], 0, top).astype(int)
    return Rounded(codes, zeros, held, group_of)


# ------------------------------------------------------------------------------------------ schemes


def gptq(
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    version: str | None = None,
    dtype: torch.dtype = torch.float16,
    **expected: Any,
) -> Scheme:
    def pack(weight: np.ndarray) -> Packed:
        inputs = weight.shape[1]
        size = inputs if group == -1 else group
        order = np.random.default_rng(7).permutation(inputs) // size if act_order else None
        on = rounded(weight, bits, group, symmetric, order, dtype)
        stored = on.zeros if version == "gptq_v2" else on.zeros - 1
        parts = {
            "qweight": digits(on.codes, bits).T,
            "qzeros": digits(stored.T, bits),
            "scales": on.scales.T,
            "g_idx": torch.from_numpy(on.group_of.astype(np.int32)),
        }
        return Packed(parts, on.values)

    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order}
    settings |= {"sym": symmetric, **({"checkpoint_format": version} if version else {})}
    return Scheme(settings, pack, **expected)


def awq(group: int = 32, symmetric: bool = False, **expected: Any) -> Scheme:
    def words(codes: np.ndarray) -> torch.Tensor:
        ordered = codes.T.reshape(codes.shape[1], -1, 8)[..., AWQ_ORDER]
        return digits(ordered.reshape(codes.shape[1], -1), 4)

    def pack(weight: np.ndarray) -> Packed:
        on = rounded(weight, 4, group, symmetric)
        parts = {"qweight": words(on.codes), "qzeros": words(on.zeros), "scales": on.scales.T}
        return Packed(parts, on.values)

    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Scheme(settings, pack, **expected)


def compressed(
    layout: str, weights: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16, **expected: Any
) -> Scheme:
    """Whole codes: `weights` are the arguments of the group of layers."""
    bits, symmetric = weights["num_bits"], weights.get("symmetric", True)
    strategy, group = weights["strategy"], weights.get("group_size", -1)

    def pack(weight: np.ndarray) -> Packed:
        on = rounded(weight, bits, group, symmetric, dtype=dtype)
        middle = 1 << (bits - 1)
        parts = {"weight_scale": on.scales}
        if strategy == "tensor":
            parts["weight_scale"] = on.scales = on.scales.max().reshape(1, 1).expand(len(weight), 1)
            codes = np.rint(weight / on.scales.double().numpy()) + middle
            on.codes = np.clip(codes, 0, 2 * middle - 1).astype(int)
            parts["weight_scale"] = on.scales[:1, 0]
        if layout == "pack-quantized":
            parts["weight_packed"] = digits(on.codes, bits)
            parts["weight_shape"] = torch.tensor(weight.shape)
            if not symmetric:
                parts["weight_zero_point"] = digits(on.zeros.T, bits).T
        else:
            parts["weight"] = torch.from_numpy((on.codes - middle).astype(np.int8))
            if not symmetric:
                parts["weight_zero_point"] = torch.from_numpy((on.zeros - middle).astype(np.int8))
        return Packed(parts, on.values)

    return Scheme(compressed_settings(layout, {"type": "int", **weights}), pack, **expected)


def compressed_settings(layout: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def float8(
    settings: Mapping[str, Any],
    block: tuple[int, int] | None,
    scale_name: str,
    scale_shape: Callable[[int], tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.float32,
    **expected: Any,
) -> Scheme:
    """`block` None and `scale_shape` for one scale of the tensor; (1, 0) for one of each output."""

    def pack(weight: np.ndarray) -> Packed:
        rows, cols = weight.shape
        high, wide = (rows, cols) if block is None else (block[0], block[1] or cols)
        scales = np.empty((-(-rows // high), -(-cols // wide)), np.float32)
        for i, j in np.ndindex(scales.shape):
            scales[i, j] = np.abs(weight[i * high : (i + 1) * high, j * wide : (j + 1) * wide]).max() / 448
        held = half(scales, dtype)
        by_value = np.kron(held.float().numpy(), np.ones((high, wide), np.float32))[:rows, :cols]
        codes = torch.from_numpy(weight / by_value).clamp(-448, 448).to(torch.float8_e4m3fn)
        shape = scale_shape(rows) if scale_shape else scales.shape
        values = codes.float().numpy() * by_value
        return Packed({"weight": codes, scale_name: held.reshape(shape)}, values)

    more = {"input_scale": torch.tensor(0.5), "k_scale": torch.tensor([0.25])}
    return Scheme(dict(settings), pack, **{"storage": "F32", "more": more, **expected})


def nf4(double: bool, blocksize: int = 64, kind: str = "nf4", **expected: Any) -> Scheme:
    def pack(weight: np.ndarray) -> Packed:
        flat = weight.reshape(-1).astype(np.float64)
        blocks = -(-flat.size // blocksize)
        padded = np.pad(flat, (0, blocks * blocksize - flat.size)).reshape(blocks, blocksize)
        absmax = np.abs(padded).max(1).astype(np.float32)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": blocksize, "dtype": "float32"}
        state["shape"] = list(weight.shape)
        parts = {"weight.quant_map": half(np.array(NF4), torch.float32)}
        if double:
            offset, nested, table = float(absmax.mean()), 16, np.linspace(-1, 1, 256).astype(np.float32)
            outer = np.array(
                [np.abs(absmax[at : at + nested] - offset).max() for at in range(0, blocks, nested)]
            )
            outer = outer.astype(np.float32)
            each = np.repeat(outer, nested)[:blocks]
            codes = np.abs(table - ((absmax - offset) / each)[:, None]).argmin(1).astype(np.uint8)
            absmax = table[codes] * each + np.float32(offset)
            state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": offset}
            parts["weight.absmax"] = torch.from_numpy(codes)
            parts["weight.nested_absmax"] = torch.from_numpy(outer)
            parts["weight.nested_quant_map"] = torch.from_numpy(table)
        else:
            parts["weight.absmax"] = torch.from_numpy(absmax)
        table4 = np.array(NF4, np.float32)
        codes = np.abs(table4 - (padded / absmax[:, None])[..., None]).argmin(2).reshape(-1)[: flat.size]
        values = table4[codes] * np.repeat(absmax, blocksize)[: flat.size]
        pairs = [*codes.tolist(), 0][: flat.size + flat.size % 2]
        raw = bytes(16 * first + second for first, second in zip(pairs[::2], pairs[1::2], strict=True))
        parts["weight"] = torch.tensor(list(raw), dtype=torch.uint8).reshape(-1, 1)
        text = json.dumps(state).encode()
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
        return Packed(parts, values.reshape(weight.shape))

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return Scheme(settings, pack, **{"storage": "F32", **expected})


def int8(**expected: Any) -> Scheme:
    def pack(weight: np.ndarray) -> Packed:
        most = np.abs(weight).max(1).astype(np.float32)
        codes = np.rint(weight * (127 / most[:, None])).astype(np.int8)
        parts = {
            "weight": torch.from_numpy(codes),
            "SCB": torch.from_numpy(most),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }
        return Packed(parts, codes * (most / 127)[:, None])

    return Scheme({"quant_method": "bitsandbytes", "load_in_8bit": True}, pack, **expected)


def mxfp4_experts(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[Tensors, np.ndarray]:
    """Blocks and scales of experts (experts, outputs, inputs), and their values."""
    experts, outputs, inputs = shape
    codes = rng.integers(0, 16, shape)
    exponents = rng.integers(110, 140, (experts, outputs, inputs // 32))
    signed = np.array([*E2M1, *(-value for value in E2M1)])
    values = signed[codes] * np.repeat(2.0 ** (exponents - 127.0), 32, axis=2)
    pairs = (codes[..., ::2] + 16 * codes[..., 1::2]).reshape(experts, outputs, inputs // 32, 16)
    blocks = {"blocks": torch.from_numpy(pairs.astype(np.uint8))}
    return {**blocks, "scales": torch.from_numpy(exponents.astype(np.uint8))}, values


# ------------------------------------------------------------------------------------------ folders


def write(folder: Path, tensors: Tensors, settings: Mapping[str, Any] | None, **config: Any) -> Path:
    """A folder of `tensors` whose config.json has `settings` as its quantization_config."""
    folder.mkdir(exist_ok=True)
    whole = {"model_type": "llama", **config}
    if settings is not None:
        whole["quantization_config"] = dict(settings)
    (folder / "config.json").write_text(json.dumps(whole))
    save_file(
        {name: value.contiguous().clone() for name, value in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def parts_of(scheme: Scheme, weight: np.ndarray, module: str = "layer") -> tuple[Tensors, np.ndarray]:
    packed = scheme.pack(weight)
    parts = {**packed.parts, **scheme.more}
    return {f"{module}.{part}": value for part, value in parts.items()}, packed.values


def write_models(source: Path, folder: Path, scheme: Scheme) -> tuple[Path, Path]:
    """A model with its linear layers quantised, and another with what they stand for in float32."""
    config = json.loads((source / "config.json").read_text())
    quantised: Tensors = {}
    plain: Tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if "_proj.weight" not in name:
            quantised[name] = plain[name] = weight
            continue
        parts, values = parts_of(scheme, weight.float().numpy(), name.removesuffix(".weight"))
        quantised |= parts
        plain[name] = torch.from_numpy(values.astype(np.float32))
    paths = folder / "quantised", folder / "plain"
    write(paths[0], quantised, scheme.settings, **config)
    write(paths[1], plain, None, **config)
    for path in paths:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (path / file).write_bytes((source / file).read_bytes())
    return paths
