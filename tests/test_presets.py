"""Machines by their datasheets: figures that make sense together, and the names that people write."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from command_line import Cli, command_line

from ridgeline.resources.fleet import MAX_COUNT, parse_fleet
from ridgeline.resources.presets import PEAKS, Preset, presets, read_presets
from ridgeline.resources.roofline import arithmetic_s, mbu, memory_s, mfu, predicted_s, ridge_ops_per_byte
from ridgeline.types import ConfigError, Work

KNOWN = presets()
every = pytest.mark.parametrize("preset", KNOWN.values(), ids=KNOWN)


@pytest.fixture
def ridgeline(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return command_line(monkeypatch, capfd, tmp_path / "cache")


# ------------------------------------------------------------------------------------------- figures


@every
def test_units_are_plausible(preset: Preset) -> None:
    """A factor of a thousand too much or too little falls out of these ranges."""
    assert 8 << 30 <= preset.memory_bytes <= 1 << 40
    assert 50e9 <= preset.read_bytes_per_s <= 10e12
    assert 1e12 <= preset.fp32_flops_per_s <= 200e12
    assert preset.power_w is None or 50 <= preset.power_w <= 1500
    assert preset.usd_per_hour is None or 0.1 <= preset.usd_per_hour <= 20
    for link in (preset.link_bytes_per_s, preset.host_bytes_per_s):
        assert link == 0 or 10e9 <= link <= 1e12
    seconds_to_read_all = preset.memory_bytes / preset.read_bytes_per_s
    assert 0.015 <= seconds_to_read_all <= 3


@every
def test_ridge_points_are_plausible(preset: Preset) -> None:
    """Where the knee lies, in operations per byte: fp32 within what vector units have, matrix units above."""
    low, high = {"gpu": (8, 110), "cpu": (10, 45), "apple": (10, 45)}[preset.kind]
    assert low <= ridge_ops_per_byte(preset.fp32_flops_per_s, preset) <= high
    for rate in preset.peaks.values():
        assert 8 <= ridge_ops_per_byte(rate, preset) <= 1200


@every
def test_fewer_bits_are_never_slower(preset: Preset) -> None:
    peaks = preset.peaks
    by_bits = [[peaks[name] for name in group if name in peaks] for group in FORMATS_BY_BITS]
    for slower, faster in itertools.pairwise(by_bits):
        for rate in faster:
            assert all(rate >= 1.3 * other for other in slower)


FORMATS_BY_BITS = (("fp32",), ("bf16",), ("fp8", "int8"), ("fp4",))


@pytest.mark.parametrize(
    "preset", [p for p in KNOWN.values() if p.kind == "gpu" and "bf16" in p.peaks], ids=lambda p: p.name
)
def test_peaks_are_dense(preset: Preset) -> None:
    """Halving the bits doubles a tensor core's rate. A figure with sparsity beside one without would show a
    factor of four, or of one. Consumer GPUs sum bf16 products in fp32 at half the rate: there int8 is four.
    """
    expected = 4.0 if preset.name.startswith("RTX") else 2.0
    if "int8" in preset.peaks:
        assert preset.int8_ops_per_s / preset.bf16_flops_per_s == pytest.approx(expected, rel=0.02)
    if "fp8" in preset.peaks:
        assert preset.fp8_flops_per_s / preset.bf16_flops_per_s == pytest.approx(2.0, rel=0.02)


def test_what_everybody_knows() -> None:
    """Relations between machines that their vendors state."""
    read = {name: preset.read_bytes_per_s for name, preset in KNOWN.items()}
    assert read["H200"] / read["H100-SXM"] == pytest.approx(1.43, abs=0.01)
    assert (
        read["V100-16G"]
        < read["A100-40G"]
        < read["A100-80G"]
        < read["H100-SXM"]
        < read["H200"]
        < read["B200"]
    )
    assert read["H100-PCIe"] < read["H100-SXM"]
    assert read["L4"] < read["L40S"] < read["RTX3090"] < read["RTX4090"] < read["RTX5090"]
    assert KNOWN["H200"].peaks == KNOWN["H100-SXM"].peaks
    assert KNOWN["V100-32G"].peaks == KNOWN["V100-16G"].peaks
    assert KNOWN["M1"].fp32_flops_per_s == pytest.approx(2.6e12, rel=0.01)
    assert KNOWN["M1-Max"].fp32_flops_per_s == pytest.approx(10.4e12, rel=0.03)
    assert KNOWN["M2"].fp32_flops_per_s == pytest.approx(3.6e12, rel=0.01)
    for chip in ("M1", "M2"):
        assert KNOWN[f"{chip}-Ultra"].fp32_flops_per_s == 2 * KNOWN[f"{chip}-Max"].fp32_flops_per_s
    assert KNOWN["A100-80G"].link_bytes_per_s == 2 * KNOWN["V100-16G"].link_bytes_per_s


@every
def test_every_figure_has_a_source(preset: Preset) -> None:
    assert len(preset.source) > 15
    assert (preset.usd_per_hour is None) == (preset.price_source is None)
    if preset.price_source is not None:
        assert re.search(r"\d{4}-\d\d-\d\d", preset.price_source), "prices move: theirs has a date"


def test_peaks_by_the_cycle() -> None:
    """EPYC 9654: 96 cores × 2.4 GHz × 32 fp32 operations, and its twelve channels of DDR5-4800."""
    genoa = KNOWN["EPYC-9654"]
    assert genoa.fp32_flops_per_s == pytest.approx(96 * 2.4e9 * 32)
    assert genoa.int8_ops_per_s == 4 * genoa.fp32_flops_per_s
    assert genoa.read_bytes_per_s == pytest.approx(12 * 4800e6 * 8)


def test_the_roofline_reads_a_preset() -> None:
    h100 = KNOWN["H100-SXM"]
    work = Work(bf16_flops=int(989.5e12), read_bytes=int(6.7e12))
    assert memory_s(work, h100) == pytest.approx(2.0)
    assert arithmetic_s(work, h100) == pytest.approx(1.0)
    assert predicted_s(work, h100) == pytest.approx(2.0)
    assert (mbu(work, 4.0, h100), mfu(work, 4.0, h100)) == (pytest.approx(0.5), pytest.approx(0.25))
    apple = KNOWN["M1"]
    assert arithmetic_s(Work(bf16_flops=10**12), apple) == pytest.approx(1e12 / apple.fp32_flops_per_s)


TABLE = """
[X1]
kind = "gpu"
memory_gib = 16
read_bytes_per_s = 1e12
fp32_flops_per_s = 1e13
source = "a datasheet"
"""


def test_reading_a_table() -> None:
    (made,) = read_presets(TABLE).values()
    assert (made.name, made.memory_bytes, made.peaks) == ("X1", 16 << 30, {"fp32": 1e13})


@pytest.mark.parametrize(
    "change",
    [
        ('kind = "gpu"', 'kind = "abacus"'),
        ("memory_gib = 16\n", ""),
        ("read_bytes_per_s = 1e12", "read_bytes_per_s = 0"),
        ("fp32_flops_per_s = 1e13", "fp32_flops_per_s = -1e13"),
        ("fp32_flops_per_s = 1e13", "fp32_tflops = 10"),
        ("fp32_flops_per_s = 1e13", "cores = 4\nper_cycle = { fp32 = 8 }"),
        ("fp32_flops_per_s = 1e13", "cores = 4\nclock_hz = 1e9\nper_cycle = { fp13 = 8 }"),
        ('source = "a datasheet"', 'source = ""'),
    ],
)
def test_tables_that_are_refused(change: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"machine X1: .*; accepted: "):
        read_presets(TABLE.replace(*change))


# --------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("H200x8", "H200", 8),
        ("8xH100", "H100-SXM", 8),
        ("a100-80g", "A100-80G", 1),
        ("A100_80GB", "A100-80G", 1),
        ("a100 40gb pcie ×2", "A100-40G-PCIe", 2),
        ("rtx4090", "RTX4090", 1),
        ("RTX-4090x2", "RTX4090", 2),
        ("2x4090", "RTX4090", 2),
        ("MI300X", "MI300X", 1),
        ("mi300xx8", "MI300X", 8),
        ("mi300x8", "MI300X", 8),
        ("v100x10000", "V100-16G", 10_000),
        ("m4-max", "M4-Max", 1),
        ("Xeon 8480+", "Xeon-8480", 1),
        ("genoa:2", "EPYC-9654", 2),
    ],
)
def test_names(text: str, name: str, count: int) -> None:
    fleet = parse_fleet(text)
    assert (fleet.preset.name, fleet.count) == (name, count)
    assert fleet.counted == any(mark in text for mark in ("x8", "8x", "×2", "x2", "2x", "x10000", ":2"))


def test_every_name_leads_to_its_machine() -> None:
    for preset in KNOWN.values():
        for name in (preset.name, *preset.aliases):
            assert parse_fleet(name).preset is preset
            assert parse_fleet(f"{name}x3").count == 3


@pytest.mark.parametrize(
    ("text", "near"), [("h300", "H"), ("rtx4080", "RTX4090"), ("a100-60g", "A100"), ("", ""), ("x8", "")]
)
def test_unknown_names(text: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_fleet(text)
    said = str(caught.value)
    assert said.startswith(f"machine is {text!r}; accepted: a name that `ridgeline list --machines` shows, ")
    assert f"the nearest is {near}" in said
    assert "\n" not in said


@pytest.mark.parametrize("count", ["0", str(MAX_COUNT + 1)])
def test_numbers_out_of_range(count: str) -> None:
    with pytest.raises(ConfigError, match=f"machine is 'h100x{count}'; accepted: 1 to {MAX_COUNT}"):
        parse_fleet(f"h100x{count}")


# ------------------------------------------------------------------------------------------- the list


def test_list_machines(ridgeline: Cli) -> None:
    shown = ridgeline("list", "--machines")
    assert shown.code == 0
    assert re.search(
        r"^H200 +141 GiB +4800 +67 +989\.5 +1979 +1979 +206 +700 +4\.59 +NVLink 4 *$", shown.out, re.M
    )
    assert "dense" in shown.err
    found = json.loads(ridgeline("list", "--machines", "--json").out)
    assert [machine["name"] for machine in found] == list(KNOWN)
    for machine in found:
        assert machine["source"]
        assert set(PEAKS.values()) <= set(machine)
