"""The weights on the device, by name, and those that are multiplied together stacked in one matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ridgeline.execution.cuda.arrays import Experts, Packed
from ridgeline.execution.cuda.pack import pack
from ridgeline.model.program import ExpertLinear, Linear, Route, Weight
from ridgeline.model.weights import Weights
from ridgeline.precision.formats import Format


class DeviceWeights:
    """Owns the packed matrices and the float32 vectors."""

    def __init__(self, where: torch.device) -> None:
        self._where = where
        self._matrices: dict[str, Packed] = {}
        self._vectors: dict[str, Tensor] = {}
        self._sixteen: set[str] = set()
        self._stacks: dict[tuple[str, ...], Packed] = {}

    def load(self, weights: Weights) -> None:
        """Read every weight; the store may be closed afterwards."""
        for name in weights:
            if name in weights.formats:
                packed = pack(weights.matrix(name), self._where, name)
                self.keep_matrix(name, packed, weights.formats[name])
                weights.release(name)
            else:
                self.keep_vector(name, torch.from_numpy(weights.vector(name)).to(self._where))

    def keep_matrix(self, name: str, matrix: Packed, fmt: Format) -> None:
        """Take over a matrix that lies on the device."""
        self._matrices[name] = matrix
        if fmt.activation_bits == 16:
            self._sixteen.add(name)

    def keep_vector(self, name: str, vector: Tensor) -> None:
        """Take over a float32 vector, or a table of positions, that lies on the device."""
        self._vectors[name] = vector

    def clear(self) -> None:
        for held in (self._matrices, self._vectors, self._stacks):
            held.clear()

    @property
    def matrices(self) -> Mapping[str, Packed]:
        return self._matrices

    @property
    def vectors(self) -> Mapping[str, Tensor]:
        return self._vectors

    def vector(self, weight: Weight) -> Tensor:
        return self._vectors[weight.name]

    def table(self, weight: Weight) -> tuple[Packed, bool]:
        """A matrix whose rows are looked up, and whether its values are rounded to bfloat16."""
        if weight.name in self._matrices:
            return self._matrices[weight.name], weight.name in self._sixteen
        return Packed(32, weight.shape[1], self._vectors[weight.name]), False

    def bits(self, weight: Weight) -> int:
        return self._matrices[weight.name].bits

    def stacked(self, weights: Sequence[Weight]) -> Packed:
        """Matrices of as many bits and columns, one below the other. The stack takes over their memory."""
        names = tuple(weight.name for weight in weights)
        if len(names) == 1:
            return self._matrices[names[0]]
        if names not in self._stacks:
            parts = [self._matrices[name] for name in names]
            scales = [part.scales for part in parts if part.scales is not None]
            stack = Packed(
                parts[0].bits,
                parts[0].cols,
                torch.cat([part.codes for part in parts]),
                torch.cat(scales) if scales else None,
            )
            ends = np.cumsum([part.rows for part in parts]).tolist()
            for name, part, end in zip(names, parts, ends, strict=True):
                self._matrices[name] = stack.slice(end - part.rows, end)
            self._stacks[names] = stack
        return self._stacks[names]

    def stacked_biases(self, linears: Sequence[Linear | ExpertLinear]) -> Tensor | None:
        """The linears' biases one after the other, zeros for one without; None where none has any."""
        if all(op.bias is None for op in linears):
            return None
        return torch.cat(
            [
                self.vector(op.bias).flatten()
                if op.bias
                else torch.zeros(math.prod(op.weight.shape[:-1]), device=self._where)
                for op in linears
            ]
        )

    def experts(self, linears: Sequence[ExpertLinear]) -> Experts:
        """Matrices of as many bits, experts, inputs and outputs; the stack takes over their memory."""
        count, width, _ = linears[0].weight.shape
        return Experts(self.stacked([op.weight for op in linears]), count, width)

    def router(self, op: Route) -> Tensor:
        """The router, and the gate of the shared neighbour below it: float32. Takes over their memory."""
        if op.shared_gate is None:
            return self.vector(op.router)
        parts = op.router.name, op.shared_gate.name
        whole = torch.cat([self._vectors[name] for name in parts])
        self._vectors.update(zip(parts, (whole[: op.count], whole[op.count :]), strict=True))
        return whole

    def nbytes(self, name: str) -> int:
        """Bytes of one weight."""
        return self._matrices[name].nbytes if name in self._matrices else self._vectors[name].nbytes

    def row_nbytes(self, name: str) -> int:
        """Bytes of one row of a matrix or table."""
        if name in self._matrices:
            return self._matrices[name].nbytes // self._matrices[name].rows
        return self._vectors[name].nbytes // len(self._vectors[name])
