"""Compile every CUDA kernel ahead of time, for sm_80 and sm_90, and say what it takes of the hardware.

No configuration stands here: the executor runs models of real shapes without contents, at all the sizes that
its graphs have, and what it would launch is compiled. No GPU is needed, nor used.

    python tests/cuda_compile.py --write        regenerate the table in the repository
    python tests/cuda_compile.py --out FILE     write what is found elsewhere
    python tests/cuda_compile.py --full ...     every model in every format
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from cuda_models import SPECS, Setting, without_memory
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from ridgeline.config import EngineConfig
from ridgeline.execution.cuda.executor import CudaExecutor, CudaHandle
from ridgeline.execution.cuda.inputs import StepSize
from ridgeline.precision.formats import FORMATS
from ridgeline.resources.cuda_read import read_sums
from ridgeline.types import PageCopy

TABLE = Path(__file__).parent / "data" / "cuda_kernels.json"
CAPABILITIES = (80, 90)
PROCESSES = 2

SETTINGS = (
    Setting("llama-3.1-8b", "W4A16-g32"),
    Setting("llama-3.1-8b", "W8A8-g32"),
    Setting("llama-3.1-8b", "W16A16"),
    Setting("llama-3.1-8b", "W8A8-g32", "KV8"),
    Setting("llama-3.1-8b", "W16A16", "KV8"),
    Setting("llama-3.1-8b", "W32A32", "KV8"),
    Setting("llama with head norms", "W16A16"),
    Setting("qwen3-0.6b", "W8A16-g32"),
    Setting("qwen3-0.6b", "W16A16"),
    Setting("smollm2-135m", "W4A8-g32"),
    Setting("gemma-2-2b", "W16A16"),
    Setting("gemma-3-1b", "W16A16"),
    Setting("gemma-3-1b", "W32A32", "KV16"),
    Setting("gemma-3-1b", "W32A32", "KV8"),
    Setting("mixtral-8x7b", "W4A16-g32"),
    Setting("mixtral-8x7b", "W8A8-g32"),
    Setting("gpt-oss-20b", "W16A16"),
    Setting("gpt2", "W8A16-g32"),
    Setting("gpt2", "W32A32", "KV32"),
)
"""Every kernel in every way that it is called, but not at every width: that takes a quarter of an hour."""


def every_setting() -> tuple[Setting, ...]:
    kv = {name: ("KV16", "KV32", "KV8") if name == "W32A32" else ("KV16",) for name in FORMATS}
    kv["W16A16"] = ("KV16", "KV8")
    return tuple(Setting(model, name, kept) for model in SPECS for name in FORMATS for kept in kv[name])


# ------------------------------------------------------------------------------- what would be launched


class _NoGpu:
    """As much of a Triton driver as it takes to get to the compiler."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Specialization:
    """A kernel with the types and constants that it is compiled for; `key` tells it from all others."""

    key: tuple[tuple[str, Any], ...]
    source: ASTSource
    options: dict[str, Any]


_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


class Launches:
    """What Triton is asked to launch: every specialization once; nothing is compiled, nothing runs."""

    def __init__(self) -> None:
        self.found: dict[str, Specialization] = {}

    def __call__(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernel = fn.jit_function
        signature, constants, attributes = compile["signature"], compile["constants"], compile["configs"][0]
        options = json.loads(compile["specialization_data"])["options"]
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        names = [param.name for param in kernel.params]
        constant = {names[path[0]]: value for path, value in constants.items()}
        aligned = {names[path[0]] for path, found in attributes.items() if found}
        types = [
            f"{name}:{kind}{'/16' if name in aligned else ''}"
            for name, kind in signature.items()
            if name not in constant
        ]
        module = kernel.module.removeprefix("ridgeline.").removeprefix("execution.cuda.kernels.")
        key = (
            ("kernel", f"{module}.{kernel.__name__}"),
            ("arguments", " ".join(types)),
            ("constants", " ".join(f"{name}={_plain(value)}" for name, value in constant.items())),
            ("options", " ".join(f"{name}={options[name]}" for name in _OPTIONS)),
        )
        specialization = Specialization(key, ASTSource(kernel, signature, constants, attributes), options)
        self.found.setdefault(str(key), specialization)
        return True


def _plain(constant: Any) -> Any:
    return getattr(constant, "value", constant)


def sizes(handle: CudaHandle) -> list[StepSize]:
    """Every bucket of the executor's graphs, and three steps that fit none."""
    rows = EngineConfig().max_num_batched_tokens
    wanted = [StepSize(n, k, s) for n in range(1, rows + 1) for k in (0, 1) for s in (False, True)]
    buckets = {handle.graphs.bucket(size) for size in wanted} - {None}
    eager = [StepSize(3, 2, False), StepSize(rows, rows, False), StepSize(8, 8, False, paths=True)]
    return [*filter(None, buckets), *eager]


def launch_everything(executor: CudaExecutor, handle: CudaHandle) -> None:
    for size in sizes(handle):
        handle.binding.make_room(size)
        handle.launch(size)
    executor.transfer([PageCopy(group, 0, 1) for group in range(len(handle.program.groups))])


def specializations(settings: tuple[Setting, ...], capability: int) -> dict[str, Specialization]:
    """What the executor launches in these settings, and what the probe does."""
    launches = Launches()
    driver.set_active(_NoGpu(capability))
    triton.knobs.runtime.jit_cache_hook = launches
    for setting in settings:
        executor, handle = without_memory(setting)
        launch_everything(executor, handle)
        executor.close()
    read_sums(torch.empty(2**20, device="meta"), torch.empty(64, device="meta"))
    triton.knobs.runtime.jit_cache_hook = None
    return launches.found


# ------------------------------------------------------------------------------------------- compiling

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def needs(specialization: Specialization, capability: int) -> dict[str, int]:
    """Compile, and read off what a program takes. Spilled registers lie on the stack, or in local memory."""
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(specialization.source, target=target, options=specialization.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (found,) = _RESOURCES.findall(listing)
    registers, stack, _, local = map(int, found)
    return {
        "registers": registers,
        "shared_bytes": compiled.metadata.shared,
        "stack_bytes": stack,
        "local_bytes": local,
    }


_work: list[tuple[Specialization, int]] = []  # inherited by the processes that share it


def _needs(index: int) -> dict[str, int]:
    return needs(*_work[index])


def table(settings: tuple[Setting, ...]) -> list[dict[str, Any]]:
    """A record for each specialization, with what it needs for each capability, in a fixed order."""
    found = {capability: specializations(settings, capability) for capability in CAPABILITIES}
    keys = sorted(found[CAPABILITIES[0]])
    assert all(sorted(of) == keys for of in found.values()), "capabilities differ in what is launched"
    _work[:] = [(found[capability][key], capability) for key in keys for capability in CAPABILITIES]
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        answers = iter(pool.map(_needs, range(len(_work)), chunksize=1))
    return [
        dict(found[CAPABILITIES[0]][key].key)
        | {f"sm_{capability}": next(answers) for capability in CAPABILITIES}
        for key in keys
    ]


def written(records: list[dict[str, Any]]) -> str:
    """JSON with a line for each specialization, so that a difference reads well."""
    lines = ",\n".join(json.dumps(record) for record in records)
    return f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--write", action="store_const", const=TABLE, dest="out")
    where.add_argument("--out", type=Path)
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    records = table(every_setting() if arguments.full else SETTINGS)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(written(records))


if __name__ == "__main__":
    main()
