"""Models of real shapes on the CUDA executor without their gigabytes: tensors have shapes but no contents.

Layers of a model are all alike, or of two kinds; one of each kind meets every kernel that the model needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from ridgeline.config import EngineConfig
from ridgeline.execution.base import Limits
from ridgeline.execution.cuda.arrays import Packed
from ridgeline.execution.cuda.device import Emulated
from ridgeline.execution.cuda.executor import CudaExecutor, CudaHandle
from ridgeline.execution.cuda.pack import pack
from ridgeline.model.build import decoder
from ridgeline.model.families.rope import rope
from ridgeline.model.program import Program
from ridgeline.model.rewrite import with_precision
from ridgeline.model.spec import (
    AttentionSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
)
from ridgeline.model.weights import matrices_of
from ridgeline.precision.formats import FORMATS, Format
from ridgeline.precision.quantise import storage_of
from ridgeline.precision.storage import Tensor

PAGES = 4096


def _llama(
    hidden: int, width: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int, theta: float
) -> ModelSpec:
    attention = AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, rope(theta, head_dim))
    return ModelSpec(
        family="llama",
        hidden=hidden,
        vocabulary=vocabulary,
        context=8192,
        norm=NormSpec("rms", 1e-5),
        layers=(LayerSpec(attention, FeedForwardSpec(width, "silu", gated=True)),),
        tied_head=True,
    )


def llama_3_1_8b() -> ModelSpec:
    return replace(_llama(4096, 14336, 32, 8, 128, 128256, 500000.0), tied_head=False)


def smollm2_135m() -> ModelSpec:
    return _llama(576, 1536, 9, 3, 64, 49152, 100000.0)


def qwen3_0_6b() -> ModelSpec:
    """As Llama, with norms of the heads of queries and keys."""
    spec = _llama(1024, 3072, 16, 8, 128, 151936, 1000000.0)
    (layer,) = spec.layers
    layer = replace(layer, attention=replace(layer.attention, qk_norm=True))
    return replace(spec, layers=(layer,), norm=NormSpec("rms", 1e-6))


def llama_with_head_norms() -> ModelSpec:
    """Llama's shapes with the norms of Command-R+, whose heads are as wide: layer norms with a gain for each
    head."""
    spec = llama_3_1_8b()
    normed = {"qk_norm": True, "qk_norm_kind": "layer", "qk_norm_by_head": True}
    layers = (replace(each, attention=replace(each.attention, **normed)) for each in spec.layers)
    return replace(spec, layers=tuple(layers))


def gemma_3_1b() -> ModelSpec:
    """A layer with a window and one without, norms on both sides of each half, and wide heads."""
    attention = AttentionSpec(4, 1, 256, 256**-0.5, rope(1000000.0, 256), qk_norm=True)
    full = LayerSpec(attention, FeedForwardSpec(6912, "gelu_tanh", gated=True), post_norms=True)
    near = replace(full, attention=replace(attention, rope=rope(10000.0, 256), window=512))
    return ModelSpec(
        family="gemma3",
        hidden=1152,
        vocabulary=262144,
        context=32768,
        norm=NormSpec("rms", 1e-6),
        layers=(near, full),
        tied_head=True,
        embedding_scale=float(np.float32(1152**0.5)),
    )


def gemma_2_2b() -> ModelSpec:
    """As Gemma 3, without norms of heads, and with scores and logits that are capped."""
    spec = _llama(2304, 9216, 8, 4, 256, 256000, 10000.0)
    attention = replace(spec.layers[0].attention, softcap=50.0)
    full = LayerSpec(attention, FeedForwardSpec(9216, "gelu_tanh", gated=True), post_norms=True)
    near = replace(full, attention=replace(attention, window=4096))
    scale = float(np.float32(2304**0.5))
    return replace(spec, layers=(near, full), embedding_scale=scale, logit_softcap=30.0)


def mixtral_8x7b() -> ModelSpec:
    """Few experts, each as wide as a whole model's feed-forward."""
    spec = replace(llama_3_1_8b(), vocabulary=32000)
    experts = ExpertsSpec(8, 2, FeedForwardSpec(14336, "silu", gated=True))
    return _with_experts(spec, experts)


def qwen3_30b_a3b() -> ModelSpec:
    """Many small experts."""
    spec = replace(_llama(2048, 768, 32, 4, 128, 151936, 1000000.0), tied_head=False)
    experts = ExpertsSpec(128, 8, FeedForwardSpec(768, "silu", gated=True))
    return _with_experts(spec, experts, qk_norm=True)


