"""Load a checkpoint into an executor and run steps, for tests that work below the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ridgeline.execution.base import Executor, Limits
from ridgeline.execution.cpu.executor import CpuExecutor
from ridgeline.execution.reference import ReferenceExecutor
from ridgeline.model.build import decoder
from ridgeline.model.checkpoint import open_checkpoint
from ridgeline.model.families import read_spec
from ridgeline.model.program import Program
from ridgeline.model.rewrite import with_precision
from ridgeline.model.weights import Weights
from ridgeline.native import isa_levels
from ridgeline.precision.quantise import quantise_groups
from ridgeline.types import Segment, SequenceRows, Step

PAGES = 64
MAX_ROWS = 192


@dataclass
class Loaded:
    """An executor with one program on it."""

    executor: Executor
    handle: Any
    program: Program

    def logits(self, *sequences: SequenceRows) -> np.ndarray:
        """A copy of the step's logits, (outputs, vocabulary)."""
        return self.executor.run(self.handle, Step(sequences)).result().logits.copy()

    def rows(
        self, tokens: Sequence[int], start: int = 0, pages: Sequence[int] | None = None, outputs: bool = True
    ) -> SequenceRows:
        """`tokens` from slot `start` of a sequence on `pages`; the logits of all rows are wanted, or none."""
        table = tuple(pages if pages is not None else range(PAGES))
        segment = Segment((table,) * len(self.program.groups), start + len(tokens))
        return SequenceRows(tokens, start, (segment,), range(len(tokens)) if outputs else ())

    def run(self, tokens: Sequence[int], start: int = 0, pages: Sequence[int] | None = None) -> np.ndarray:
        return self.logits(self.rows(tokens, start, pages))


def load_program(
    path: Path, weights: str, device: str = "cpu", kv_format: str | None = None
) -> tuple[Program, Weights]:
    """The precision-rewritten decoder of a checkpoint, and its open weights."""
    checkpoint = open_checkpoint(path)
    spec = read_spec(checkpoint)
    program = decoder(spec)
    store = Weights(spec, program, checkpoint, weights, device)
    return with_precision(program, store.formats, kv_format), store


def load(path: Path, kind: str, weights: str = "auto", kv_format: str = "KV16", threads: int = 2) -> Loaded:
    """`kind` is "reference", "cuda" or an ISA level of the CPU executor."""
    program, store = load_program(path, weights, "cuda" if kind == "cuda" else "cpu", kv_format)
    limits = Limits(MAX_ROWS, (PAGES,) * len(program.groups), kv_format)
    executor = make_executor(kind, limits, threads)
    executor.load(store)
    store.close()
    return Loaded(executor, executor.compile(program), program)


def make_executor(kind: str, limits: Limits, threads: int = 2) -> Executor:
    """CUDA kernels run in Triton's interpreter where there is no GPU."""
    if kind == "reference":
        return ReferenceExecutor(limits)
    if kind == "cuda":
        import torch

        from ridgeline.execution.cuda.device import Emulated, Gpu
        from ridgeline.execution.cuda.executor import CudaExecutor

        return CudaExecutor(limits, Gpu() if torch.cuda.is_available() else Emulated())
    return CpuExecutor(limits, threads, kind)


def relative_error(seen: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest expected value."""
    return float(np.abs(seen - expected).max() / np.abs(expected).max())


class Margins:
    """How near each row's activations came to where one unit in the last place changes an int8 code."""

    def __init__(self, rows: int) -> None:
        self.of_row = np.full(rows, np.inf)

    def quantise(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes, scales = quantise_groups(groups)
        with np.errstate(divide="ignore", invalid="ignore"):
            exact = np.nan_to_num(groups.astype(np.float64) / scales[..., None])
        distance = np.abs(np.abs(exact - np.floor(exact)) - 0.5)
        of_row = distance.reshape(len(self.of_row), -1).min(axis=1)  # of all of a row's experts, or heads
        np.minimum(self.of_row, of_row, out=self.of_row)
        return codes, scales


def assert_executors_agree(path: Path, weights: str, tokens: Sequence[int], kv_format: str = "KV32") -> None:
    """`assert_agree` for a checkpoint in one format."""
    assert_agree(lambda kind: load(path, kind, weights, kv_format), tokens, sixteen=weights == "W16A16")


def assert_agree(make: Callable[[str], Loaded], tokens: Sequence[int], sixteen: bool = False) -> None:
    """Every ISA level equals the reference to 1e-5, but for rows in which a code lies so near a rounding
    boundary that the last place decides it. `tokens` are cut into sequences of three, one to a page.

    Small values have bfloat16 neighbours so near that every row has one at some boundary. There most rows
    must agree, and where one value was rounded the other way, to what that weighs."""
    length = 3
    starts = range(len(tokens) - length + 1)[:60]
    reference = make("reference")
    batch = [reference.rows(tokens[at : at + length], pages=[page]) for page, at in enumerate(starts)]
    margins = Margins(len(batch) * length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ridgeline.precision.quantise.quantise_groups", margins.quantise)
        expected = reference.logits(*batch)
    # A row also reads what the rows before it stored.
    near = np.minimum.accumulate(margins.of_row.reshape(-1, length), axis=1).reshape(-1) < 1.5e-4
    assert near.mean() < 0.9
    for isa in isa_levels():
        error = np.abs(make(isa).logits(*batch) - expected).max(axis=1)
        error /= np.abs(expected).max()
        assert np.mean(error < 1e-5) > 0.6 if sixteen else error[~near].max() < 1e-5
        assert error.max() < (0.01 if sixteen else 0.1)
