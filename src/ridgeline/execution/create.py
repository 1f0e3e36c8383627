"""The executor that a device name stands for."""

from __future__ import annotations

from ridgeline.execution.base import Executor, Limits


def create_executor(device: str, limits: Limits, threads: int) -> Executor:
    """An executor of `config.DEVICES`; "auto" is the CPU. Imports only the one that is asked for."""
    if device == "reference":
        from ridgeline.execution.reference import ReferenceExecutor

        return ReferenceExecutor(limits)
    from ridgeline.execution.cpu.executor import CpuExecutor

    return CpuExecutor(limits, threads)
