"""The full probe: samples and their spread, the disk, what is kept, and what is shown."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import math
import os
import random
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Cli, command_line
from hypothesis import given
from hypothesis import strategies as st
from test_resources import CEILINGS

from ridgeline.resources import ceilings as ceilings_module
from ridgeline.resources import cpu_probe, disk, probe
from ridgeline.resources import survey as survey_module
from ridgeline.resources.ceilings import load_ceilings
from ridgeline.resources.cpu_probe import CACHED_BYTES, cache_from, ceilings_from, thread_counts
from ridgeline.resources.disk import BLOCK_BYTES, DIRECT, measure_disk
from ridgeline.resources.machine import machine
from ridgeline.resources.measurement import Measurement, best, quickest, spread, together, typical
from ridgeline.resources.step_costs import costs_of
from ridgeline.resources.survey import Survey, load_survey, save_survey
from ridgeline.types import CapacityError

QUIET = [98.0, 99.0, 100.0, 100.5, 101.0, 99.5]


def survey_of(reads: list[float] = QUIET, share: float = 1.0, **more: Any) -> Survey:
    """What a probe with two threads finds, at made-up rates."""
    peaks = {"int8": 800e9, "bf16": 400e9, "fp32": 200e9}
    found = [best("memory read", "B/s", [rate * 2e8 for rate in reads], threads=2, how="4 streams")]
    found += [best(name, "op/s", [rate, 0.99 * rate], threads=2) for name, rate in peaks.items()]
    found += [typical("share of the cores", "share", [share], threads=2, how=name) for name in peaks]
    found += [best("memory read", "B/s", [15e9], threads=1), best("int8", "op/s", [401e9], threads=1)]
    found += [best("fp32", "op/s", [101e9], threads=1)]
    for threads in (1, 2):
        found += [
            best("cache read", "B/s", [threads * 1e11 / (step + 1)], threads=threads, bytes_each=size_bytes)
            for step, size_bytes in enumerate(CACHED_BYTES[: 8 - threads])
        ]
    found += [typical("barrier", "s", [3e-7, 4e-7, 9e-7], threads=2)]
    found += [
        typical("start", "s", [2e-6], threads=2),
        typical("start after a pause", "s", [5e-5], threads=2),
    ]
    found += [best("disk", "B/s", [1e9, 1.1e9], how=DIRECT)]
    ceilings = dataclasses.replace(CEILINGS, barrier_s=4e-7)
    return Survey(ceilings, tuple(found), **more)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path))
    return tmp_path


# ------------------------------------------------------------------------------------------- samples


@given(st.lists(st.floats(1e-9, 1e15), min_size=2, max_size=50))
def test_spread_is_that_of_numpys_percentiles(samples: list[float]) -> None:
    low, middle, high = np.percentile(samples, [10, 50, 90])
    assert spread(samples) == pytest.approx((high - low) / middle, rel=1e-6, abs=1e-9)


def test_spread_of_nothing_to_compare() -> None:
    assert spread([5.0]) == 0.0
    assert spread([0.0, 0.0]) == 0.0


def test_rates_count_at_their_best_and_costs_as_they_usually_are() -> None:
    assert best("memory read", "B/s", [1.0, 3.0, 2.0]).figure == 3.0
    assert typical("barrier", "s", [1.0, 9.0, 2.0]).figure == 2.0
    assert best("memory read", "B/s", [1.23456789e9]).samples == (1.2346e9,)


def test_costs_that_only_rise_count_by_their_lowest_quarter() -> None:
    assert quickest("barrier", "s", [9.0, 1.0, 3.0, 8.0, 2.0, 7.0, 9.0, 9.0, 9.0]).figure == 2.0
    assert quickest("barrier", "s", [5.0]).figure == 5.0


def test_passes_are_put_together() -> None:
    """Each thing once, by the rule of its kind; that a pass was slower is in the spread."""

    def passed(rate: float, cost: float, share: float, how: str) -> tuple[Measurement, ...]:
        return (
            best("memory read", "B/s", [rate, 0.9 * rate], threads=2, how=how),
            best("memory read", "B/s", [rate / 2], threads=1, how=how),
            best("cache read", "B/s", [3 * rate], threads=2, bytes_each=16),
            quickest("barrier", "s", [cost, 2 * cost], threads=2),
            typical("share of the cores", "share", [share], threads=2, how="int8"),
            typical("share of the cores", "share", [1.0], threads=2, how="fp32"),
        )

    found = together([passed(10, 4, 0.9, "a"), passed(30, 1, 0.5, "b"), passed(20, 2, 0.8, "c")])
    assert [(one.what, one.threads, one.figure) for one in found] == [
        ("memory read", 2, 30),
        ("memory read", 1, 15),
        ("cache read", 2, 90),
        ("barrier", 2, 1.5),
        ("share of the cores", 2, 0.8),
        ("share of the cores", 2, 1.0),
    ]
    assert found[0].how == "b"
    assert sorted(found[0].samples) == [9, 10, 18, 20, 27, 30]
    assert found[0].spread > 0.9
    one = passed(10, 4, 0.9, "a")
    assert together([one]) == one


@pytest.mark.parametrize("samples", [(), (1.0, math.nan), (math.inf,), (-1.0,), ("fast",), (1.0, None)])
def test_samples_that_are_no_measurement(samples: tuple[Any, ...]) -> None:
    with pytest.raises((ValueError, TypeError)):
        Measurement("int8", "op/s", 1.0, samples)


def test_a_unit_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="furlongs"):
        Measurement("int8", "furlongs", 1.0, (1.0,))


# ------------------------------------------------------------------------------------------ quietness


def test_a_quiet_machine_is_not_called_anything_else() -> None:
    found = survey_of()
    assert found.disturbance is None
    assert found.spread == pytest.approx(spread(QUIET), rel=1e-3)
    assert found.to_json()["quiet"] is True


def test_samples_that_spread_tell_of_other_work() -> None:
    steps = random.Random(1)
    found = survey_of([100.0 - 50.0 * steps.random() for _ in range(60)])
    assert found.disturbance == f"the samples spread by {found.spread:.0%}: other work is running here"
    assert 0.3 < found.spread < 0.7
    assert found.to_json()["quiet"] is False


def test_a_steady_competitor_shows_in_the_share_of_the_cores() -> None:
    found = survey_of(share=0.62)
    assert found.spread < 0.05
    assert found.disturbance == "the threads could run for 62% of the time: other work is running here"
    both = survey_of([50.0, 100.0] * 10, share=0.5).disturbance
    assert both is not None
    assert "spread by" in both
    assert " and the threads could run for 50% of the time: " in both


def test_spread_of_a_disk_or_of_a_cost_says_nothing_about_the_processor() -> None:
    calm = survey_of()
    wild = (best("disk", "B/s", [1e9, 9e9, 1e8]), typical("barrier", "s", [1e-7, 1e-3], threads=2))
    kept = tuple(one for one in calm.measurements if one.what not in ("disk", "barrier"))
    assert Survey(calm.ceilings, kept + wild).disturbance is None


# ---------------------------------------------------------------------------------------------- kept


def test_a_survey_is_kept_for_its_machine_threads_and_level(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = survey_of(absent={"disk": "it is nearly full"})
    path = save_survey(found)
    assert load_survey(2, "portable") == found
    assert load_survey(1, "portable") is None
    assert load_survey(2, "avx2") is None
    assert path.stat().st_size < 20_000
    other = dataclasses.replace(machine(), memory_bytes=machine().memory_bytes * 2)
    monkeypatch.setattr(ceilings_module, "machine", lambda: other)
    assert load_survey(2, "portable") is None


def test_an_older_schema_is_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_survey(survey_of())
    monkeypatch.setattr(survey_module, "SURVEY_VERSION", survey_module.SURVEY_VERSION + 1)
    assert load_survey(2, "portable") is None
    monkeypatch.undo()
    monkeypatch.setenv("RIDGELINE_CACHE", str(cache))
    assert load_survey(2, "portable") is not None
    # The ceilings alone, as an older release kept them under a name of their own, are no survey.
    path.write_text(json.dumps(CEILINGS.to_json()), encoding="utf-8")
    assert load_survey(2, "portable") is None
    monkeypatch.setattr(ceilings_module, "PROBE_VERSION", 1)
    assert load_ceilings(2, "portable") is None


@pytest.mark.parametrize(
    "change",
    [
        {"measurements": [{"what": "int8"}]},
        {"measurements": "none"},
        {"measurements": [7]},
        {"absent": 3},
        {"read_bytes_per_s": -1},
        {"version": None},
        {"extra": 1},
    ],
)
def test_a_damaged_survey_counts_as_none(cache: Path, change: dict[str, Any]) -> None:
    path = save_survey(survey_of())
    path.write_text(json.dumps(survey_of().to_json() | change), encoding="utf-8")
    assert load_survey(2, "portable") is None


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"\xff{", b"null"])
def test_what_is_no_survey_at_all(cache: Path, content: bytes) -> None:
    save_survey(survey_of()).write_bytes(content)
    assert load_survey(2, "portable") is None


# ------------------------------------------------------------------------------------------------ CPU


def test_thread_counts_are_few_and_have_both_ends() -> None:
    assert [thread_counts(n) for n in (1, 2, 3, 8, 12)] == [
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 4, 8),
        (1, 2, 4, 8, 12),
    ]
    for most in (64, 96, 128, 4096):
        counts = thread_counts(most)
        assert len(counts) == 5
        assert (counts[0], counts[-1]) == (1, most)
        assert list(counts) == sorted(set(counts))


def test_the_size_of_a_cache_is_where_reading_slows_down() -> None:
    """The speed of sets by how much of them `cached_share` says is still in the cache."""
    sets = [part << 22 + step for step in range(6) for part in (2, 3)]
    for cache_bytes in (10e6, 40e6, 110e6):
        held = dataclasses.replace(costs_of("cpu"), cache_bytes=cache_bytes, cache_speed=2.0).cached_share
        speeds = [(size, 1 / (1 - held(size) / 2)) for size in sets]
        found, speed = cache_from(speeds)
        assert speed == 2.0
        assert cache_bytes / 1.5 <= found <= cache_bytes * 1.001
    assert cache_from([(size, 1.1) for size in sets]) == (0.0, 1.0)
    assert cache_from([]) == (0.0, 1.0)


def test_the_cache_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_probe, "SHARED_BYTES", (1 << 20, 2 << 20))
    ceilings = dataclasses.replace(CEILINGS, threads=2, isa="portable")
    found, speed = cpu_probe.measure_cache(dataclasses.replace(ceilings, read_bytes_per_s=1e6), 0.0)
    assert speed > 1
    assert found == pytest.approx(4 << 20, rel=1e-3)
    assert cpu_probe.measure_cache(dataclasses.replace(ceilings, read_bytes_per_s=1e15), 0.0) == (0.0, 1.0)


def test_a_survey_of_this_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything measured, for as short a time as possible."""
    monkeypatch.setattr(probe, "FULL_PROBE_S", 0.01)
    levels, starts = cpu_probe.measure_levels, cpu_probe.measure_starts
    monkeypatch.setattr(cpu_probe, "measure_levels", lambda threads, isa, seconds: levels(threads, isa, 0.0))
    monkeypatch.setattr(cpu_probe, "measure_starts", lambda threads, isa, seconds: starts(threads, isa, 0.0))
    monkeypatch.setattr(disk, "FILE_BYTES", 8 * BLOCK_BYTES)
    found = probe.survey(2, "portable")
    ceilings = found.ceilings
    assert load_ceilings(2, "portable") == ceilings
    assert load_survey(2, "portable") == found
    assert (ceilings.threads, ceilings.isa, ceilings.device) == (2, "portable", "cpu")
    assert 0 < ceilings.barrier_s < 1
    memory = found.whole("memory read")
    assert memory is not None
    assert memory.figure == ceilings.read_bytes_per_s
    assert {one.threads for one in found.of("int8")} == {1, 2}
    assert {one.threads for one in found.of("memory read")} == {1, 2}
    sizes = {one.bytes_each for one in found.of("cache read")}
    assert len(sizes) >= 6
    assert sizes <= set(CACHED_BYTES)
    assert 0 < found.core_share <= 1
    assert len(memory.samples) >= 2 * probe.PASSES
    assert found.whole("disk") is not None or found.absent["disk"]
    assert list((cache / "models").iterdir()) == []


