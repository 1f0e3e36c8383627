"""The roofline as characters and as PNG, on ceilings that are made up."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_resources import CEILINGS

from ridgeline.apps import roofline_plot
from ridgeline.apps.png import Line, Panel, check_png, write_panels
from ridgeline.apps.roofline_plot import (
    LEAST_COLUMNS,
    MOST_COLUMNS,
    Point,
    Roofline,
    draw,
    engineering,
    write_png,
)
from ridgeline.cli.bench_sweep import MOST_BATCHES, batches_of
from ridgeline.types import ConfigError

POINTS = [Point("batch 1", 2.0, 30e9), Point("batch 8", 16.0, 250e9), Point("batch 64", 60.0, 500e9)]
MACHINE = Roofline("a machine", CEILINGS, {"16 KiB": 200e9, "1 MiB": 100e9}, POINTS)

GOLDEN = """\
a machine
       |                                      int8 800 Gop/s
   1 T |                                 +------------------
       |                               //  3  bf16 400 Gop/s
       |                             +----------------------
       |                           /2         fp32 200 Gop/s
       |                        //+-------------------------
       |                      //
 100 G |                    //
       |                  //
       |                //
       |              // 1
       |           ///
  10 G |         //
       |       //
       |     //
       |   //
       | //
       |/
        +------------+------------+-----------+------------+
        0.1          1           10          100         1000
        operations/s over operations/byte; the slope is 20 GB/s
        ridges + at int8 40, bf16 20, fp32 10
        1 batch 1   2 batch 8   3 batch 64
"""


def test_characters_are_where_they_belong() -> None:
    assert draw(MACHINE, LEAST_COLUMNS, unicode=False) == GOLDEN.splitlines()


def test_more_than_ascii_draws_the_same_picture() -> None:
    plain = "\n".join(draw(MACHINE, 80, unicode=False))
    drawn = "\n".join(draw(MACHINE, 80))
    assert drawn != plain
    back = str.maketrans({"╱": "/", "─": "-", "│": "|", "◆": "+", "┴": "+"})
    assert drawn.translate(back) == plain
    assert plain.isascii()


@given(
    columns=st.integers(0, 300),
    read=st.floats(1e8, 1e13),
    peaks=st.lists(st.floats(1e9, 1e16), min_size=4, max_size=4),
    points=st.lists(st.tuples(st.floats(1e-3, 1e5), st.floats(1e6, 1e16)), max_size=40),
)
def test_every_plot_has_its_size_and_its_ridges(
    columns: int, read: float, peaks: list[float], points: list[tuple[float, float]]
) -> None:
    ceilings = dataclasses.replace(
        CEILINGS,
        read_bytes_per_s=read,
        int8_ops_per_s=peaks[0],
        fp8_flops_per_s=peaks[1],
        bf16_flops_per_s=peaks[2],
        fp32_flops_per_s=peaks[3],
    )
    drawn = Roofline("m", ceilings, points=[Point(f"p{i}", *one) for i, one in enumerate(points)])
    lines = draw(drawn, columns, unicode=False)
    width = min(max(columns, LEAST_COLUMNS), MOST_COLUMNS)
    assert all(len(line) <= width + 4 for line in lines[1:20])
    assert {len(line) for line in lines if line.endswith(("-", "+")) and "|" not in line} == {width}
    assert list(drawn.peaks.values()) == sorted(peaks, reverse=True)
    for name, ridge in drawn.ridges.items():
        assert ridge * read == pytest.approx(drawn.peaks[name])
    low, high = drawn.intensities
    assert all(low < ridge < high for ridge in drawn.ridges.values())


def test_formats_that_the_hardware_lacks_are_left_out() -> None:
    found = Roofline("m", dataclasses.replace(CEILINGS, bf16_flops_per_s=0.0))
    assert list(found.peaks) == ["int8", "fp32"]
    assert not any("bf16" in line for line in draw(found, 80))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (917e9, "917 G"),
        (1.5e12, "1.5 T"),
        (9.996e11, "1 T"),
        (1e15, "1 P"),
        (20.0, "20 "),
        (1234.0, "1.23 k"),
    ],
)
def test_numbers_have_three_digits_and_a_prefix(value: float, text: str) -> None:
    assert engineering(value) == text


def test_the_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofline.png"
    write_png(MACHINE, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert 10_000 < len(content) < 150_000
    bare = tmp_path / "bare.png"
    write_png(Roofline("m", CEILINGS), bare)
    assert len(bare.read_bytes()) > 5_000


def test_points_of_series_share_a_colour_and_have_one_name(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    named = [dataclasses.replace(point, series="W16A16") for point in POINTS]
    other = [dataclasses.replace(POINTS[0], series=f"series {i}") for i in range(11)]
    roofline_plot._draw_series(axes, [*named, *other])
    drawn = axes.get_lines()
    assert [line.get_label() for line in drawn] == ["W16A16", *(one.series for one in other)]
    assert list(drawn[0].get_xdata()) == [point.ops_per_byte for point in POINTS]
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == 12
    path = tmp_path / "series.png"
    write_png(Roofline("m", CEILINGS, points=[*POINTS, *named]), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_panels_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "lines.png"
    measured = Line("measured", (1.0, 2.5), ((0.9, 1.1), (2.0, 4.0)))
    panel = Panel("t", "batch", (1, 64), "ms", (measured, Line("expected", (1.1, 2.4))))
    write_panels("all", [panel, panel], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"accepted: a file whose name ends in \.png$"):
        write_panels("all", [panel], tmp_path / "lines.pdf")


def test_a_picture_that_cannot_be_written_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, refusal in {
        tmp_path / "roof.pdf": r"^plot is '.*roof\.pdf'; accepted: a file whose name ends in \.png$",
        tmp_path / "none" / "roof.png": r"^plot is '.*roof\.png'; accepted: a file in a folder that exists$",
    }.items():
        with pytest.raises(ConfigError, match=refusal):
            check_png(path)
        with pytest.raises(ConfigError, match=refusal):
            write_png(MACHINE, path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^plot needs matplotlib; accepted: .*'ridgeline\[plot\]'$"):
        check_png(tmp_path / "roof.png")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1", (1,)),
        ("1,8,64", (1, 8, 64)),
        ("1,2,4,...,64", (1, 2, 4, 8, 16, 32, 64)),
        ("1, 2, …, 12", (1, 2, 4, 8, 12)),
        ("3,...,3000", (3, 6, 12, 24, 48, 96, 192, 384, 768, 1536, 3000)),
        ("1,...,2,7", (1, 2, 7)),
    ],
)
def test_batches_of_a_sweep(text: str, sizes: tuple[int, ...]) -> None:
    assert batches_of(text) == sizes


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            ",",
            "0",
            "0,...,8",
            "2,1",
            "1,1",
            "...,4",
            "1,...",
            "1,...,x",
            "1,-2",
            "1.5",
            "1e3",
            "٣",
            "9" * 9,
        ),
        ",".join(map(str, range(1, MOST_BATCHES + 2))),
    ],
)
def test_sweeps_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^sweep is .*; accepted: at most 64 numbers of sequences"):
        batches_of(text)
