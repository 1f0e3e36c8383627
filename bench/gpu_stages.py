"""What is checked and measured, in which order, on one device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from gpu_check_steps import check_attention, check_draw, check_model
from gpu_checks import Check, Checker
from gpu_engine import EngineBench, Workload
from gpu_kernels import Bench, KernelBench
from gpu_models import KV_FORMAT, Model, Ready, Rows, make_ready, make_step, pages_of, with_layers
from gpu_report import Report
from gpu_timing import Session

from ridgeline.execution.base import Limits
from ridgeline.execution.cuda.device import Device
from ridgeline.model.spec import ModelSpec


@dataclass(frozen=True)
class Cases:
    """The sizes that are checked and measured."""

    check_rows: tuple[int, ...] = (1, 8, 32, 100, 512)
    row_kernel_rows: int = 300
    check_contexts: tuple[int, ...] = (1024, 8192)
    check_chunk: int = 300
    draw_rows: int = 64
    decode_rows: tuple[int, ...] = (1, 8, 32, 128)
    prefill_rows: tuple[int, ...] = (512, 2048)
    short_context: int = 512
    long_context: int = 8192

    @property
    def attention(self) -> list[tuple[int, int, int]]:
        """(rows, start, sequences) of each measured attention."""
        short, long = self.short_context, self.long_context
        decode = [(1, short - 1, batch) for batch in self.decode_rows]
        decode += [(1, long - 1, batch) for batch in self.decode_rows[:-1]]
        prefill = [(rows, 0, 1) for rows in self.prefill_rows]
        chunk = self.prefill_rows[0]
        return [*decode, *prefill, (chunk, long - chunk, 1)]


T = TypeVar("T")

ATTENTION_FORMATS = ("W4A16-g32", "W8A8-g32")
"""Attention knows of the format only whether its queries are bfloat16 or float32."""


class Measurement:
    """All stages, on one device. `models` are (name, spec) pairs."""

    def __init__(
        self, bench: Bench, session: Session, report: Report, models: Mapping[str, ModelSpec]
    ) -> None:
        self._bench = bench
        self._session = session
        self._report = report
        self._models = models
        self._kernels = KernelBench(bench)

    # -- checks

    def check(self, formats: Iterable[str], cases: Cases) -> None:
        """Everything once, each format's products and whole models among it."""
        device = self._bench.device
        formats = tuple(formats)
        for name, spec in self._models.items():
            models = [Model.of(name, spec, fmt) for fmt in formats]
            for model in models:
                self._checks(model.label, "logits", partial(check_model, model, device))
            for model in models:
                checker = Checker(model, device)
                self._checks(model.label, "products", partial(checker.linears, cases.check_rows))
                self._checks(model.label, "rows", partial(checker.row_kernels, cases.row_kernel_rows))
            for model in self._attention_models(models):
                work = partial(check_attention, model, device, cases.check_contexts, cases.check_chunk)
                self._checks(model.label, "attention", work)
            self._checks(name, "draw", partial(check_draw, spec.vocabulary, device, cases.draw_rows))

    def _checks(self, subject: str, what: str, found: Callable[[], Iterable[Check]]) -> None:
        def work() -> None:
            for check in found():
                self._report.check(subject, check)

        self._session.run(f"check {what}", f"check of {subject}: {what}", work, least_s=5.0)
        self._free()

    def _attention_models(self, models: Sequence[Model]) -> list[Model]:
        """One model for each type of queries."""
        return list({model.kind == "bf16": model for model in models}.values())

    # -- kernels

    def kernels(self, model: Model, cases: Cases, attention: bool) -> None:
        name = f"kernels, {model.label}"
        self._session.run(f"kernels {model.name}", name, partial(self._row_kernels, model, cases), 12.0)
        self._free()
        if attention:
            work = partial(self._attention, model, cases)
            self._session.run(f"attention {model.name}", f"{name}: attention", work, 8.0)
            self._free()

    def _row_kernels(self, model: Model, cases: Cases) -> None:
        most = max(*cases.prefill_rows, *cases.decode_rows)
        ready = self._kernels.rows_ready(model, most, max(cases.decode_rows))
        try:
            for rows in (*cases.decode_rows, *cases.prefill_rows):
                self._session.run(
                    f"{rows} rows of {model.name}",
                    f"kernels, {model.label}, {rows} rows",
                    partial(self._tell_rows, ready, rows, rows in cases.decode_rows),
                )
        finally:
            ready.executor.close()

    def _tell_rows(self, ready: Ready, rows: int, decode: bool) -> None:
        for line in self._kernels.row_lines(ready, rows, decode):
            self._report.kernel(line)

    def _attention(self, model: Model, cases: Cases) -> None:
        shapes = [Rows(*shape) for shape in cases.attention]
        ready, fitting = self._kernels.attention_ready(model, shapes)
        try:
            for shape in fitting:
                name = f"attention, {model.label}, {shape.count} x {shape.rows} rows behind {shape.start}"
                self._session.run("one attention", name, partial(self._tell_attention, ready, shape))
        finally:
            ready.executor.close()
        for shape in shapes:
            if shape not in fitting:
                self._session.skipped.append(f"attention, {model.label}, {shape}: too little memory")

    def _tell_attention(self, ready: Ready, shape: Rows) -> None:
        self._report.kernel(self._kernels.attention_line(ready, shape))

    # -- engine

    def engine(self, model: Model, workload: Workload) -> None:
        name = f"engine, {model.label}"
        self._session.run(f"engine {model.name}", name, partial(self._engine, model, workload, name), 15.0)
        self._free()

    def _engine(self, model: Model, workload: Workload, name: str) -> None:
        bench = EngineBench(model, self._bench, workload)

        def run(case: str, work: Callable[[], T], least_s: float = 1.0) -> T | None:
            return self._session.run(f"{case} {model.name}", f"{name}: {case}", work, least_s)

        try:
            for tokens in workload.prefills:
                run(f"prefill {tokens}", partial(self._prefill, bench, tokens))
            names = run("mixed load, and decode behind it", partial(self._mixed, bench), 5.0)
            if names is not None:
                for batch in bench.batches:
                    run(f"decode at batch {batch}", partial(self._decode, bench, names, batch))
            bench.idle()
            run("sampled decode", partial(self._sampled, bench), 3.0)
            bench.idle()
            run("alone and in a batch", partial(self._identity, bench), 3.0)
        finally:
            bench.close()

    def _prefill(self, bench: EngineBench, tokens: int) -> None:
        self._report.engine_line(bench.prefill(tokens))

    def _mixed(self, bench: EngineBench) -> list[str]:
        line, names = bench.mixed()
        self._report.engine_line(line)
        return names

    def _decode(self, bench: EngineBench, names: list[str], batch: int) -> None:
        for line in bench.decode(names, batch):
            self._report.engine_line(line)

    def _sampled(self, bench: EngineBench) -> None:
        self._report.engine_line(bench.sampled())

    def _identity(self, bench: EngineBench) -> None:
        for found in bench.identity():
            self._report.identical(found)

    def _free(self) -> None:
        """Give back what the last case held; launches and what they are bound to refer to each other."""
        gc.collect()
        if self._bench.device.where.type == "cuda":
            torch.cuda.empty_cache()


