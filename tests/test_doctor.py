"""`ridgeline doctor`: what it says of this machine, and what it finds in the way."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli, command_line

from ridgeline import native
from ridgeline.apps import doctor
from ridgeline.apps.doctor import Report, examine
from ridgeline.resources import cuda, installation
from ridgeline.resources import machine as machine_module
from ridgeline.resources.ceilings import Ceilings, save_ceilings
from ridgeline.resources.cuda import GPU
from ridgeline.resources.machine import Cores

GIB = 1 << 30
PLENTY = Cores(logical=16, physical=8, allowed=8, quota=None, asked=None)
H100 = GPU("NVIDIA H100", (9, 0), 132, 80 * GIB, 50 << 20)


@pytest.fixture
def ridgeline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return command_line(monkeypatch, capfd, tmp_path / "cache")


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a GPU on which everything is as it should be."""
    for name in [*installation.environment(), *installation.HONOURED]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path))
    for name, answer in {
        "cores": PLENTY,
        "free_memory_bytes": 8 * GIB,
        "memory_limit_bytes": None,
        "huge_pages": "madvise",
        "cuda_unavailable": "no NVIDIA driver is installed; accepted: cpu",
        "cuda_driver": None,
        "cuda_devices": (),
    }.items():
        pretend(monkeypatch, name, answer)


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, answer: object) -> None:
    monkeypatch.setattr(doctor, name, lambda: answer)


def found(report: Report) -> list[str]:
    return [problem.found for problem in report.problems]


# ---------------------------------------------------------------------------------------- as a command


def test_this_machine_runs_models_and_the_answer_fits_a_screen(ridgeline: Cli) -> None:
    shown = ridgeline("doctor")
    assert shown.code == 0
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert len(lines) < 40
    assert lines[-1] == "a model can be run"
    assert any(line.startswith("instruction level  portable of ") for line in lines)
    assert any(line.startswith("energy ") for line in lines)
    facts = json.loads(ridgeline("doctor", "--json").out)
    assert facts["runs"] is True
    assert facts["levels"]["chosen"] == "portable"
    assert facts["levels"]["usable"] == native.isa_levels()
    assert facts["threads"] == machine_module.usable_cores()
    assert facts["memory"]["available_bytes"] <= facts["memory"]["total_bytes"]
    assert facts["energy"]["source"] in ("rapl", "nvml", "model", "none")
    assert facts["energy"]["detail"]


def test_settings_are_known_by_the_flags_and_secrets_are_not_shown(
    ridgeline: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIDGELINE_API_KEY", "sesame")
    monkeypatch.setenv("HF_TOKEN", "sesame")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:sesame@hub.example")
    monkeypatch.setenv("RIDGELINE_MAX_TOKEN", "3")
    monkeypatch.setenv("RIDGELINE_MAX_QUEUE", "3")
    for shown in (ridgeline("doctor"), ridgeline("doctor", "--json")):
        assert shown.code == 0
        assert "sesame" not in shown.out + shown.err
        assert shown.out.count("means nothing") == 1
        assert "RIDGELINE_MAX_TOKEN is set and means nothing" in shown.out
        assert "perhaps RIDGELINE_MAX_TOKENS is meant" in shown.out
    assert json.loads(shown.out)["environment"]["HF_TOKEN"] == "set"
    assert json.loads(shown.out)["environment"]["RIDGELINE_MAX_QUEUE"] == "3"


def test_what_no_model_can_be_run_with_is_exit_code_1(
    ridgeline: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIDGELINE_ISA", "quantum")
    shown = ridgeline("doctor")
    assert shown.code == 1
    assert shown.out.endswith("no model can be run\n")
    assert "problem: RIDGELINE_ISA is 'quantum'; accepted on this machine: " in shown.out


def test_pytorch_is_not_imported_where_there_is_no_driver(
    ridgeline: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_driver_installed", lambda: False)
    monkeypatch.setitem(sys.modules, "torch.cuda", None)
    assert "no NVIDIA driver is installed" in ridgeline("doctor").out


# -------------------------------------------------------------------------------------------- problems


@pytest.mark.usefixtures("healthy")
def test_nothing_is_wrong_with_a_healthy_machine() -> None:
    report = examine()
    assert report.problems == ()
    assert report.runs
    assert (report.threads, report.device) == (8, "cpu")
    assert (report.cache.models, report.cache.ceilings_age_days) == (0, None)


@pytest.mark.usefixtures("healthy")
def test_a_native_module_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ridgeline.native", None)
    report = examine()
    assert not report.runs
    assert report.levels == doctor.Levels()
    assert found(report)[0].startswith("the native module does not load (")


@pytest.mark.usefixtures("healthy")
def test_a_lower_level_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "isa_levels", lambda built=False: ["amx", "best", "low"][not built :])
    monkeypatch.setenv("RIDGELINE_ISA", "low")
    report = examine()
    assert report.levels == doctor.Levels(("amx", "best", "low"), ("best", "low"), "low")
    assert found(report) == ["RIDGELINE_ISA forces low and this machine runs best"]
    assert report.runs


def test_what_runs_is_among_what_was_built() -> None:
    built, usable = native.isa_levels(built=True), native.isa_levels()
    assert set(usable) <= set(built)
    assert built[-1] == usable[-1] == "portable"


CORES: list[tuple[dict[str, Any], str]] = [
    ({"quota": 2.5}, "2 of 8 cores usable: the cgroup's CPU quota is 2.5"),
    ({"quota": 0.5}, "the cgroup's CPU quota of 0.5 cores stops even one thread"),
    ({"allowed": 3}, "3 of 8 cores usable: the affinity mask has 3"),
    ({"asked": 4}, "4 of 8 cores usable: OMP_NUM_THREADS is 4"),
]


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize(("limits", "said"), CORES)
def test_fewer_cores_than_there_are(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any], said: str
) -> None:
    pretend(monkeypatch, "cores", dataclasses.replace(PLENTY, **limits))
    assert found(examine()) == [said]


@pytest.mark.usefixtures("healthy")
def test_limits_that_take_nothing_away_are_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cores", dataclasses.replace(PLENTY, quota=8.0, asked=64))
    assert found(examine()) == []
    assert found(examine(threads=9)) == ["9 threads are asked for and 8 cores are usable"]


@pytest.mark.usefixtures("healthy")
def test_little_memory_and_small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "free_memory_bytes", 300 << 20)
    pretend(monkeypatch, "memory_limit_bytes", 512 << 20)
    pretend(monkeypatch, "huge_pages", "never")
    little, pages = found(examine())
    assert little == "300 MiB of memory are free of the 512 MiB that the cgroup allows"
    assert pages == "transparent huge pages are off, which slows reading weights"


