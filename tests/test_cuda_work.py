"""What each CUDA launch is handed, counted from its arguments, equals what the lowering says of it.

No kernel runs: the launchers are replaced by functions that count. Numbers that are no values of the program
move too, and are left out on both sides: ids, positions and their rotary tables, slots, work lists, draws,
and attention's partial results, which depend on how a machine cuts the work.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from cuda_models import load_shapes
from running import MAX_ROWS, PAGES, load_program
from tiny_models import TinyModel
from torch import Tensor

from ridgeline.execution.base import Limits
from ridgeline.execution.cuda import arrays, binding, launches
from ridgeline.execution.cuda.arrays import A8, Activations, Experts, NormWeights, Packed, Routes, WorkList
from ridgeline.execution.cuda.device import Emulated
from ridgeline.execution.cuda.executor import CudaExecutor, CudaHandle
from ridgeline.execution.cuda.inputs import StepSize
from ridgeline.execution.cuda.kernels.attention import SPLIT_TOKENS
from ridgeline.execution.cuda.kernels.rope import Heads, Rope
from ridgeline.execution.cuda.launches import CudaLaunch, Run
from ridgeline.execution.lowering import borders, launch_work
from ridgeline.model.build import decoder
from ridgeline.model.families.rope import rope
from ridgeline.model.program import Program, StepLoad
from ridgeline.model.spec import (
    AttentionSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
)
from ridgeline.precision.formats import FORMATS
from ridgeline.types import Draw, Segment, SequenceRows, Step, Work

Tiny = Callable[[str], TinyModel]


# ----------------------------------------------------------------- what a launcher's arguments come to


def moved(read: list[Any], written: list[Any]) -> Work:
    read_bytes, written_bytes = (sum(x.nbytes for x in some if x is not None) for some in (read, written))
    return Work(read_bytes=read_bytes, written_bytes=written_bytes)


def flops(per_value: int, x: Tensor) -> Work:
    return Work(fp32_flops=per_value * x.numel())


def rounding(x: Tensor, out: Activations) -> Work:
    """Four operations for a code with its share of a scale, one for a bfloat16."""
    return flops(4 if isinstance(out, A8) else int(out.dtype == torch.bfloat16), x)


def norming(norm: NormWeights | None, x: Tensor) -> Work:
    if norm is None:
        return Work()
    return flops(4 if norm.kind == "rms" else 7, x) + moved([norm.weight, norm.bias], [])


def count_embed(
    ids: Tensor, drawn: Tensor, table: Packed, out: Tensor, *, scale: float, sixteen: bool, accumulate: bool
) -> Work:
    assert ids.shape == out.shape[:1]
    rows = table.slice(0, 1).nbytes * len(ids)
    steps = (scale != 1.0) + accumulate
    return Work(read_bytes=rows) + moved([out if accumulate else None], [out]) + flops(steps, out)


def count_norm(
    x: Tensor,
    out: Activations | None,
    norm: NormWeights | None,
    *,
    before: NormWeights | None = None,
    residual: Tensor | None = None,
    rows: Tensor | None = None,
) -> Work:
    if rows is not None:
        x = x[: len(rows)]  # as many, wherever they lie
    work = moved([x, residual], [residual, out]) + norming(before, x) + norming(norm, x)
    if residual is not None:
        work += flops(1, x)
    return work + rounding(x, out) if out is not None else work


def count_quantise(x: Tensor, out: Activations) -> Work:
    return moved([x], [out]) + rounding(x, out)


def count_linear(x: Activations, matrix: Packed, out: Tensor, bias: Tensor | None = None) -> Work:
    rows = len(x.codes if isinstance(x, A8) else x)
    assert out.shape == (rows, matrix.rows)
    return products(x, 2 * rows * matrix.rows * matrix.cols) + moved([x, matrix, bias], [out])


def products(x: Activations, ops: int) -> Work:
    if isinstance(x, A8):
        return Work(int8_ops=ops)
    return Work(bf16_flops=ops) if x.dtype == torch.bfloat16 else Work(fp32_flops=ops)


def count_route(
    x: Tensor,
    router: Tensor,
    bias: Tensor | None,
    row_count: Tensor,
    routes: Routes,
    *,
    renormalise: bool,
) -> Work:
    count = len(router) - routes.shared
    chosen = Work(fp32_flops=3 * count * len(x))
    return flops(2 * len(router), x) + chosen + moved([x, router, bias], [routes.table])


def count_experts(
    x: Activations, routes: Routes, experts: Experts, out: Tensor, bias: Tensor | None = None
) -> Work:
    """Of the weights, as many as rows read that choose evenly: all where they choose every expert."""
    assert out.shape == (routes.pairs, experts.outputs)
    share = StepLoad(len(routes.table), 0, (), ()).experts_used(experts.count, routes.chosen)
    linears = experts.outputs // experts.width
    held = experts.matrix.nbytes + (bias.nbytes if bias is not None else 0)
    read = Work(read_bytes=linears * round(share * (held // linears)))
    ops = 2 * out.numel() * experts.matrix.cols
    return products(x, ops) + read + moved([x, routes.table], [out])


def count_combine(x: Tensor, routes: Routes, out: Tensor, shared: Tensor | None = None) -> Work:
    terms = routes.chosen + (shared is not None)
    return flops(2 * terms, out) + moved([x, routes.table, shared], [out])


def count_store(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    query_out: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    heads: Heads,
    *,
    rope: Rope | None = None,
    query_norm: NormWeights | None = None,
    key_norm: NormWeights | None = None,
    pool_scales: Tensor | None = None,
) -> Work:
    stored = int((slots >= 0).sum())
    slot_bytes = bytes_of_slot(pool, pool_scales)
    work = moved([query, key, value], [query_out]) + Work(written_bytes=stored * slot_bytes)
    work += norming(key_norm, key)
    if query is not None and query_out is not None:
        work += norming(query_norm, query) + rounding(query, query_out)
    if rope is not None and query is not None:
        turned = 2 * rope.cos.shape[1] * (heads.heads + heads.kv_heads)
        work += Work(fp32_flops=3 * len(key) * turned)
    return work


def bytes_of_slot(pool: Tensor, scales: Tensor | None) -> int:
    """Of all heads' keys and values."""
    return sum(held[0, :, :, 0].numel() * held.element_size() for held in (pool, scales) if held is not None)