def qwen1_5_moe_a2_7b() -> ModelSpec:
    """A shared neighbour beside the experts, whose scores are not divided by their sum."""
    spec = replace(_llama(2048, 1408, 16, 16, 128, 151936, 1000000.0), tied_head=False)
    expert, shared = (FeedForwardSpec(width, "silu", gated=True) for width in (1408, 5632))
    experts = ExpertsSpec(60, 4, expert, renormalise=False, shared=shared)
    return _with_experts(spec, experts, qkv_bias=True)


def gpt_oss_20b() -> ModelSpec:
    """A layer with a window, attention sinks, and biases throughout; every other one is without a window."""
    spec = replace(_llama(2880, 2880, 64, 8, 64, 201088, 150000.0), tied_head=False)
    experts = ExpertsSpec(
        32, 4, FeedForwardSpec(2880, "clamped_silu", gated=True, bias=True), router_bias=True
    )
    return _with_experts(spec, experts, sinks=True, qkv_bias=True, output_bias=True, window=128)


def _with_experts(spec: ModelSpec, experts: ExpertsSpec, **attention: Any) -> ModelSpec:
    (layer,) = spec.layers
    layer = replace(layer, attention=replace(layer.attention, **attention), feed_forward=experts)
    return replace(spec, layers=(layer,))


def gpt2() -> ModelSpec:
    """Layer norms, biases, a table of positions, and a vocabulary whose rows begin anywhere."""
    attention = AttentionSpec(12, 12, 64, 64**-0.5, None, qkv_bias=True, output_bias=True)
    return ModelSpec(
        family="gpt2",
        hidden=768,
        vocabulary=50257,
        context=1024,
        norm=NormSpec("layer", 1e-5),
        layers=(LayerSpec(attention, FeedForwardSpec(3072, "gelu_tanh", gated=False, bias=True)),),
        tied_head=True,
        learned_positions=1024,
    )


SPECS: dict[str, Callable[[], ModelSpec]] = {
    "llama-3.1-8b": llama_3_1_8b,
    "qwen3-0.6b": qwen3_0_6b,
    "llama with head norms": llama_with_head_norms,
    "smollm2-135m": smollm2_135m,
    "gemma-2-2b": gemma_2_2b,
    "gemma-3-1b": gemma_3_1b,
    "gpt2": gpt2,
    "mixtral-8x7b": mixtral_8x7b,
    "qwen3-30b-a3b": qwen3_30b_a3b,
    "qwen1.5-moe-a2.7b": qwen1_5_moe_a2_7b,
    "gpt-oss-20b": gpt_oss_20b,
}


@dataclass(frozen=True)
class Setting:
    """A model in a number format, with a format of its stored keys and values."""

    model: str
    weights: str
    kv_format: str = "KV16"

    def __str__(self) -> str:
        return f"{self.model} {self.weights} {self.kv_format}"


class _Shapes:
    """Stands in for the store of a checkpoint's weights: every matrix is one row of zeros that says its
    storage and columns, and every vector is zeros."""

    def __init__(self, program: Program, fmt: Format) -> None:
        self._shapes = {weight.name: weight.shape for weight in program.weights()}
        self.formats = dict.fromkeys(sorted(matrices_of(program)), fmt)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def matrix(self, name: str) -> Tensor:
        storage = storage_of(self.formats[name])
        cols = self._shapes[name][-1]
        return Tensor(storage, (1, cols), np.zeros((1, storage.row_bytes(cols)), np.uint8))

    def pack(self, tensor: Tensor, where: torch.device, name: str) -> Packed:
        """That row's layout, for as many rows as the matrix has."""
        row = pack(tensor, where, name)
        codes, scales = (
            torch.empty((math.prod(self._shapes[name][:-1]), *held.shape[1:]), dtype=held.dtype, device=where)
            if held is not None
            else None
            for held in (row.codes, row.scales)
        )
        assert codes is not None
        return Packed(row.bits, row.cols, codes, scales)

    def vector(self, name: str) -> np.ndarray:
        return np.zeros(self._shapes[name], np.float32)

    def release(self, name: str) -> None: ...


def load_shapes(executor: CudaExecutor, program: Program, weights: str, kv_format: str) -> Program:
    """Give an executor weights of a program's shapes in a format; the program in that format, and in that
    of its keys and values."""
    store = _Shapes(program, FORMATS[weights])
    with patch("ridgeline.execution.cuda.weights.pack", store.pack):
        executor.load(store)
    return with_precision(program, store.formats, kv_format)


def without_memory(setting: Setting) -> tuple[CudaExecutor, CudaHandle]:
    """An executor with the compiled program of a setting, at the engine's own limits."""
    program, config = decoder(SPECS[setting.model]()), EngineConfig()
    limits = Limits(
        config.max_num_batched_tokens, (PAGES,) * len(program.groups), setting.kv_format, config.max_num_seqs
    )
    executor = CudaExecutor(limits, Emulated("meta"))
    return executor, executor.compile(load_shapes(executor, program, setting.weights, setting.kv_format))
