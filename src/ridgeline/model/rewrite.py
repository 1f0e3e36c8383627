"""Rewrites of canonical programs, each a function from program to program, applied in a fixed order:
adapters, precision, shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ridgeline.model.program import (
    Attention,
    ExpertLinear,
    Kind,
    Linear,
    Operation,
    Program,
    Quantise,
    Value,
)
from ridgeline.precision.formats import Format

_KINDS: dict[int, Kind] = {8: "A8-g32", 16: "bf16"}


def with_precision(program: Program, formats: Mapping[str, Format], kv_format: str | None = None) -> Program:
    """Insert a `Quantise` before the operations that take narrower activations than float32: linears as
    their weight's format says, and attention. Its queries are rounded to bfloat16 where all linears' inputs
    are, and where no linear's input is float32 and keys are not either (`kv_format`, None: they are).

    Operations that read the same value share one quantised copy of it.
    """
    operations: list[Operation] = []
    quantised: dict[tuple[str, int], Value] = {}
    widths = {fmt.activation_bits for fmt in formats.values()}
    narrow_keys = kv_format not in (None, "KV32")
    query_bits = 16 if widths <= {16} or (narrow_keys and 32 not in widths) else 32

    def narrowed(x: Value, bits: int) -> Value:
        if bits == 32:
            return x
        if (x.name, bits) not in quantised:
            kind = _KINDS[bits]
            quantised[x.name, bits] = replace(x, name=f"{x.name}.a{bits}", kind=kind)
            operations.append(Quantise(quantised[x.name, bits], x))
        return quantised[x.name, bits]

    for op in program.operations:
        if isinstance(op, Linear | ExpertLinear):
            op = replace(op, x=narrowed(op.x, formats[op.weight.name].activation_bits))
        elif isinstance(op, Attention):
            op = replace(op, query=narrowed(op.query, query_bits))
        operations.append(op)
    return replace(program, operations=tuple(operations))
