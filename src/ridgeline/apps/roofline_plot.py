"""The roofline as a picture: speed over arithmetic intensity, with what was reached below what could be.

Both axes are logarithmic. A slope is a bandwidth, a flat is the peak of a number format, and where the
memory's slope meets a flat is that format's ridge. As characters for a terminal, and as PNG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ridgeline.apps.png import blank, save_png
from ridgeline.resources.ceilings import Ceilings
from ridgeline.resources.roofline import ridge_ops_per_byte

LEAST_COLUMNS, MOST_COLUMNS = 60, 100
_ROWS = 18
_MARGIN = 8
"""Columns left of the plot, for the labels of its axis."""

_MARKS = "123456789abcdefghijklmnopqrstuvwxyz"
_SIGNS, _COLOURS = "o^sDv*", 10
"""Of series: after so many colours the next sign begins."""

_PEAKS = {
    "int8": "int8_ops_per_s",
    "fp8": "fp8_flops_per_s",
    "bf16": "bf16_flops_per_s",
    "fp32": "fp32_flops_per_s",
}


@dataclass(frozen=True, slots=True)
class Point:
    """Something that ran: its operations by its bytes, and its operations by its seconds.

    Those of a `series` are too many to name each: in a PNG they have its colour, which is explained once.
    """

    name: str
    ops_per_byte: float
    ops_per_s: float
    series: str = ""


@dataclass(frozen=True, slots=True)
class Roofline:
    """What is drawn: a machine's roofs, the bandwidths of its caches by name, and what ran below them."""

    title: str
    ceilings: Ceilings
    caches: Mapping[str, float] = field(default_factory=dict)
    points: Sequence[Point] = ()

    @property
    def peaks(self) -> dict[str, float]:
        """Operations per second by format, the highest first; those that the hardware lacks are left out."""
        found = {name: float(getattr(self.ceilings, rate)) for name, rate in _PEAKS.items()}
        return dict(sorted(((n, p) for n, p in found.items() if p > 0), key=lambda pair: -pair[1]))

    @property
    def ridges(self) -> dict[str, float]:
        """Operations per byte at which memory and each format's arithmetic take equally long."""
        return {name: ridge_ops_per_byte(peak, self.ceilings) for name, peak in self.peaks.items()}

    @property
    def intensities(self) -> tuple[float, float]:
        """The least and most operations per byte that are shown: whole decades around everything."""
        shown = [*self.ridges.values(), *(point.ops_per_byte for point in self.points), 1.0]
        return _decade(min(shown) / 2, math.floor), _decade(max(shown) * 4, math.ceil)

    @property
    def speeds(self) -> tuple[float, float]:
        """The least and most operations per second that are shown."""
        low, _ = self.intensities
        at_left = low * self.ceilings.read_bytes_per_s
        reached = [point.ops_per_s for point in self.points]
        return min(at_left, *reached, math.inf) / 1.2, max(*self.peaks.values(), *reached, 0.0) * 1.6


# ------------------------------------------------------------------------------------------ characters


def draw(roofline: Roofline, columns: int, unicode: bool = True) -> list[str]:
    """The lines of a plot that is `columns` wide, at least LEAST_COLUMNS and at most MOST_COLUMNS.

    Points have the marks 1 to 9 and a to z in their order; the lines below the plot say what they are.
    """
    width = min(max(columns, LEAST_COLUMNS), MOST_COLUMNS) - _MARGIN
    canvas = _Canvas(roofline, width)
    signs = (
        {"slope": "╱", "flat": "─", "ridge": "◆"} if unicode else {"slope": "/", "flat": "-", "ridge": "+"}
    )
    canvas.roofs(signs)
    canvas.labels()
    for mark, point in zip(_MARKS, roofline.points, strict=False):
        canvas.put(point.ops_per_byte, point.ops_per_s, mark)
    ridges = ", ".join(f"{name} {ridge:.3g}" for name, ridge in roofline.ridges.items())
    read = engineering(roofline.ceilings.read_bytes_per_s)
    return [
        roofline.title,
        *canvas.lines("│" if unicode else "|"),
        *canvas.axis("─" if unicode else "-", "┴" if unicode else "+"),
        f"{'':{_MARGIN}}operations/s over operations/byte; the slope is {read}B/s",
        f"{'':{_MARGIN}}ridges {signs['ridge']} at {ridges}",
        *_legend(roofline.points, width),
    ]


