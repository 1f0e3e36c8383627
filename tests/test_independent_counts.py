"""A step's flops and bytes against counts that know nothing of ours: PyTorch's of what transformers
multiplies, and the sizes of the arrays that the CPU executor's tape is given, and touches.

Attention's convention: the program counts the pairs of a row and a slot that it sees. transformers without
fused kernels multiplies every query with every key of the step and masks afterwards, so that of a prompt of n
tokens it counts n x n pairs; of a single row behind a prompt both count the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from running import Loaded, load, load_program
from tiny_models import TinyModel
from torch.utils.flop_counter import FlopCounterMode

from ridgeline.execution.cpu import executor as cpu_executor
from ridgeline.execution.cpu import launches as cpu_launches
from ridgeline.execution.cpu.executor import CpuExecutor
from ridgeline.model.program import Attention, Linear, Program, StepLoad
from ridgeline.types import Segment, SequenceRows, Step

Tiny = Callable[[str], TinyModel]
PROMPT = 37  # longer than Gemma's window of 20


# --------------------------------------------------------------------------------------------- flops


def multiplied(model: Any, *calls: dict[str, Any]) -> tuple[int, int]:
    """What PyTorch counts in the last of some calls: flops of linears, and of attention's products."""
    past = None
    for inputs in calls:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            past = model(**inputs, past_key_values=past, use_cache=True).past_key_values
    found = {str(kind): flops for kind, flops in counter.get_flop_counts()["Global"].items()}
    attention = found.pop("aten.bmm")
    assert set(found) <= {"aten.mm", "aten.addmm"}
    return sum(found.values()), attention


def products(program: Program, kind: type, load_: StepLoad) -> int:
    """Flops of the products of one kind of operations, in a program whose products are all bfloat16."""
    return sum(op.work(load_).bf16_flops for op in program.operations if isinstance(op, kind))


def rows_at(program: Program, count: int, start: int) -> StepLoad:
    """A step of one sequence that wants the outputs of all of its rows, as transformers gives them."""
    segment = Segment(((),) * len(program.groups), start + count)
    return StepLoad.of(Step((SequenceRows(range(count), start, (segment,), range(count)),)), program.groups)


@pytest.mark.parametrize("family", ["llama3", "gpt2", "gemma3"])
def test_flops_are_those_that_pytorch_counts(tiny: Tiny, family: str) -> None:
    made = tiny(family)
    program, store = load_program(made.folder, "W16A16", kv_format="KV16")
    store.close()
    model = made.torch_model
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    ids = torch.arange(2, PROMPT + 3)[None]
    try:
        prompt = multiplied(model, {"input_ids": ids[:, :PROMPT]})
        token = multiplied(model, {"input_ids": ids[:, :PROMPT]}, {"input_ids": ids[:, PROMPT:]})
    finally:
        model.set_attn_implementation(chosen)
    seen = rows_at(program, PROMPT, 0)
    every_pair = replace(seen, pairs=(PROMPT**2,) * len(seen.pairs))
    assert products(program, Linear, seen) == prompt[0]
    assert products(program, Attention, every_pair) == prompt[1]
    one = rows_at(program, 1, PROMPT)
    assert (products(program, Linear, one), products(program, Attention, one)) == token
    # The pairs that count are those of a causal mask, and of the window where there is one.
    for group, pairs in zip(program.groups, seen.pairs, strict=True):
        window = group.window or PROMPT
        assert pairs == sum(min(row + 1, window) for row in range(PROMPT))


# --------------------------------------------------------------------------------------------- bytes


@dataclass
class Touched:
    """Bytes that the calls on a tape read and write in a step, by the arrays that they are given; sequence
    memory aside. Left out are a step's own inputs (ids, tables of pages and of rotary angles), which NumPy
    makes anew in each."""

    read: int = 0
    written: int = 0

    def reads(self, array: Any, rows: int | None = None) -> None:
        """Rows of a buffer, or the whole of a vector or a packed matrix."""
        if array is not None:
            self.read += array.nbytes if rows is None else rows * row_bytes(array)

    def writes(self, array: Any, rows: int, accumulate: bool = False) -> None:
        self.written += rows * row_bytes(array)
        if accumulate:
            self.reads(array, rows)


