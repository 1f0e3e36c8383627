"""Types of the C++ extension: kernels of the CPU executor, the tape that runs them, and the machine's probe.

Arrays are C-contiguous unless a stride is named. A ValueError is one line that names the argument, what was
seen and what would be accepted. Shapes are in elements.

Buffers of activations:
  float32  (max_rows, stride), stride a multiple of 16 and at least the width; the columns beyond the width
           hold anything.
  A8       uint8 (max_rows, a8_row_bytes(width)), 64-byte aligned: int8 codes in groups of 32 with, per group,
           a scale, the sums of its two halves of codes and scale times the sum of both.
  bfloat16 uint16 (max_rows, stride), stride a multiple of 32 and at least the width: the values' bits, and a
           zero behind the last where the width is odd.
  routes   int32 (routes_size(max_rows, width),), which a launch fills: for each row `chosen` experts, as many
           scores (bits of float32) and, with a shared gate, its score; then work lists of the kernels.
           width is 2 * chosen, and 1 more with a shared gate.
Where a row has a result for each of its experts, buffers have as many rows for each of max_rows.
KV pool of a layer: uint16 (bfloat16 bits) or float32, (pages, kv_heads, 2 * PAGE_TOKENS * head_dim); or
uint8, (pages, kv_heads, 2 * PAGE_TOKENS * (head_dim + 4)): int8 codes, then the float32 scales of keys and
those of values.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ridgeline.execution.draw import Adjustment
from ridgeline.types import Draw

_Buffer: TypeAlias = NDArray[np.float32] | NDArray[np.uint8] | NDArray[np.uint16]
_Pool: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]

PAGE_TOKENS: int
"""Slots in a KV page."""

def isa_levels(built: bool = False) -> list[str]:
    """Instruction-set levels that this machine can run, the fastest first; the last is always "portable".

    A level whose instructions are slower here than those that they stand for comes after the one below it.
    With `built`, all that were compiled in, also those that this machine lacks.
    """

def tile_rows(isa: str) -> int:
    """Rows that a linear layer multiplies by weights that it has unpacked once; more are computed in several
    turns. Raises ValueError for a level that this machine does not have."""

def allocate(size_bytes: int, huge_pages: bool = True) -> NDArray[np.uint8]:
    """Zeroed memory, 64-byte aligned. From 2 MiB on it takes memory only where it is touched; with
    `huge_pages` in pages of 2 MiB, which suits what is read in long runs."""

def packed_bytes(storage: str, rows: int, cols: int) -> int:
    """Bytes that `pack` makes of a (rows, cols) matrix; storage is the GGUF type's name.

    Raises ValueError for one that is not packed, and for cols that its blocks of 256 do not divide.
    """

def pack(
    data: NDArray[np.uint8],
    storage: str,
    cols: int,
    team: Team,
    out: NDArray[np.uint8] | None = None,
    experts: int = 1,
) -> NDArray[np.uint8]:
    """Repack GGUF blocks, (rows, row_bytes), into tiles of 16 rows. 1-D, 64-byte aligned.

    Rows of several experts, one after the other, become the tiles of each of them.

    With `out` (1-D, packed_bytes long, 64-byte aligned) the tiles are written there and it is returned.
    """

def pack_rows(data: NDArray[np.uint8], storage: str, cols: int, team: Team, out: NDArray[np.uint8]) -> bool:
    """Repack GGUF blocks, (rows, row_bytes), into `out`, 1-D and packed_bytes long, as tiles of a matrix.

    False where a scale, or a value of a storage without scales, may not be finite: where it is not, and for
    the largest exponents of MXFP4.
    """

BLOCK_BYTES: int
"""Bytes that `block_sums` and `read_packed` sum up together; the last of them may be fewer."""

def block_sums(data: NDArray[np.uint8], team: Team) -> NDArray[np.uint64]:
    """A sum of each block of `data`, 1-D, that damage of any one byte changes. It is not for security."""

def read_packed(
    descriptor: int, offset: int, out: NDArray[np.uint8], sums: NDArray[np.uint64], team: Team
) -> bool:
    """Fill `out`, 1-D, from an open file; False if the file ends before, cannot be read or has other sums.

    `out` then holds anything.
    """

def routes_size(max_rows: int, width: int) -> int:
    """Elements of a routes buffer."""

def a8_row_bytes(width: int) -> int:
    """Bytes of one row of an A8 buffer."""

def quantise(x: NDArray[np.float32], isa: str) -> NDArray[np.uint8]:
    """Quantise (rows, width) to an A8 buffer with the kernels' own rule."""

def dequantise_a8(a8: NDArray[np.uint8], width: int) -> NDArray[np.float32]:
    """Codes times scales of an A8 buffer: (rows, width)."""

def copy_page(pool: _Pool, source: int, target: int) -> None:
    """Copy one page of one layer's KV pool."""