# -------------------------------------------------------------------------- compiling ahead of time


@dataclass(frozen=True)
class WarmUnit:
    """A step whose kernels some process compiles."""

    model: str
    format: str
    rows: int
    decode: bool


def warm_units(models: Iterable[str], formats: Iterable[str], cases: Cases) -> list[WarmUnit]:
    """Steps that need, together, every kernel that is measured; what is wanted first stands first."""
    models = tuple(models)
    sizes = [(rows, True) for rows in (1, 8, 32, 64)] + [(cases.prefill_rows[0], False)]
    return [WarmUnit(name, fmt, *size) for fmt in formats for name in models for size in sizes]


def warm_up(unit: WarmUnit, spec: ModelSpec, device: Device, cases: Cases) -> None:
    """Run one layer and the head once, which leaves the kernels in Triton's cache on disk."""
    model = Model.of(unit.model, with_layers(spec, 1), unit.format)
    shape = Rows(1, 0, unit.rows) if unit.decode else Rows(unit.rows, 0)
    most = max(*cases.prefill_rows, *cases.decode_rows)  # the height of attention's tile depends on it
    limits = Limits(most, (pages_of([shape]),), KV_FORMAT, max(cases.decode_rows))
    ready = make_ready(model, device, limits, graphs=False)
    try:
        ready.executor.run(ready.handle, make_step([shape], spec, limits.pages[0])).result()
    finally:
        ready.executor.close()
