"""Checks of what takes a whole step: attention over long contexts, drawing, and layers of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gpu_checks import Check, worst
from gpu_models import KV_FORMAT, Model, Ready, Rows, make_ready, make_step, pages_of
from msgspec import structs
from torch import Tensor

from ridgeline.execution.base import Limits
from ridgeline.execution.cuda.arrays import (
    ITEM_FIELDS,
    ITEM_PARTIAL,
    ITEM_ROW,
    ITEM_ROWS,
    ITEM_SEGMENT_BEGIN,
    ITEM_SEGMENT_END,
    ITEM_SPLIT_END,
    WorkList,
)
from ridgeline.execution.cuda.device import Device
from ridgeline.execution.cuda.inputs import StepSize, draw_record
from ridgeline.execution.cuda.kernels.attention import attention_reference
from ridgeline.execution.cuda.kernels.draw import draw, draw_reference
from ridgeline.execution.cuda.launches import AttentionLaunch
from ridgeline.execution.cuda.pack import dequantise
from ridgeline.execution.reference import ReferenceExecutor
from ridgeline.types import Draw, Step

ATTENTION = {torch.bfloat16: 2.0**-6, torch.float32: 2e-4}
"""By the type of queries: bfloat16 ones have their probabilities and results rounded to bfloat16."""
TOP_P = 0.05
"""Share of tokens that differ: one whose cumulated probability is p but for rounding may be in or out."""
LOGITS = {"f32": 1e-4, "bf16": 2e-2, "A8-g32": 2e-2}
"""Root mean square: roundings of activations that fall to the other side spread through the layers."""

# ---------------------------------------------------------------------------------------- attention


def check_attention(model: Model, device: Device, contexts: tuple[int, ...], chunk: int) -> Iterator[Check]:
    """One layer's attention over random contexts, cut and merged as the executor does it: decode rows at the
    ends of the contexts, and chunks of `chunk` rows at theirs."""
    decode = [Rows(1, context - 1) for context in (*contexts, chunk)]
    prefill = [Rows(min(chunk, context), max(context - chunk, 0)) for context in contexts]
    one_layer = Model.of(model.name, replace(model.spec, layers=model.spec.layers[:1]), model.format)
    pages = max(pages_of(decode), pages_of(prefill))
    rows = sum(shape.rows for shape in prefill)
    limits = Limits(max(rows, 16), (pages,), KV_FORMAT, len(decode))
    ready = make_ready(one_layer, device, limits, graphs=False)
    try:
        for name, shapes in (("decode", decode), ("prefill", prefill)):
            ready.executor.run(ready.handle, make_step(shapes, one_layer.spec, pages)).result()
            size = StepSize(sum(s.rows for s in shapes), len(shapes), name == "decode")
            error, limit = _attention_error(ready, size, shapes)
            where = "/".join(str(shape.start + shape.rows) for shape in shapes)
            yield Check(f"attention, {name} at context {where}", error, limit)
    finally:
        ready.executor.close()


def _attention_error(ready: Ready, size: StepSize, shapes: list[Rows]) -> tuple[float, float]:
    binding = ready.handle.binding
    (launch,) = (one for one in ready.handle.launches if isinstance(one, AttentionLaunch))
    op = launch.attention
    query, out = binding.tensor(op.query, size), binding.tensor(launch.out, size)
    random = torch.Generator(query.device).manual_seed(3)
    query.copy_(2 * torch.randn(query.shape, generator=random, device=query.device))
    kept = query.clone()
    out.fill_(torch.nan)
    launch.bind(binding)(size)

    ends = np.cumsum([shape.rows for shape in shapes])
    records = []
    for sequence, (shape, end) in enumerate(zip(shapes, ends.tolist(), strict=True)):
        for row in {end - shape.rows, end - shape.rows // 2 - 1, end - 1}:
            record = [0] * ITEM_FIELDS
            record[ITEM_ROW], record[ITEM_ROWS], record[ITEM_PARTIAL] = row, 1, -1
            record[ITEM_SEGMENT_BEGIN], record[ITEM_SEGMENT_END] = sequence, sequence + 1
            record[ITEM_SPLIT_END] = 1 << 30
            records.append(record)
    work = binding.inputs.work(op.group)
    items = torch.tensor(records, dtype=torch.int32).to(query.device)
    counts = torch.tensor([len(records), 0], dtype=torch.int32).to(query.device)
    block_m, programs, partials = binding.attention_grid(op, size)
    expected = torch.full_like(out, torch.nan)
    pool, pool_scales = binding.pool(op.layer)
    attention_reference(
        kept,
        expected,
        pool,
        binding.inputs.positions[: size.rows],
        WorkList(counts, items, work.merges, work.segments, work.tables),
        partials,
        scale=op.scale,
        window=op.window,
        block_m=block_m,
        programs=programs,
        softcap=op.softcap,
        pool_scales=pool_scales,
    )
    rows = items[:, ITEM_ROW].long()
    error = worst(out[rows], expected[rows])
    return (error if bool(torch.isfinite(out).all()) else math.inf), ATTENTION[query.dtype]


# ------------------------------------------------------------------------------------------ drawing


def check_draw(vocabulary: int, device: Device, rows: int) -> Iterator[Check]:
    """Tokens drawn from random logits in each way of drawing, against the CPU's."""
    random = torch.Generator(device.where).manual_seed(5)
    logits = 3 * torch.randn((rows, vocabulary), generator=random, device=device.where)
    ways = {
        "greedy": (Draw(), 0.0),
        "temperature 0.8": (Draw(temperature=0.8), 0.0),
        "top_k 50": (Draw(temperature=0.8, top_k=50), 0.0),
        "min_p 0.05": (Draw(temperature=1.0, min_p=0.05), 0.0),
        "top_p 0.95": (Draw(temperature=0.8, top_p=0.95), TOP_P),
    }
    for name, (way, limit) in ways.items():
        records = [draw_record(structs.replace(way, seed=2**63 + row, position=row)) for row in range(rows)]
        draws = torch.tensor(records, dtype=torch.int64).to(device.where)
        tokens, expected = (torch.full((rows,), -7, dtype=torch.int32, device=device.where) for _ in range(2))
        draw(logits, draws, tokens)
        draw_reference(logits, draws, expected)
        yield Check(f"draw, {name}, of {vocabulary}", float((tokens != expected).double().mean()), limit)