def count_attention(
    query: Tensor,
    out: Tensor,
    pool: Tensor,
    positions: Tensor,
    work: WorkList,
    partials: object,
    *,
    scale: float,
    window: int | None,
    block_m: int,
    programs: int,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    pool_scales: Tensor | None = None,
) -> Work:
    head_dim = pool.shape[-1]
    pairs, slots = visible(positions.numpy(), work, window)
    of_heads = pairs * (query.shape[1] // head_dim)
    products = 4 * head_dim * of_heads
    sums = Work(bf16_flops=products) if query.dtype == torch.bfloat16 else Work(fp32_flops=products)
    slot_bytes = bytes_of_slot(pool, pool_scales)
    narrowed = flops(int(out.dtype == torch.bfloat16), out)
    rest = Work(fp32_flops=(3 if softcap is None else 6) * of_heads, read_bytes=slots * slot_bytes)
    return sums + rest + narrowed + moved([query, sinks], [out])


def visible(positions: np.ndarray, work: WorkList, window: int | None) -> tuple[int, int]:
    """(row, slot) pairs that the items cover, and slots of segments that any row sees."""
    segments = work.segments.numpy()
    pairs, seen = 0, np.zeros((len(segments), PAGES * 16), bool)
    for item in work.items.numpy()[: int(work.counts[0])]:
        begin, end = item[arrays.ITEM_SEGMENT_BEGIN], item[arrays.ITEM_SEGMENT_END]
        for number, segment in enumerate(segments[begin:end], begin):
            slots = np.arange(segment[arrays.SEGMENT_LENGTH])
            split = slots // SPLIT_TOKENS
            covered = (split >= item[arrays.ITEM_SPLIT_BEGIN]) & (split < item[arrays.ITEM_SPLIT_END])
            at = slots + segment[arrays.SEGMENT_FIRST_POSITION]
            first = item[arrays.ITEM_ROW]
            for position in positions[first : first + item[arrays.ITEM_ROWS]]:
                sees = covered & (at > position - (window or np.inf))
                if segment[arrays.SEGMENT_CAUSAL]:
                    sees &= at <= position
                pairs += int(sees.sum())
                seen[number, : len(slots)] |= sees
    return pairs, int(seen.sum())


def count_activate(x: Tensor, out: Activations, activation: str, times: Tensor | None = None) -> Work:
    return moved([x, times], [out]) + flops(4 if times is None else 5, x) + rounding(x, out)


def count_softcap(x: Tensor, cap: float) -> Work:
    return moved([x], [x]) + flops(3, x)


def count_draw(logits: Tensor, draws: Tensor, tokens: Tensor) -> Work:
    return moved([logits], [tokens]) + flops(1, logits)


COUNTERS: dict[str, Callable[..., Work]] = {
    "embed": count_embed,
    "residual_norm": count_norm,
    "quantise": count_quantise,
    "linear": count_linear,
    "route": count_route,
    "expert_linear": count_experts,
    "combine": count_combine,
    "rope_store": count_store,
    "attention": count_attention,
    "activate": count_activate,
    "softcap": count_softcap,
    "draw": count_draw,
}


# ------------------------------------------------------------------------------------------- the steps


class Counted:
    """A program on the executor, whose launches only count."""

    def __init__(
        self, patch: pytest.MonkeyPatch, groups: int, kv_format: str, load: Callable[[CudaExecutor], Program]
    ) -> None:
        self.counts: list[Work] = []
        for name, count in COUNTERS.items():
            patch.setattr(launches, name, self._counting(count))
        patch.setattr(binding, "rope_table", lambda *_: None)
        limits = Limits(MAX_ROWS, (PAGES,) * groups, kv_format)
        self.executor = CudaExecutor(limits, Emulated(), graphs=False)
        self.program = load(self.executor)
        handle = self.executor.compile(self.program)
        runs = tuple(
            (self._of_one(launch, run), flag)
            for launch, (run, flag) in zip(handle.launches, handle.runs, strict=True)
        )
        self.handle: CudaHandle = replace(handle, runs=runs)
        self.of_launch: dict[int, Work] = {}

    def _counting(self, count: Callable[..., Work]) -> Callable[..., None]:
        return lambda *args, **named: self.counts.append(count(*args, **named))

    def _of_one(self, launch: CudaLaunch, run: Run) -> Run:
        def counted(size: StepSize) -> None:
            self.counts.clear()
            run(size)
            assert self.counts
            self.of_launch[id(launch)] = Work.total(self.counts)

        return counted

    def check(self) -> None:
        """Launch by launch, and all together, over all steps."""
        footprint = self.executor._footprint(self.program)
        crossed = list(zip(self.handle.launches, borders(self.program, self.handle.launches), strict=True))
        for kind, step in steps(len(self.program.groups)).items():
            self.of_launch.clear()
            total = self.executor.run(self.handle, step).result().work.total
            load = StepLoad.of(step, self.program.groups)
            for launch, border in crossed:
                seen = self.of_launch.get(id(launch), Work())  # one that only outputs need may not run
                made = [op.out.name for op in launch.covers]
                assert seen == launch_work(launch, border, load, footprint), (kind, type(launch), made)
            assert total == Work.total(self.of_launch.values()), kind
            assert total.ops == self.program.work(load).ops, kind


def rows(count: int, start: int, outputs: list[int], *before: Segment, groups: int) -> SequenceRows:
    """Rows from slot `start` of a last segment behind the segments `before`."""
    last = sum(segment.length for segment in before)
    own = Segment((range(PAGES),) * groups, start + count, first_position=last)
    return SequenceRows([5] * count, start, (*before, own), outputs)


def steps(groups: int) -> dict[str, Step]:
    def some(count: int, start: int, outputs: list[int], *before: Segment) -> SequenceRows:
        return rows(count, start, outputs, *before, groups=groups)

    other = Segment((range(PAGES),) * groups, 21, bias=0.5)
    open_ = Segment((range(PAGES),) * groups, 9, first_position=4, causal=False)
    decode = [some(1, start, [0]) for start in (0, 7, 40, 300)]
    return {
        "prefill": Step((some(50, 0, [49]),)),
        "chunk": Step((some(30, 30, []),)),
        "decode": Step(tuple(decode), (None, Draw(), Draw(), None)),
        "long": Step((some(1, 900, [0]), some(3, 1000, [2]))),
        "mixed": Step((*decode, some(40, 17, [0, 39]), some(5, 0, []))),
        "segments": Step((some(1, 3, [0], other), some(20, 0, [19], other, open_), decode[2])),
    }


def kept(weights: str) -> str:
    return {"W32A32": "KV32", "W8A16-g32": "KV8"}.get(weights, "KV16")


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", [*FAMILIES, "odd", "capped"])
def test_every_launch_moves_and_computes_what_the_lowering_says(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, name: str, weights: str
) -> None:
    program, store = load_program(tiny(name).folder, weights)

    def load(executor: CudaExecutor) -> Program:
        executor.load(store)
        return program

    Counted(monkeypatch, len(program.groups), kept(weights), load).check()
    store.close()


PLAIN = ModelSpec(
    family="",
    hidden=72,
    vocabulary=50,
    context=512,
    norm=NormSpec("rms", 1e-5),
    layers=(
        LayerSpec(AttentionSpec(6, 2, 16, 0.25, rope(1e4, 16)), FeedForwardSpec(100, "silu", gated=True)),
    )
    * 2,
    tied_head=True,
)


def changed(attention: dict[str, Any], **layer: Any) -> ModelSpec:
    of_all = tuple(replace(x, attention=replace(x.attention, **attention), **layer) for x in PLAIN.layers)
    return replace(PLAIN, layers=of_all)


GATED = FeedForwardSpec(40, "silu", gated=True)
BIASED = FeedForwardSpec(50, "clamped_silu", gated=True, bias=True)

SPECS = {
    "sinks": changed({"sinks": True}),
    "experts": changed({}, feed_forward=ExpertsSpec(7, 2, GATED)),
    "every expert": changed({}, feed_forward=ExpertsSpec(3, 3, BIASED, router_bias=True)),
    "experts and a shared neighbour": changed({}, feed_forward=ExpertsSpec(5, 1, GATED, False, shared=GATED)),
    "capped scores": changed({"softcap": 20.0}),
    "norms of whole queries": changed({"qk_norm": True, "qk_norm_whole": True}),
    "layer norms of single heads": changed(
        {"qk_norm": True, "qk_norm_kind": "layer", "qk_norm_by_head": True}
    ),
    "part of a head turned": changed({"rope": rope(1e4, 8)}),
    "norms behind only": changed({}, pre_norms=False, post_norms=True),
    "halves side by side": changed({}, parallel=True),
    "halves behind one norm": changed({}, parallel=True, one_norm=True),
    "scaled embeddings": replace(PLAIN, embedding_scale=3.0, logit_softcap=30.0, tied_head=False),
}


@pytest.mark.parametrize("weights", ["W4A16-g32", "W8A8-g32", "W32A32"])
@pytest.mark.parametrize("kind", SPECS)
def test_other_shapes_of_a_layer(monkeypatch: pytest.MonkeyPatch, kind: str, weights: str) -> None:
    program = decoder(SPECS[kind])
    kv_format = kept(weights)
    Counted(monkeypatch, 1, kv_format, lambda to: load_shapes(to, program, weights, kv_format)).check()


def test_the_counting_functions_take_what_the_launchers_take() -> None:
    for name, count in COUNTERS.items():
        asked = inspect.signature(getattr(launches, name)).parameters
        given = inspect.signature(count).parameters
        assert [*given] == [p for p in asked if p != "split_tokens"], name