def copy_slots(pool: _Pool, head_dim: int, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
    """Copy single slots of one layer's KV pool, as if all were read before any is written. Slot s of page p
    is number p * PAGE_TOKENS + s."""

def probe_read(team: Team, working_set_bytes: int, seconds: float) -> list[tuple[str, list[float]]]:
    """Bytes per second of reading from memory by several access patterns, about `seconds` each: samples.

    Every probe_ function returns the samples of what it measures, at least two.
    """

def probe_cached_read(team: Team, isa: str, worker_bytes: int, seconds: float) -> list[float]:
    """Bytes per second of all workers together when each reads `worker_bytes` of its own again and again."""

def probe_peak(team: Team, isa: str, format: str, seconds: float) -> list[float]:
    """Peak operations per second (a multiply-add is two) for "int8", "bf16" or "fp32"; empty where the level
    has no instructions for the format."""

def probe_barrier(team: Team, seconds: float) -> list[float]:
    """Seconds that the end of one phase and the start of the next take, of work that all workers share
    evenly."""

def probe_start(team: Team, pause_s: float, seconds: float) -> list[float]:
    """Seconds that starting a run takes, each after a pause of `pause_s` in which the workers may sleep."""

class Team:
    """Persistent threads that run a tape; worker 0 is the caller. One run at a time, others wait."""

    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...
    def rouse(self) -> None:
        """Wake threads that sleep, for a run that will come soon."""

    def close(self) -> None:
        """Join the threads. Idempotent; a closed team raises RuntimeError when it is asked to run."""

class Drawer:
    """Draws as `ridgeline.execution.draw` says, bit for bit, with a team's threads: whole rows each, one
    after the other, without the GIL. It implements `RowDrawer`.

    Raises ValueError for arrays and seeds of another kind, ids that are not below the vocabulary, and lists
    that are not as long as there are rows.
    """

    def __init__(self, team: Team, isa: str) -> None: ...
    def rows(
        self,
        logits: NDArray[np.float32],
        draws: Sequence[Draw | None],
        adjustments: Sequence[Adjustment | None] = (),
    ) -> NDArray[np.int32]: ...

class Matrix:
    """A packed matrix, or one for each of some experts; keeps its memory alive.

    `storage` is the GGUF type that it was packed from. `unpack_row` counts through all experts.
    """

    def __init__(
        self, packed: NDArray[np.uint8], storage: str, rows: int, cols: int, experts: int = 1
    ) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def storage(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def unpack_row(self, row: int) -> NDArray[np.float32]: ...

class Part:
    """One output of a linear launch: y = matrix·x + bias, then act(y), or act(gate·x + gate_bias) * y.

    `out` is a float32 buffer (`accumulate`: out += y), an A8 or bfloat16 buffer (y is quantised in the same
    pass) or None for the step's logits. `activation`: "none", "silu", "gelu_tanh", "gelu" or "clamped_silu",
    which is x sigmoid(1.702 x) of min(x, 7) and makes y clip(y, -7, 7) + 1 where there is a gate. Biases are
    (rows,), of experts (experts, rows).
    """

    def __init__(
        self,
        matrix: Matrix,
        out: _Buffer | None,
        bias: NDArray[np.float32] | None = None,
        gate: Matrix | None = None,
        gate_bias: NDArray[np.float32] | None = None,
        activation: str = "none",
        accumulate: bool = False,
    ) -> None: ...

class StepInputs:
    """The arrays of one step. Rows are grouped by sequence, in order.

    tokens, positions, slots, row_sequence: int32 (rows,); sequence_row_begin int32 (sequences + 1,);
    output_rows int32 (outputs,); segment_begin int32 (sequences + 1,); segment_length, segment_first_position
    int32, segment_bias float32, segment_causal uint8 (segments,); table_begin int32 (segments + 1,);
    tables int32 (groups, pages); logits float32 (at least outputs, vocabulary). Where a sequence is a tree,
    parents int32 (rows,) has for each row the row that it follows, -1 where that is none of the step's.
    """

    def __init__(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        slots: NDArray[np.int32],
        row_sequence: NDArray[np.int32],
        sequence_row_begin: NDArray[np.int32],
        output_rows: NDArray[np.int32],
        segment_begin: NDArray[np.int32],
        segment_length: NDArray[np.int32],
        segment_first_position: NDArray[np.int32],
        segment_bias: NDArray[np.float32],
        segment_causal: NDArray[np.uint8],
        table_begin: NDArray[np.int32],
        tables: NDArray[np.int32],
        logits: NDArray[np.float32],
        parents: NDArray[np.int32] | None = None,
    ) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def outputs(self) -> int: ...

class Tape:
    """Kernel launches with their pointers bound; `run` walks them in one call. Keeps every array alive.

    A row's result depends on its own sequence alone: not on the other rows, the team's size or the pages.
    """

    def __init__(self, team: Team, isa: str, max_rows: int) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def launches(self) -> list[str]:
        """Names of the launches, in order; `profile` gives their times in the same order."""

    def only_outputs(self, only: bool) -> None:
        """Whether launches that are appended from now on compute only the rows that have outputs, each where
        it lies; what the others have in their buffers stays. Of norm, quantise, add, activate, linear and
        attention. Raises ValueError when a launch of another kind is appended while this is on."""

    def embed(
        self,
        matrix: Matrix,
        out: NDArray[np.float32],
        scale: float = 1.0,
        source: str = "tokens",
        accumulate: bool = False,
    ) -> None:
        """out = scale * row of the matrix by token id or by rotary position ("positions")."""

    def norm(
        self,
        x: NDArray[np.float32],
        out: _Buffer,
        kind: str,
        eps: float,
        width: int,
        weight: NDArray[np.float32] | None = None,
        bias: NDArray[np.float32] | None = None,
        gather: bool = False,
        accumulate: bool = False,
    ) -> None:
        """RMS ("rms") or layer ("layer") norm of each row. `gather`: output row i is that of x row
        output_rows[i]. `accumulate`: out += norm(x)."""

    def quantise(
        self,
        x: NDArray[np.float32],
        out: NDArray[np.uint8] | NDArray[np.uint16],
        width: int,
        gather: bool = False,
        experts: int = 1,
    ) -> None:
        """out = x, quantised to A8 or rounded to bfloat16; `experts` results of each row."""

    def add(self, x: NDArray[np.float32], out: NDArray[np.float32], width: int) -> None:
        """out += x."""

    def activate(
        self,
        x: NDArray[np.float32],
        out: _Buffer,
        width: int,
        activation: str,
        times: NDArray[np.float32] | None = None,
        experts: int = 1,
    ) -> None:
        """out = act(x), or act(x) * times, as a gated `Part` does; `experts` results of each row."""

    def linear(self, x: _Buffer, parts: Sequence[Part], outputs_only: bool = False) -> None:
        """All parts share x: A8 for quantised matrices, bfloat16 for BF16, float32 for the others.
        `outputs_only`: run over as many rows as the step has outputs (buffers hold gathered rows), as parts
        that write logits must."""

    def route(
        self,
        x: NDArray[np.float32],
        out: NDArray[np.int32],
        router: Matrix,
        chosen: int,
        renormalise: bool,
        bias: NDArray[np.float32] | None = None,
        shared_gate: NDArray[np.float32] | None = None,
    ) -> None:
        """The `chosen` experts with the largest softmax(router·x + bias), ties to the lower one, in
        descending order; their scores, of which the sum is 1 if `renormalise`; and sigmoid(shared_gate·x).
        The router is F32, `out` a routes buffer. At most 4096 experts."""

    def experts(self, x: _Buffer, routes: NDArray[np.int32], part: Part, x_by_expert: bool = False) -> None:
        """The part's matrix for each expert of a row: output row * chosen + k is that of its k-th. A row's
        experts read the same x, or one row each if `x_by_expert`. `routes` is where the latest launch on that
        buffer routes to, with as many experts as the matrix."""

    def combine(
        self,
        x: NDArray[np.float32],
        routes: NDArray[np.int32],
        out: _Buffer,
        width: int,
        shared: NDArray[np.float32] | None = None,
        accumulate: bool = False,
    ) -> None:
        """out = the sum over a row's experts of their scores times what they gave, in the order of the
        routes, then of the shared score times `shared`. `accumulate`: out += it."""

    def softcap(self, width: int, cap: float) -> None:
        """logits = cap * tanh(logits / cap)."""

    def rope_store(
        self,
        q: NDArray[np.float32],
        k: NDArray[np.float32],
        v: NDArray[np.float32],
        pool: _Pool,
        group: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        cos: NDArray[np.float32] | None = None,
        sin: NDArray[np.float32] | None = None,
        rotary_dim: int = 0,
        q_norm: NDArray[np.float32] | None = None,
        k_norm: NDArray[np.float32] | None = None,
        eps: float = 1e-6,
        norm_kind: str = "rms",
        norm_by_head: bool = False,
        rounded_q: NDArray[np.uint16] | None = None,
    ) -> None:
        """Per row: "rms" or "layer" norm of each head of q and k (optional), rotate-half rope on the first
        `rotary_dim` of each head with cos, sin (max_rows, rotary_dim / 2), then k and v to the row's slot as
        the pool stores them. q_norm and k_norm hold head_dim gains, or so many for each head in turn if
        `norm_by_head`. q is written to the bfloat16 buffer `rounded_q`, or else back in place; k is left as
        it was."""

    def attention(
        self,
        q: NDArray[np.float32] | NDArray[np.uint16],
        out: _Buffer,
        pool: _Pool,
        group: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: NDArray[np.float32] | None = None,
    ) -> None:
        """Softmax attention of each row over its sequence's segments. `q` is float32 or bfloat16; `out` is
        float32, bfloat16, or A8 where head_dim is a multiple of 32. `window` 0 sees everything, `softcap` 0
        leaves scores as they are. `sinks` (heads,) are one more score of each head, which has no value."""

    def run(self, step: StepInputs) -> None:
        """Run one step, without the GIL. ValueError if the step does not fit or contradicts itself."""

    def profile(self, step: StepInputs) -> list[float]:
        """The same as `run`; seconds per launch, as worker 0 sees them."""
