"""The wheel of this machine, built from the source and installed where nothing else is."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
import numpy as np
from ridgeline import native

team = native.Team(2)
x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
weights = np.eye(16, 64, dtype=np.float32)
matrix = native.Matrix(native.pack(weights.view(np.uint8), "F32", 64, team), "F32", 16, 64)
zero = np.zeros(1, np.int32)
offsets = np.array([0, 1], np.int32)
for isa in native.isa_levels():
    values = native.dequantise_a8(native.quantise(x, isa), 64)
    assert np.abs(values - x).max() < 0.5 / 127, values
    out = np.zeros((1, 16), np.float32)
    tape = native.Tape(team, isa, 1)
    tape.linear(x, [native.Part(matrix, out)])
    tape.run(native.StepInputs(
        zero, zero, zero, zero, offsets, zero[:0], offsets, np.ones(1, np.int32), zero,
        np.zeros(1, np.float32), np.ones(1, np.uint8), offsets, np.zeros((1, 1), np.int32),
        np.zeros((0, 16), np.float32),
    ))
    np.testing.assert_array_equal(out, x[:, :16])
print(native.__file__)
"""


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT.anchor)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--wheel-dir", folder, "-C", f"build-dir={folder / 'build'}")
    run(sys.executable, "-m", "pip", "wheel", ROOT, *options)
    (made,) = folder.glob("ridgeline-*.whl")
    return made


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_wheel_holds_what_is_run_and_no_source_of_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = message_from_string(archive.read(metadata).decode())
    assert "ridgeline/py.typed" in names
    assert {"ridgeline/resources/machines.toml", "ridgeline/resources/grids.toml"} <= set(names)
    assert "ridgeline/native/_native.pyi" in names
    assert [name for name in names if name.startswith("ridgeline/native/_native") and name.endswith(".so")]
    sources = (".cpp", ".h", ".cmake", "CMakeLists.txt")
    assert [name for name in names if name.endswith(sources) or not name.startswith("ridgeline")] == []
    assert fields["License-Expression"] == "Apache-2.0"
    assert [name for name in names if name.endswith("licenses/LICENSE")]


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_wheel_runs_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", wheel, "numpy")
    assert str(tmp_path) in run(python, "-I", "-c", PROGRAM)