@pytest.mark.usefixtures("healthy")
def test_a_gpu_that_cannot_be_used_and_one_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the cuda extra is not installed; accepted: pip install 'ridgeline[cuda]'"
    pretend(monkeypatch, "cuda_driver", "570.86.15")
    pretend(monkeypatch, "cuda_unavailable", reason)
    (problem,) = examine().problems
    assert problem.found == "there is an NVIDIA driver, but the cuda extra is not installed"
    assert problem.remedy == "pip install 'ridgeline[cuda]'"
    pretend(monkeypatch, "cuda_unavailable", None)
    pretend(monkeypatch, "cuda_devices", (H100,))
    report = examine()
    assert found(report) == []
    assert report.cuda.gpus == (H100,)


@pytest.mark.usefixtures("healthy")
def test_a_gpu_that_is_asked_for_and_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_driver_installed", lambda: False)
    report = examine(device="cuda")
    assert not report.runs
    assert report.device is None
    assert found(report)[0].startswith("device is 'cuda': ")


@pytest.mark.usefixtures("healthy")
def test_a_cache_that_cannot_be_written_or_filled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "deep" / "cache"))
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: path != tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found(examine()) == [
        f"{tmp_path}/deep/cache cannot be written",
        "HF_HUB_OFFLINE is set and no model is in the cache",
    ]


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize(("measured", "days"), [("2020-01-01T00:00:00+00:00", 2000), ("yesterday", None)])
def test_measured_ceilings_have_an_age(measured: str, days: float | None) -> None:
    level = examine().levels.chosen
    assert level is not None
    save_ceilings(Ceilings(1e9, 1e9, 0.0, 1e9, 8, level, "a machine", measured))
    age = examine().cache.ceilings_age_days
    assert (age is None) if days is None else (age is not None and age > days)
    assert examine(threads=7).cache.ceilings_age_days is None


# ---------------------------------------------------------------------------------------- what is installed


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str, str], None]:
    """Puts a made-up distribution before those that are installed."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))

    def install(name: str, version: str, more: str = "") -> None:
        folder = tmp_path / "site" / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}"
        (folder / "METADATA").write_text(text, encoding="utf-8")

    return install


@pytest.mark.usefixtures("healthy")
def test_packages_by_extra(installed: Callable[..., None]) -> None:
    installed("madeup", "1.5")
    installed("outdated", "0.9")
    installed(
        "ridgeline",
        "9.9",
        "Provides-Extra: fast\n"
        "Requires-Dist: madeup>=1.0\n"
        "Requires-Dist: outdated>=1.0\n"
        "Requires-Dist: nowhere-to-be-found\n"
        'Requires-Dist: elsewhere; sys_platform == "elsewhere"\n'
        'Requires-Dist: madeup>=2; extra == "fast"\n',
    )
    report = examine()
    assert report.version == "9.9"
    assert [(p.extra, p.name, p.version, p.fits) for p in report.packages] == [
        ("", "madeup", "1.5", True),
        ("", "outdated", "0.9", False),
        ("", "nowhere-to-be-found", None, False),
        ("fast", "madeup", "1.5", False),
    ]
    old, missing = report.problems
    assert (old.found, old.remedy) == ("outdated is 0.9", "pip install 'outdated>=1.0'")
    assert (missing.found, missing.fatal) == ("nowhere-to-be-found is not installed", True)


# ------------------------------------------------------------------------------------------ the resources


def test_the_drivers_version(monkeypatch: pytest.MonkeyPatch) -> None:
    told = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (a@b)  "
        "Thu Jan 23 22:50:36 UTC 2025\nGCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
    )
    monkeypatch.setattr(cuda, "_driver_installed", lambda: True)
    monkeypatch.setattr(cuda.Path, "read_text", lambda self, **how: told)
    assert cuda.cuda_driver() == "570.86.15"
    monkeypatch.setattr(cuda.Path, "read_text", lambda self, **how: "something else")
    assert cuda.cuda_driver() == ""
    monkeypatch.setattr(cuda, "_driver_installed", lambda: False)
    assert cuda.cuda_driver() is None


@pytest.mark.parametrize(
    ("told", "when"), [("always [madvise] never", "madvise"), ("always madvise [never]", "never"), ("", "")]
)
def test_huge_pages(monkeypatch: pytest.MonkeyPatch, told: str, when: str) -> None:
    monkeypatch.setattr(machine_module, "_read", lambda path: told)
    assert machine_module.huge_pages() == when
