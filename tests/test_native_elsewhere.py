"""The kernels without Python: `tests/native` built for this machine, and for AArch64 under qemu."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from ridgeline import native

ROOT = Path(__file__).parents[1]
CROSS = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
    "-DCMAKE_EXE_LINKER_FLAGS=-static",
)


def skip_without(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """What the program prints, by machine: "here" or "aarch64"."""

    @cache
    def run(machine: str) -> list[str]:
        build = tmp_path_factory.mktemp(machine)
        options = CROSS if machine == "aarch64" else ()
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        for command in (
            ["cmake", "-S", ROOT, "-B", build, "-DRIDGELINE_CHECK=ON", *options, *generator],
            ["cmake", "--build", build, "--parallel", "2"],
        ):
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]
        program = [str(build / "tests" / "native" / "check_kernels")]
        emulator = ["qemu-aarch64"] if machine == "aarch64" else []
        ran = subprocess.run([*emulator, *program], capture_output=True, text=True, check=False)
        lines = ran.stdout.splitlines()
        failed = [line for line in lines if line.startswith("FAILED")]
        assert (ran.returncode, failed) == (0, []), ran.stderr[-2000:]
        return lines

    return run


def levels(lines: list[str]) -> set[str]:
    return {line.split()[1].rstrip(":") for line in lines if line.startswith("ok ")}


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_kernels_agree_with_plain_loops(report) -> None:  # type: ignore[no-untyped-def]
    skip_without("cmake", "c++")
    assert levels(report("here")) == set(native.isa_levels())


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_kernels_agree_with_plain_loops_on_aarch64(report) -> None:  # type: ignore[no-untyped-def]
    """With and without dot products, and every storage unpacks to the very values that it does here."""
    skip_without("cmake", "c++", "aarch64-linux-gnu-g++", "qemu-aarch64")
    lines = report("aarch64")
    assert levels(lines) == {"neon_dot", "portable"}
    here = {line for line in report("here") if line.startswith("values ")}
    assert here
    assert {line for line in lines if line.startswith("values ")} == here