# ------------------------------------------------------------------------------------- whole models


_BLOCK_ROWS = 1 << 14
"""Outputs whose weights are widened to float64 at a time."""


class _OnDevice:
    """A matrix that stays on the device: as much of an array as the reference executor asks for."""

    __array_ufunc__ = None  # so that `array @ matrix` is left to the matrix

    def __init__(self, values: Tensor) -> None:
        self._values = values

    @property
    def T(self) -> _OnDevice:  # noqa: N802 - as NumPy names it
        return self

    def astype(self, _: object) -> _OnDevice:
        return self

    def __rmatmul__(self, x: Any) -> Any:
        wide = torch.from_numpy(np.ascontiguousarray(x, np.float64)).to(self._values.device)
        begins = range(0, len(self._values), _BLOCK_ROWS)
        blocks = [wide @ self._values[begin : begin + _BLOCK_ROWS].double().T for begin in begins]
        return torch.cat(blocks, dim=1).cpu().numpy()

    def __getitem__(self, ids: Any) -> Any:
        places = torch.from_numpy(ids).long().to(self._values.device)
        return self._values[places].float().cpu().numpy()


class DeviceReference(ReferenceExecutor):
    """The reference executor over the very weights of another; their float64 products run on the device."""

    def take(self, ready: Ready) -> None:
        for name, fmt in ready.model.formats.items():
            values = dequantise(ready.executor.matrix(name))
            sixteen = fmt.activation_bits == 16
            held: Any = _OnDevice(values.to(torch.bfloat16) if sixteen else values)
            self._weights[name] = held
        for name, vector in ready.executor.vectors().items():
            self._weights[name] = vector.cpu().numpy()


def check_model(model: Model, device: Device, layers: int = 2) -> Iterator[Check]:
    """The logits of a cut of the model: two prompts, and then a decode step behind them."""
    prompts, decode = [Rows(20, 0), Rows(7, 0)], [Rows(1, 20), Rows(1, 7)]
    cut = Model.of(model.name, replace(model.spec, layers=model.spec.layers[:layers]), model.format)
    limits = Limits(64, (pages_of(prompts),), KV_FORMAT, 4)
    ready = make_ready(cut, device, limits, graphs=False, memory=False)
    reference = DeviceReference(limits)
    try:
        reference.take(ready)
        handle = reference.compile(cut.program)
        for name, shapes in (("prompts", prompts), ("decode", decode)):
            step: Step = make_step(shapes, cut.spec, limits.pages[0], draw=None)
            seen = ready.executor.run(ready.handle, step).result().logits.astype(np.float64)
            expected = reference.run(handle, step).result().logits.astype(np.float64)
            error = np.sqrt(np.square(seen - expected).mean() / np.square(expected).mean())
            yield Check(f"{layers} layers, {name}: logits", float(error), LOGITS[model.kind])
    finally:
        ready.executor.close()
        reference.close()