def row_bytes(buffer: np.ndarray) -> int:
    return buffer.shape[1] * buffer.itemsize


class Recorder:
    """Stands before a native tape: remembers every call, and passes it on."""

    def __init__(self, team: Any, isa: str, max_rows: int) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.native = NATIVE_TAPE(team, isa, max_rows)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.native, name)

        def recorded(*args: Any, **options: Any) -> Any:
            if name not in ("run", "profile"):
                self.calls.append((name, args, options))
            parts = {"linear": lambda: (args[0], [part.native for part in args[1]], *args[2:])}
            return call(*parts.get(name, lambda: args)(), **options)

        return recorded


class RecordedPart:
    def __init__(self, matrix: Any, out: Any, **options: Any) -> None:
        self.matrix, self.out, self.options = matrix, out, options
        self.native = NATIVE_PART(matrix, out, **options)


NATIVE_TAPE, NATIVE_PART = cpu_executor.Tape, cpu_launches.Part


def account(calls: list[Any], rows: int, outputs: int, vocabulary: int) -> Touched:
    """Add up what the calls touch, by what `_native.pyi` says that each does."""
    found = Touched()
    logits_bytes, every_row = outputs * vocabulary * 4, rows
    for name, args, options in calls:
        if name == "only_outputs":
            rows = outputs if args[0] else every_row
        elif name == "embed":
            table, out, _, _, accumulate = args
            found.read += rows * table.nbytes // table.rows
            found.writes(out, rows, accumulate)
        elif name == "norm":
            x, out, *_, weight, bias = args
            some = outputs if options["gather"] else rows
            found.reads(x, some)
            found.reads(weight)
            found.reads(bias)
            found.writes(out, some, options["accumulate"])
        elif name == "linear":
            x, parts = args
            some = outputs if options["outputs_only"] else rows
            found.reads(x, some)
            for part in parts:
                for array in (part.matrix, *(part.options[k] for k in ("bias", "gate", "gate_bias"))):
                    found.reads(array)
                if part.out is None:
                    found.written += logits_bytes
                else:
                    found.writes(part.out, some, part.options["accumulate"])
        elif name == "rope_store":
            q, k, v, *_ = args
            for array in (q, k, v):
                found.reads(array, rows)
            q_norm, k_norm = args[11:13]
            found.reads(q_norm)
            found.reads(k_norm)
            rounded = options["rounded_q"]
            found.writes(q if rounded is None else rounded, rows)
        elif name == "attention":
            q, out, *_, sinks = args
            found.reads(q, rows)
            found.reads(sinks)
            found.writes(out, rows)
        else:
            raise AssertionError(f"a call that nobody counts: {name}")
    # Tokens are drawn outside of the tape, of all logits.
    found.read += logits_bytes
    found.written += 4 * outputs
    return found


EMPTY = np.uint16(0x7FC1)
"""A NaN that rounding to bfloat16 never gives: it marks what was not written, and shows who reads it."""


