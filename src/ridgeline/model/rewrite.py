"""Rewrites of canonical programs, each a function from program to program, applied in a fixed order:
adapters, precision, shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ridgeline.model.program import Linear, Operation, Program, Quantise, Value
from ridgeline.precision.formats import Format


def with_precision(program: Program, formats: Mapping[str, Format]) -> Program:
    """Insert a `Quantise` before the linears whose weight's format takes 8-bit activations.

    Linears that read the same value share one quantised copy of it.
    """
    operations: list[Operation] = []
    quantised: dict[str, Value] = {}
    for op in program.operations:
        if isinstance(op, Linear) and formats[op.weight.name].quantises_activations:
            x = op.x
            if x.name not in quantised:
                quantised[x.name] = replace(x, name=f"{x.name}.a8", kind="A8-g32")
                operations.append(Quantise(quantised[x.name], x))
            op = replace(op, x=quantised[x.name])
        operations.append(op)
    return replace(program, operations=tuple(operations))
