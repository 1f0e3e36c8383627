"""What the kernels pass between each other: tensors that belong together, and how they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GROUP = 32
"""Neighbouring values of a row that share a scale, in weights and in activations."""


@dataclass(frozen=True, slots=True)
class A8:
    """Activations in A8-g32: `codes` int8 (rows, groups * 32), zeros after the width; `scales` float32
    (rows, groups)."""

    codes: Tensor
    scales: Tensor

    def __getitem__(self, rows: slice) -> A8:
        return A8(self.codes[rows], self.scales[rows])

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


Activations = Tensor | A8
"""float32 or bfloat16 (rows, width), the values of a row side by side; or A8-g32."""


@dataclass(frozen=True, slots=True)
class KVPool:
    """Keys and values of a memory group: `values` (layers, pages, kv_heads, 2, PAGE_TOKENS, head_dim), of
    bfloat16 or float32; or of KV8's int8 codes, with float32 `scales` of the same shape but for head_dim."""

    values: Tensor
    scales: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,) if self.scales is None else (self.values, self.scales)


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix of `rows` outputs by `cols` inputs as it lies on the device, output-major.

    bits 32: codes float32 (rows, cols). bits 16: codes bfloat16 (rows, cols).
    bits 8: codes int8 (rows, groups * 32), scales float16 (rows, groups); value = code * d.
    bits 4: codes uint8 (rows, groups * 16), scales float16 (rows, groups, 2) with d and m;
    value = code * d + m. Byte i of a row holds value 2i in its low half and value 2i + 1 in its high half.
    Codes beyond `cols` stand for nothing: whoever multiplies them has zeros on the other side.
    """

    bits: Literal[4, 8, 16, 32]
    cols: int
    codes: Tensor
    scales: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def slice(self, begin: int, end: int) -> Packed:
        """Some of the outputs, as a view."""
        scales = self.scales[begin:end] if self.scales is not None else None
        return Packed(self.bits, self.cols, self.codes[begin:end], scales)


@dataclass(frozen=True, slots=True)
class Experts:
    """Matrices of `count` experts with `width` outputs each, one below the other. Of several linears that are
    multiplied together, the matrices of all experts for the first come first, then those for the second; an
    expert's outputs for them lie side by side."""

    matrix: Packed
    count: int
    width: int

    @property
    def outputs(self) -> int:
        """Results that a pair of a row and an expert has."""
        return self.matrix.rows // self.count


# A block of the experts' work: an expert, where its pairs begin in `Routes.order`, and how many of them the
# block has. There may be blocks of none.
BLOCK_EXPERT, BLOCK_FIRST, BLOCK_PAIRS = 0, 1, 2
BLOCK_FIELDS = 4


@dataclass(frozen=True, slots=True)
class Routes:
    """Which experts a step's rows go to, and the work that comes of it, all int32 but `logits`.

    `table` (rows, 2 * chosen, or one more): a row's experts, the bits of their float32 scores, and those of
    the share of the experts' shared neighbour where there is one. The pair of row r and its expert in place k
    has the number r * chosen + k. `order` (pairs,) lists the pairs by expert; `blocks` (capacity,
    BLOCK_FIELDS) cuts that list; both are as long as the longest step needs. `logits` float32 (rows, experts,
    or one more) is room for the router's products.
    """

    table: Tensor
    order: Tensor
    blocks: Tensor
    logits: Tensor

    @property
    def chosen(self) -> int:
        return self.table.shape[1] // 2

    @property
    def pairs(self) -> int:
        return self.table.shape[0] * self.chosen

    @property
    def shared(self) -> bool:
        """Whether the shared neighbour has a share."""
        return self.table.shape[1] % 2 == 1

    def __getitem__(self, rows: slice) -> Routes:
        return Routes(self.table[rows], self.order, self.blocks, self.logits[rows])


@dataclass(frozen=True, slots=True)
class NormWeights:
    """A norm: float32 gain (width,), or (heads, width) where each head has its own; a layer norm's bias."""

    kind: Literal["rms", "layer"]
    eps: float
    weight: Tensor
    bias: Tensor | None = None


# An item of attention's work is a block of rows of one sequence, and which part of its memory to look at:
# the splits `split_begin` … `split_end` − 1 of each of the segments `segment_begin` … `segment_end` − 1.
# Its result is final where `partial` is −1, and else goes to that place of the partial results. Its path
# begins at place `path` of `WorkList.paths`.
ITEM_ROW, ITEM_ROWS, ITEM_SEGMENT_BEGIN, ITEM_SEGMENT_END = 0, 1, 2, 3
ITEM_SPLIT_BEGIN, ITEM_SPLIT_END, ITEM_PARTIAL, ITEM_PATH = 4, 5, 6, 7
ITEM_FIELDS = 8

