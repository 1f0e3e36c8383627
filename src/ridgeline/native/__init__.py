"""The CPU executor's C++: packed matrices, kernels, the tape that runs them, and the machine's probe.

Everything is in the extension `_native`; its stub documents each name.
"""

from ridgeline.native._native import (
    BLOCK_BYTES,
    PAGE_TOKENS,
    Matrix,
    Part,
    StepInputs,
    Tape,
    Team,
    a8_row_bytes,
    allocate,
    block_sums,
    copy_page,
    dequantise_a8,
    greedy_tokens,
    isa_levels,
    pack,
    pack_rows,
    packed_bytes,
    probe_peak,
    probe_read,
    quantise,
    read_packed,
    routes_size,
)

__all__ = [
    "BLOCK_BYTES",
    "PAGE_TOKENS",
    "Matrix",
    "Part",
    "StepInputs",
    "Tape",
    "Team",
    "a8_row_bytes",
    "allocate",
    "block_sums",
    "copy_page",
    "dequantise_a8",
    "greedy_tokens",
    "isa_levels",
    "pack",
    "pack_rows",
    "packed_bytes",
    "probe_peak",
    "probe_read",
    "quantise",
    "read_packed",
    "routes_size",
]
