"""The roofline: how long work must take at least on a machine, and what share of its limits was reached.

S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for multicore
architectures", CACM 52(4), 2009.
"""

from __future__ import annotations

from typing import Protocol

from ridgeline.resources.ceilings import Ceilings
from ridgeline.types import Work


class Limits(Protocol):
    """What a machine can do at most: `Ceilings` that were measured, or a `Preset` from a datasheet.

    A peak is 0 where the hardware has no instructions for the format; its work is charged at the fp32 peak.
    """

    @property
    def read_bytes_per_s(self) -> float: ...
    @property
    def int8_ops_per_s(self) -> float: ...
    @property
    def bf16_flops_per_s(self) -> float: ...
    @property
    def fp32_flops_per_s(self) -> float: ...


def ridge_ops_per_byte(peak_ops_per_s: float, limits: Limits) -> float:
    """The arithmetic intensity at which memory and arithmetic take equally long, at the peak of a format."""
    return peak_ops_per_s / limits.read_bytes_per_s


def memory_s(work: Work, ceilings: Limits) -> float:
    """Seconds in which the machine moves this work's bytes at its read bandwidth."""
    return work.bytes / ceilings.read_bytes_per_s


def arithmetic_s(work: Work, ceilings: Limits) -> float:
    """Seconds that this work's arithmetic takes, each format at its own peak, one after the other."""
    fp32 = ceilings.fp32_flops_per_s
    return (
        work.int8_ops / (ceilings.int8_ops_per_s or fp32)
        + work.bf16_flops / (ceilings.bf16_flops_per_s or fp32)
        + work.fp32_flops / fp32
    )


def predicted_s(work: Work, ceilings: Limits, overhead_s: float = 0.0) -> float:
    """The least time that the work can take: its memory time or its arithmetic time, and an overhead."""
    return max(memory_s(work, ceilings), arithmetic_s(work, ceilings)) + overhead_s


def launch_overhead_s(launches: int, ceilings: Ceilings, graph: bool) -> float:
    """Seconds that a step of `launches` kernels takes beside its work, launched one by one or as a graph.

    The overhead of `predicted_s`. Launches overlap with the kernels before them, so that one by one they
    cost less than this in steps whose kernels are long. 0 for a CPU, which launches nothing.
    """
    return launches * (ceilings.graph_launch_s if graph else ceilings.launch_s)


def mbu(work: Work, elapsed_s: float, ceilings: Limits) -> float:
    """Model bandwidth utilisation: the share of the read bandwidth that was used (1.0 = all of it)."""
    return memory_s(work, ceilings) / elapsed_s if elapsed_s > 0 else 0.0


def mfu(work: Work, elapsed_s: float, ceilings: Limits) -> float:
    """Model arithmetic utilisation: the share of the elapsed time that the arithmetic would take at peak."""
    return arithmetic_s(work, ceilings) / elapsed_s if elapsed_s > 0 else 0.0
