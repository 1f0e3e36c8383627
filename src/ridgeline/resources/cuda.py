"""The GPU as PyTorch sees it, without measuring anything: its facts, its free memory, why it cannot be used.

PyTorch is imported only where a question needs it: without the `cuda` extra, or without a driver, every
question here is answered in a moment. Which GPUs there are is up to CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from ridgeline.types import ConfigError

LEAST_CAPABILITY = (8, 0)
"""Compute capability from which GPUs multiply bfloat16 matrices, which the kernels need."""


@dataclass(frozen=True, slots=True)
class GPU:
    """What is known of a GPU before it is measured. `capability` is CUDA's (major, minor)."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int

    @property
    def isa(self) -> str:
        """The instruction set as compilers name it: sm_90."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def description(self) -> str:
        """The hardware as measurements on it are filed; the same under every driver."""
        gib = round(self.memory_bytes / 2**30)  # drivers keep back some megabytes more or less
        return f"{self.name}, {self.multiprocessors} multiprocessors, {gib} GiB"


def choose_device(asked: str) -> str:
    """The device that `asked` means here: "auto" is "cuda" where that can be used, else "cpu".

    Raises ConfigError when "cuda" is asked for and cannot be used.
    """
    if asked not in ("auto", "cuda"):
        return asked
    reason = cuda_unavailable()
    if asked == "cuda" and reason is not None:
        raise ConfigError(f"device is 'cuda': {reason}")
    return "cuda" if reason is None else "cpu"


def cuda_unavailable() -> str | None:
    """One line that says why CUDA cannot be used here, None where it can."""
    if any(importlib.util.find_spec(package) is None for package in ("torch", "triton")):
        return "the cuda extra is not installed; accepted: pip install 'ridgeline[cuda]'"
    # Looked for first because importing PyTorch takes seconds, which machines without a GPU should not pay.
    if not _driver_installed():
        return "no NVIDIA driver is installed; accepted: cpu"
    import torch

    if torch.version.cuda is None:
        return "the installed PyTorch is built without CUDA; accepted: a build for CUDA"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if not found:
        # PyTorch warns about a driver that is too old, and says nothing where there is no GPU.
        told_first = str(told[0].message).split(". ")[0] if told else "CUDA finds no GPU"
        return f"{told_first}; accepted: cpu"
    gpu = _facts(torch.cuda.current_device())
    if gpu.capability < LEAST_CAPABILITY:
        seen, least = (".".join(map(str, pair)) for pair in (gpu.capability, LEAST_CAPABILITY))
        return f"{gpu.name} has compute capability {seen}; accepted: {least} or newer"
    return None


def cuda_device(index: int | None = None) -> GPU:
    """The facts of one of the visible GPUs, by default the current one. Raises ConfigError."""
    reason = cuda_unavailable()
    if reason is not None:
        raise ConfigError(f"device is 'cuda': {reason}")
    import torch

    visible = torch.cuda.device_count()
    if index is not None and not 0 <= index < visible:
        raise ConfigError(f"the GPU's index is {index}; accepted: 0 to {visible - 1}")
    return _facts(torch.cuda.current_device() if index is None else index)


def cuda_devices() -> tuple[GPU, ...]:
    """The facts of every visible GPU; none where CUDA cannot be used."""
    if cuda_unavailable() is not None:
        return ()
    import torch

    return tuple(_facts(index) for index in range(torch.cuda.device_count()))


def cuda_uuid() -> str:
    """The current GPU as NVML knows it, whatever CUDA_VISIBLE_DEVICES makes of its number. Raises
    ConfigError."""
    reason = cuda_unavailable()
    if reason is not None:
        raise ConfigError(f"device is 'cuda': {reason}")
    import torch

    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def cuda_driver() -> str | None:
    """The NVIDIA driver's version, empty where the system does not say; None where there is no driver."""
    if not _driver_installed():
        return None
    try:
        told = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"^NVRM version:.*?\s(\d+(?:\.\d+)+)\s", told, re.MULTILINE)
    return found[1] if found else ""


def cuda_free_memory_bytes(index: int | None = None) -> int:
    """Device memory that tensors can still take: the driver's free memory and what PyTorch holds unused."""
    import torch

    index = torch.cuda.current_device() if index is None else index
    free_bytes, _ = torch.cuda.mem_get_info(index)
    held = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return int(free_bytes) + held


def _driver_installed() -> bool:
    """Whether the driver's library can be loaded. It is not initialised: processes may still fork."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _facts(index: int) -> GPU:
    import torch

    found = torch.cuda.get_device_properties(index)
    return GPU(
        name=found.name,
        capability=(found.major, found.minor),
        multiprocessors=found.multi_processor_count,
        memory_bytes=found.total_memory,
        l2_bytes=found.L2_cache_size,
    )