def test_other_work_is_no_news_of_the_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disturbed measurement replaces what it found better, an undisturbed one all."""
    quiet = survey_of()
    assert quiet.disturbance is None
    slow = dataclasses.replace(quiet.ceilings, read_bytes_per_s=1e9, int8_ops_per_s=9e12, barrier_s=1.0)
    busy = dataclasses.replace(survey_of(share=0.5), ceilings=slow)
    assert busy.disturbance is not None
    found = iter([busy, quiet, busy, dataclasses.replace(quiet, ceilings=slow)])
    monkeypatch.setattr(probe, "_survey_cpu", lambda *_: next(found))
    kept = []
    for _ in range(4):
        probe.survey(quiet.ceilings.threads, quiet.ceilings.isa, force=True)
        kept.append(load_ceilings(quiet.ceilings.threads, quiet.ceilings.isa))
    assert kept == [slow, quiet.ceilings, slow.best_with(quiet.ceilings), slow]


def test_a_format_without_instructions_has_no_peak() -> None:
    found = tuple(one for one in survey_of().measurements if one.what != "bf16")
    assert ceilings_from(found, 2, "portable", 0.3).bf16_flops_per_s == 0
    assert ceilings_from(found, 2, "portable", 0.3).int8_ops_per_s == 800e9


def test_a_full_disk_leaves_the_ceilings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> Measurement:
        raise CapacityError("the disk is nearly full")

    complete = survey_of()
    monkeypatch.setattr(disk, "measure_disk", full)
    monkeypatch.setattr(cpu_probe, "measure_ceilings", lambda *given: complete.measurements[:-1])
    monkeypatch.setattr(cpu_probe, "measure_levels", lambda *given: ())
    monkeypatch.setattr(cpu_probe, "measure_starts", lambda *given: ())
    found = probe.survey(2, "portable")
    assert found.absent == {"disk": "the disk is nearly full"}
    assert found.whole("disk") is None


# ----------------------------------------------------------------------------------------------- disk


def test_the_disk_is_read_and_nothing_is_left(tmp_path: Path) -> None:
    found = measure_disk(tmp_path / "models", file_bytes=12 * BLOCK_BYTES)
    assert found.figure > 0
    assert len(found.samples) == 3
    assert found.how in (DIRECT, disk.DROPPED, "F_NOCACHE", "page cache")
    assert list((tmp_path / "models").iterdir()) == []


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0


def failing(number: int) -> Callable[..., Any]:
    def call(*given: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("broken", ["write", "fsync", "preadv"])
def test_the_disk_probe_cleans_up_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    before = descriptors()
    monkeypatch.setattr(disk.os, broken, failing(errno.EIO))
    with pytest.raises(CapacityError, match=r"cannot measure the disk of .*: Input/output error"):
        measure_disk(tmp_path, file_bytes=8 * BLOCK_BYTES)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    assert descriptors() == before


def test_an_interrupt_leaves_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*given: object) -> int:
        assert list(tmp_path.iterdir()) == []  # the file has lost its name before it is written
        raise KeyboardInterrupt

    before = descriptors()
    monkeypatch.setattr(disk.os, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure_disk(tmp_path, file_bytes=8 * BLOCK_BYTES)
    monkeypatch.undo()
    assert descriptors() == before


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no O_DIRECT")
def test_a_file_system_that_cannot_pass_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def refuse(name: str, flags: int, *more: Any, **others: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return really_open(name, flags, *more, **others)

    monkeypatch.setattr(disk.os, "open", refuse)
    found = measure_disk(tmp_path, file_bytes=8 * BLOCK_BYTES)
    assert found.how == disk.DROPPED
    assert list(tmp_path.iterdir()) == []


def test_a_disk_with_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: usage(1, 0, 20 * 8 * BLOCK_BYTES))
    sizes: list[int] = []
    really_fill = disk._fill
    monkeypatch.setattr(disk, "_fill", lambda file, blocks: sizes.append(blocks) or really_fill(file, blocks))
    measure_disk(tmp_path)
    assert sizes == [16]  # a tenth of what is free
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: usage(1, 0, 600 << 20))
    with pytest.raises(CapacityError, match=r"is nearly full; measuring it takes 640 MiB free$"):
        measure_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "WRITE_S", 0.0)
    with pytest.raises(CapacityError, match=r"takes over 0 s to write 64 MiB$"):
        measure_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CapacityError, match="cannot measure the disk of"):
        measure_disk(tmp_path / "file" / "models")


# ----------------------------------------------------------------------------------- the command line


@pytest.fixture
def ridgeline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return command_line(monkeypatch, capfd, tmp_path / "cache")


def stand_in(monkeypatch: pytest.MonkeyPatch, found: Survey) -> list[int]:
    """Probes find this; the list grows with each."""
    asked: list[int] = []
    monkeypatch.setattr(probe, "_survey_cpu", lambda threads, isa: asked.append(threads) or found)
    return asked


def test_probe_prints_what_it_measured_and_keeps_it(ridgeline: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stand_in(monkeypatch, survey_of())
    found = json.loads(ridgeline("probe", "--threads", 2, "--json").out)
    assert found["read_bytes_per_s"] == CEILINGS.read_bytes_per_s
    assert found["quiet"] is True
    assert {one["what"] for one in found["measurements"]} >= {"memory read", "cache read", "barrier", "disk"}
    assert all(one["samples"] for one in found["measurements"])
    assert json.loads(ridgeline("probe", "--threads", 2, "--json").out) == found
    assert asked == [2]
    ridgeline("probe", "--threads", 2, "--force")
    assert asked == [2, 2]


def test_probe_shows_tables_and_the_roofline(ridgeline: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, survey_of())
    shown = ridgeline("probe", "--threads", 2).out
    lines = shown.splitlines()
    fact = {line[: line.index("  ")]: line for line in lines[:12] if "  " in line}
    assert "20.0 GB/s, samples spread by 2%" in fact["memory read"]
    assert fact["barrier"].endswith("0.4 µs")
    assert fact["start of a step"].endswith("2.0 µs, 50.0 µs after a pause")
    assert "1.1 GB/s" in fact["disk read"]
    assert "(O_DIRECT)" in fact["disk read"]
    assert [line.split() for line in lines if line.startswith(("16 KiB", "memory  ", "64 MiB"))] == [
        ["16", "KiB", "each", "100", "200"],
        ["64", "MiB", "each", "14.3"],
        ["memory", "15.0", "20.2"],
    ]
    assert any(line.split() == ["int8", "401", "800"] for line in lines)
    assert "ridges ◆ at int8 40, bf16 20, fp32 10" in shown
    assert "other work" not in shown


def test_probe_says_so_on_a_busy_machine(ridgeline: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = survey_of([60.0, 100.0] * 10, absent={"disk": "the disk of X is nearly full"})
    without = tuple(one for one in busy.measurements if one.what != "disk")
    stand_in(monkeypatch, dataclasses.replace(busy, measurements=without))
    shown = ridgeline("probe", "--threads", 2).out
    assert shown.splitlines()[-1] == (
        "the samples spread by 50%: other work is running here; measure again with --force when it is done"
    )
    assert "not measured: the disk of X is nearly full" in shown


def test_probe_writes_its_plot(ridgeline: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, survey_of())
    png = tmp_path / "roofline.png"
    assert ridgeline("probe", "--threads", 2, "--plot", png).code == 0
    assert png.read_bytes().startswith(b"\x89PNG\r\n")


def test_a_plot_without_matplotlib_names_the_extra_before_anything_is_measured(
    ridgeline: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = stand_in(monkeypatch, survey_of())
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    outcome = ridgeline("probe", "--threads", 2, "--plot", tmp_path / "roofline.png")
    assert outcome.code != 0
    assert outcome.err.splitlines() == [
        "error: plot needs matplotlib; accepted: no --plot, or pip install 'ridgeline[plot]'"
    ]
    assert asked == []
