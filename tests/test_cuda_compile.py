"""Every CUDA kernel compiles for sm_80 and sm_90 as the executor launches it, and takes what the table says.

The table is tests/data/cuda_kernels.json; `python tests/cuda_compile.py --write` regenerates it. Registers
and shared memory are those of one version of Triton, whose wheel brings its assembler: with another version
the table is not compared.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

PROGRAM = Path(__file__).parent / "cuda_compile.py"
TABLE = Path(__file__).parent / "data" / "cuda_kernels.json"

MAX_REGISTERS = 255  # of a thread
MULTIPROCESSOR_REGISTERS = 65536
MAX_SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}

EXPECTED_STACK_BYTES = (
    # float64's sine and cosine reduce large angles with products on the stack: 40 bytes, or 48 with 3.6.
    ("rope._rope_table_kernel", "", 48),
    # Two registers, so that five programs fit a multiprocessor; only with --full.
    ("integer._matmul", "BITS=4 HAS_BIAS=False BLOCK_M=16 BLOCK_N=32 BLOCK_GROUPS=4", 8),
    # Two registers, with Triton 3.6 and some widths; none with 3.9, as the table shows.
    ("weight_only._matmul", "BLOCK_M=128 BLOCK_N=128", 8),
    # Heads of 256 over a float32 pool, which has no tensor cores to spare registers; only with --full.
    ("attention._attention_kernel", "MODE=2 BLOCK_M=32 BLOCK_N=16 BLOCK_D=256", 32),
    # Four registers of float32 queries over codes, where there are paths of trees (no "paths=None").
    (
        "attention._attention_kernel",
        "sinks=None GROUP=4 KV_HEADS=8 HEAD_DIM=128 PAGE_STRIDE=32768 WINDOW=0 CAP=0.0 SPLIT=512 MODE=1",
        16,
    ),
)
"""Kernels that may use the stack: a name, a part of their constants, and how much."""

pytestmark = pytest.mark.timeout(3600)
Records = list[dict[str, Any]]


def compiled(directory: Path, *options: str) -> dict[str, Any]:
    """What the program finds, in a process of its own: kernels under the interpreter cannot be compiled."""
    out = directory / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(directory / "cache")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, str(PROGRAM), "--out", str(out), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return compiled(tmp_path_factory.mktemp("compiled"))["kernels"]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return compiled(tmp_path_factory.mktemp("everything"), "--full")["kernels"]


def check_limits(records: Records) -> None:
    for record in records:
        for target, most_shared in MAX_SHARED_BYTES.items():
            threads = 32 * int(record["options"].split()[0].removeprefix("num_warps="))
            assert record[target]["registers"] <= min(MAX_REGISTERS, MULTIPROCESSOR_REGISTERS // threads), (
                record
            )
            assert record[target]["shared_bytes"] <= most_shared, record


def check_spills(records: Records) -> None:
    for record in records:
        allowed = [
            stack
            for kernel, constants, stack in EXPECTED_STACK_BYTES
            if kernel == record["kernel"] and constants in record["constants"]
        ]
        for target in MAX_SHARED_BYTES:
            used = record[target]["stack_bytes"] + record[target]["local_bytes"]
            assert used <= max(allowed, default=0), record


def test_every_kernel_stays_within_the_hardware(found: Records) -> None:
    check_limits(found)


def test_no_kernel_spills(found: Records) -> None:
    check_spills(found)


def test_every_kernel_of_the_package_is_launched(found: Records) -> None:
    """None is left out because no model here needs it."""
    package = PROGRAM.parents[1] / "src" / "ridgeline"
    files = [
        *(package / "execution" / "cuda" / "kernels").glob("*.py"),
        package / "resources" / "cuda_read.py",
    ]
    launch = re.compile(r"^ +(_\w+)\[.+\]\(", re.MULTILINE)
    started = {(path.stem, name) for path in files for name in launch.findall(path.read_text())}
    assert started == {tuple(record["kernel"].split(".")[-2:]) for record in found}


def test_kernels_take_what_the_table_says(found: Records) -> None:
    expected = json.loads(TABLE.read_text())
    if triton.__version__ != expected["triton"]:
        pytest.skip(f"the table is of Triton {expected['triton']}, and {triton.__version__} is installed")
    hint = "python tests/cuda_compile.py --write regenerates the table"
    seen, known = by_key(found), by_key(expected["kernels"])
    assert sorted(seen.keys() - known.keys()) == [], f"not in the table; {hint}"
    assert sorted(known.keys() - seen.keys()) == [], f"only in the table; {hint}"
    assert {key: seen[key] for key in seen if seen[key] != known[key]} == {}, f"differ from the table; {hint}"


def by_key(records: Records) -> dict[tuple[str, ...], dict[str, Any]]:
    """What each specialization needs, by what tells it from others."""
    return {
        tuple(value for name, value in record.items() if name not in MAX_SHARED_BYTES): {
            target: record[target] for target in MAX_SHARED_BYTES
        }
        for record in records
    }


@pytest.mark.full
def test_every_model_in_every_format(everything: Records) -> None:
    check_limits(everything)
    check_spills(everything)