class Pools:
    """The KV pools of an executor whose every number is a marked NaN until it is written."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        assert isinstance(loaded.executor, CpuExecutor)
        self.arrays: dict[int, np.ndarray] = dict(loaded.executor._pools)
        for pool in self.arrays.values():
            pool[:] = EMPTY
        self.places: dict[tuple[int, int], np.ndarray] = {}  # layer and slot: where in the layer's pool

    def store(self, tokens: list[int], start: int, wanted: bool) -> int:
        """Run a step of rows that are new; the bytes that it wrote into the pools."""
        before = {layer: pool == EMPTY for layer, pool in self.arrays.items()}
        step = Step((self.loaded.rows(tokens, start, outputs=wanted),))
        self.logits = self.loaded.executor.run(self.loaded.handle, step).result().logits.copy()
        written = 0
        for layer, pool in self.arrays.items():
            changed = before[layer] & (pool != EMPTY)
            assert not np.any(~before[layer] & (pool == EMPTY))
            written += int(changed.sum()) * pool.itemsize
            self.places[layer, start] = np.flatnonzero(changed)
        return written

    def read_slots(self, token: int, start: int) -> Iterator[tuple[int, int]]:
        """The earlier (layer, slot)s that a row at `start` reads: those whose loss spoils its logits."""
        for (layer, slot), places in list(self.places.items()):
            if slot >= start:
                continue
            pool = self.arrays[layer].reshape(-1)
            kept = pool[places].copy()
            pool[places] = EMPTY
            spoilt = np.isnan(self.loaded.run([token], start)).any()
            pool[places] = kept
            if spoilt:
                yield layer, slot


@pytest.mark.parametrize("weights", ["W8A8-g32", "W16A16", "W32A32"])
@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_bytes_are_those_of_the_arrays_that_were_touched(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, family: str, weights: str
) -> None:
    monkeypatch.setattr(cpu_executor, "Tape", Recorder)
    monkeypatch.setattr(cpu_launches, "Part", RecordedPart)
    loaded = load(tiny(family).folder, "portable", weights, "KV16", threads=1)
    pools = Pools(loaded)
    tokens = list(range(2, 32))
    slot_bytes = {}
    for at, token in enumerate(tokens[:-1]):
        written = pools.store([token], at, wanted=False)
        for layer in pools.arrays:
            slot_bytes[layer] = pools.places[layer, at].size * EMPTY.itemsize
        assert written == sum(slot_bytes.values())
    last = len(tokens) - 1
    written = pools.store([tokens[-1]], last, wanted=True)
    assert np.isfinite(pools.logits).all()  # nothing that is empty was read
    read = sum(slot_bytes[layer] for layer, _ in pools.read_slots(tokens[-1], last))
    read += sum(slot_bytes.values())  # a row sees its own slot too
    touched = account(loaded.handle.tape.calls, 1, 1, loaded.program.output.width)
    step = Step((loaded.rows([tokens[-1]], last),))
    work = loaded.handle.work.at(StepLoad.of(step, loaded.program.groups))
    assert work.written_bytes == touched.written + written
    assert work.read_bytes == touched.read + read
    loaded.executor.close()


@pytest.mark.parametrize("outputs", [0, 3])
def test_bytes_of_many_rows(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, outputs: int) -> None:
    """Weights once, activations by the row; without outputs neither the head nor what of the last layer is
    behind its keys and values."""
    monkeypatch.setattr(cpu_executor, "Tape", Recorder)
    monkeypatch.setattr(cpu_launches, "Part", RecordedPart)
    loaded = load(tiny("llama3").folder, "portable", "W16A16", "KV16", threads=1)
    rows = structs.replace(loaded.rows(range(2, 14)), outputs=tuple(range(outputs)))
    pools = Pools(loaded)
    step = Step((rows,))
    loaded.executor.run(loaded.handle, step).result()
    written = sum(int((pool != EMPTY).sum()) * pool.itemsize for pool in pools.arrays.values())
    calls = loaded.handle.tape.calls
    if not outputs:  # nothing of what is only for outputs is touched, weights included
        begin = next(i for i, (name, args, _) in enumerate(calls) if name == "only_outputs" and args[0])
        calls = calls[:begin]
    touched = account(calls, 12, outputs, loaded.program.output.width)
    work = loaded.handle.work.at(StepLoad.of(step, loaded.program.groups))
    assert work.written_bytes == touched.written + written
    # A prompt reads what it has just stored; in the last layer, only what rows with outputs see.
    layers = len(pools.arrays)
    assert work.read_bytes == touched.read + written * (layers - 1 + outputs / 12) / layers
    spared = [f"layers.{layers - 1}.{part}" for part in ("o", "gate", "up", "down")] + ["head"]
    weights = loaded.executor._matrices.items()
    held = [m.nbytes for name, m in weights if name != "embed" and (outputs or name not in spared)]
    assert sum(held) < work.read_bytes < 1.5 * sum(held)
    loaded.executor.close()