# A segment: slots that hold tokens, rotary position of the first one, score bias (the bits of a float32),
# 1 where causal, and where its table of page ids begins in the group's tables.
SEGMENT_LENGTH, SEGMENT_FIRST_POSITION, SEGMENT_BIAS, SEGMENT_CAUSAL, SEGMENT_TABLE = 0, 1, 2, 3, 4
SEGMENT_FIELDS = 8

# A path says where a row on a side branch of a tree finds what it sees: in segment `segment`, what stands in
# slot `fork` and behind it lies in the slots that are listed from `slots` on. The first path, that of all
# other rows, is of no segment.
PATH_SEGMENT, PATH_FORK, PATH_SLOTS = 0, 1, 2

# A merge: a block of rows whose partial results `first` … `first + count` − 1 become one, in that order.
MERGE_ROW, MERGE_ROWS, MERGE_FIRST, MERGE_COUNT = 0, 1, 2, 3
MERGE_FIELDS = 4


@dataclass(frozen=True, slots=True)
class WorkList:
    """Attention's work in a step for one memory group; all int32, in buffers of fixed size.

    `counts` (2,) says how many of `items` (capacity, ITEM_FIELDS) and `merges` (capacity, MERGE_FIELDS)
    are to be done; what follows them is left over from other steps. `segments` (capacity, SEGMENT_FIELDS),
    `tables` (capacity,) page ids. `paths` (capacity,) are those of a step with trees.
    """

    counts: Tensor
    items: Tensor
    merges: Tensor
    segments: Tensor
    tables: Tensor
    paths: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Partials:
    """Room for partial results of attention, float32, by (partial, head of the group's packed rows).

    `mixed` (partials, kv_heads, BLOCK_M, BLOCK_D) is not yet divided by `total`; `top` and `total`
    (partials, kv_heads, BLOCK_M) are the running maximum (of scores times log2 e) and sum.
    """

    mixed: Tensor
    top: Tensor
    total: Tensor


# How a row's token is drawn; columns of an int64 (outputs, DRAW_FIELDS) tensor. Floats are the bits of a
# float64. `wanted` 0 leaves the row to the host. A temperature of 0 is greedy. `top_k` 0, `top_p` 1 and a
# `log_min_p` of −inf switch the filter off. seed is a uint64.
DRAW_WANTED, DRAW_TEMPERATURE, DRAW_TOP_K, DRAW_TOP_P = 0, 1, 2, 3
DRAW_LOG_MIN_P, DRAW_SEED, DRAW_CHOICE, DRAW_POSITION = 4, 5, 6, 7
DRAW_FIELDS = 8


MIN_BLOCK_PAIRS = 16
"""Pairs in the smallest block of the experts' work: the least that a tensor core's product takes."""


def most_blocks(pairs: int, count: int, block_pairs: int = MIN_BLOCK_PAIRS) -> int:
    """Blocks of an experts' work list, used or not: full ones, and one in part for each expert."""
    return pairs // block_pairs + count


def padded_groups(cols: int) -> int:
    """Groups that `cols` values fill, the last one perhaps in part."""
    return -(-cols // GROUP)


def empty_routes(rows: int, width: int, count: int, device: torch.device) -> Routes:
    """Room for the routes of `rows` rows to some of `count` experts, or to as many of fewer."""
    pairs = rows * (width // 2)
    table, order, blocks = (
        torch.zeros(shape, dtype=torch.int32, device=device)
        for shape in ((rows, width), (pairs,), (most_blocks(pairs, count), BLOCK_FIELDS))
    )
    return Routes(table, order, blocks, torch.zeros((rows, count + 1), device=device))


def empty_activations(kind: str, rows: int, width: int, device: torch.device) -> Activations:
    """Room for values of a program's kind: "f32", "bf16" or "A8-g32"."""
    if kind == "A8-g32":
        groups = padded_groups(width)
        codes = torch.zeros((rows, groups * GROUP), dtype=torch.int8, device=device)
        return A8(codes, torch.zeros((rows, groups), dtype=torch.float32, device=device))
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    return torch.zeros((rows, width), dtype=dtype, device=device)
