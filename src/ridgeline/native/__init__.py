"""The CPU executor's C++: packed matrices, kernels, the tape that runs them, and the machine's probe.

Everything is in the extension `_native`; its stub documents each name.
"""

from ridgeline.native._native import (
    PAGE_TOKENS,
    Matrix,
    Part,
    StepInputs,
    Tape,
    Team,
    a8_row_bytes,
    allocate,
    copy_page,
    dequantise_a8,
    isa_levels,
    pack,
    packed_bytes,
    probe_peak,
    probe_read,
    quantise,
    routes_size,
)

__all__ = [
    "PAGE_TOKENS",
    "Matrix",
    "Part",
    "StepInputs",
    "Tape",
    "Team",
    "a8_row_bytes",
    "allocate",
    "copy_page",
    "dequantise_a8",
    "isa_levels",
    "pack",
    "packed_bytes",
    "probe_peak",
    "probe_read",
    "quantise",
    "routes_size",
]