class _Canvas:
    """Rows of characters with a logarithmic scale on either side."""

    def __init__(self, roofline: Roofline, width: int) -> None:
        self._roofline = roofline
        self._width = width
        self._cells = [[" "] * width for _ in range(_ROWS)]
        self._left, self._right = map(math.log10, roofline.intensities)
        self._bottom, self._top = map(math.log10, roofline.speeds)

    def column(self, ops_per_byte: float) -> int:
        share = (math.log10(ops_per_byte) - self._left) / (self._right - self._left)
        return min(max(round(share * (self._width - 1)), 0), self._width - 1)

    def row(self, ops_per_s: float) -> int:
        share = (self._top - math.log10(ops_per_s)) / (self._top - self._bottom)
        return round(share * (_ROWS - 1))

    def put(self, ops_per_byte: float, ops_per_s: float, sign: str) -> None:
        if ops_per_byte > 0 and ops_per_s > 0:
            self._set(self.row(ops_per_s), self.column(ops_per_byte), sign)

    def roofs(self, signs: Mapping[str, str]) -> None:
        """The slope to the highest ridge, and a flat from each ridge to the right."""
        peaks, ridges = self._roofline.peaks, self._roofline.ridges
        read = self._roofline.ceilings.read_bytes_per_s
        for column in range(self.column(max(ridges.values())) + 1):
            share = column / (self._width - 1)
            self._set(
                self.row(read * 10 ** (self._left + share * (self._right - self._left))),
                column,
                signs["slope"],
            )
        for name, peak in peaks.items():
            for column in range(self.column(ridges[name]), self._width):
                self._set(self.row(peak), column, signs["flat"])
            self.put(ridges[name], peak, signs["ridge"])

    def labels(self) -> None:
        """The name and the peak of each flat above its right end; below it where another's flat is there."""
        for name, peak in self._roofline.peaks.items():
            text = f" {name} {engineering(peak)}op/s"
            start = self._width - len(text)
            for row in (self.row(peak) - 1, self.row(peak) + 1):
                if 0 <= row < _ROWS and not "".join(self._cells[row][start:]).strip():
                    self._cells[row][start:] = text
                    break
            else:
                self._cells[self.row(peak)][start:] = text

    def lines(self, bar: str) -> list[str]:
        """The rows, with a label on the left at each decade."""
        decades = range(math.ceil(self._bottom), math.floor(self._top) + 1)
        labels = {self.row(10.0**decade): engineering(10.0**decade) for decade in decades}
        return [
            f"{labels.get(row, ''):>{_MARGIN - 2}} {bar}" + "".join(cells).rstrip()
            for row, cells in enumerate(self._cells)
        ]

    def axis(self, line: str, tick: str) -> list[str]:
        """The line below, with a label at each decade."""
        rule, labels = [line] * self._width, [" "] * (self._width + 4)
        for decade in range(round(self._left), round(self._right) + 1):
            column, text = self.column(10.0**decade), f"{10.0**decade:g}"
            rule[column] = tick
            start = max(column - len(text) // 2, 0)
            labels[start : start + len(text)] = text
        left = " " * _MARGIN
        return [left + "".join(rule), left + "".join(labels).rstrip()]

    def _set(self, row: int, column: int, sign: str) -> None:
        if 0 <= row < _ROWS:
            self._cells[row][column] = sign


def _legend(points: Sequence[Point], width: int) -> list[str]:
    """What the marks mean, in lines of at most `width`."""
    lines: list[str] = []
    for mark, point in zip(_MARKS, points, strict=False):
        text = f"{mark} {point.name}"
        if lines and len(lines[-1]) + len(text) + 3 <= width:
            lines[-1] += f"   {text}"
        else:
            lines.append(text)
    return [" " * _MARGIN + line for line in lines]


def engineering(value: float) -> str:
    """Three digits and a prefix of thousands: 917 G, 1.5 T, 20 (and a space to put a unit behind)."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale * 0.9995:
            return (
                f"{value / scale:.3g} {prefix}" if value < scale * 999.5 else f"{value / scale:.0f} {prefix}"
            )
    return f"{value:.3g} "


# ------------------------------------------------------------------------------------------------- PNG


def write_png(roofline: Roofline, path: Path) -> None:
    """Write the plot. Raises ConfigError as `check_png` does, OSError where it cannot be written."""
    figure = blank(path, 9, 5.4)
    axes = figure.subplots()
    _draw_roofs(axes, roofline)
    _draw_row(axes, [point for point in roofline.points if not point.series])
    _draw_series(axes, [point for point in roofline.points if point.series])
    low, high = roofline.speeds
    axes.set(xscale="log", yscale="log", xlim=roofline.intensities, ylim=(low, high))
    axes.set(xlabel="arithmetic intensity, operations per byte", ylabel="operations per second")
    axes.yaxis.set_major_formatter(lambda value, _: engineering(value).strip())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(roofline.title, fontsize=10)
    axes.grid(which="major", alpha=0.25)
    save_png(figure, path)


def _draw_roofs(axes: Any, roofline: Roofline) -> None:
    low, high = roofline.intensities
    peaks, ridges = roofline.peaks, roofline.ridges
    top = max(peaks.values())
    for name, read in roofline.caches.items():
        axes.plot([low, top / read], [low * read, top], color="0.7", linewidth=1, linestyle="--", zorder=1)
        at = max(low * 1.15, roofline.speeds[0] * 1.3 / read)
        axes.annotate(
            f"{name} {engineering(read)}B/s",
            (at, at * read),
            fontsize=7,
            color="0.45",
            ha="left",
            va="bottom",
        )
    read = roofline.ceilings.read_bytes_per_s
    ridge = max(ridges.values())
    axes.plot([low, ridge], [low * read, ridge * read], color="black", linewidth=1.6, zorder=2)
    middle = math.sqrt(low * min(ridges.values()))
    axes.annotate(
        f"memory {engineering(read)}B/s",
        (middle, middle * read),
        xytext=(6, -4),
        textcoords="offset points",
        fontsize=8,
        va="top",
    )
    for place, (name, peak) in enumerate(peaks.items()):
        colour = f"C{place}"
        axes.plot([ridges[name], high], [peak, peak], color=colour, linewidth=1.6, zorder=2)
        axes.plot([ridges[name]], [peak], marker="D", markersize=5, color=colour, zorder=3)
        text = f"{name} {engineering(peak)}op/s, ridge at {ridges[name]:.3g}"
        axes.annotate(text, (high, peak), xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=8)


def _draw_series(axes: Any, points: Sequence[Point]) -> None:
    """One sign and colour for each series."""
    names = list(dict.fromkeys(point.series for point in points))
    for place, name in enumerate(names):
        some = [point for point in points if point.series == name]
        axes.plot(
            [point.ops_per_byte for point in some],
            [point.ops_per_s for point in some],
            _SIGNS[place // _COLOURS % len(_SIGNS)],
            color=f"C{place % _COLOURS}",
            markersize=5,
            alpha=0.7,
            label=name,
            zorder=4,
        )
    if names:
        axes.legend(loc="lower right", fontsize=7)


def _draw_row(axes: Any, points: Sequence[Point]) -> None:
    """Points that follow one another, each with its name."""
    if not points:
        return
    x, y = [p.ops_per_byte for p in points], [p.ops_per_s for p in points]
    axes.plot(x, y, color="tab:purple", linewidth=0.8, marker="o", markersize=5, zorder=4)
    for place, point in enumerate(points):  # names in turn on either side, because neighbours lie close
        axes.annotate(
            point.name,
            (point.ops_per_byte, point.ops_per_s),
            xytext=(5, -9) if place % 2 == 0 else (-5, 5),
            textcoords="offset points",
            ha="left" if place % 2 == 0 else "right",
            fontsize=7,
            zorder=4,
        )


def _decade(value: float, rounded: Any) -> float:
    return float(10.0 ** rounded(math.log10(value)))
