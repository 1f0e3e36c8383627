"""Pictures as PNG, with matplotlib, which comes with an extra and is imported where one is drawn.

Figures belong to nobody but their caller: no window, no display, no state of matplotlib's own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ridgeline.types import ConfigError

EXTRA = "plot"
_DPI = 110
_PANEL = (6.0, 4.6)
"""Inches."""


def check_png(path: Path) -> None:
    """Raise ConfigError, in one line, where no picture could be written there. Nothing is written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"plot needs matplotlib; accepted: no --plot, or pip install 'ridgeline[{EXTRA}]'")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"plot is {str(path)!r}; accepted: a file whose name ends in .png")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"plot is {str(path)!r}; accepted: a file in a folder that exists")


def blank(path: Path, width: float, height: float) -> Any:
    """A matplotlib Figure of so many inches, for `path`. Raises ConfigError as `check_png` does."""
    check_png(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Any, path: Path) -> None:
    """Raises OSError where the file cannot be written."""
    figure.savefig(path, format="png", dpi=_DPI)


@dataclass(frozen=True, slots=True)
class Line:
    """Values over the x of its panel, and where they were measured, the least and the most of each: such
    values are drawn as points, others as a line."""

    name: str
    values: Sequence[float]
    between: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """Some lines over one x, both axes logarithmic, each x with a label of its own."""

    title: str
    x_name: str
    x: Sequence[float]
    y_name: str
    lines: Sequence[Line]


def write_panels(title: str, panels: Sequence[Panel], path: Path) -> None:
    """Panels side by side. Raises ConfigError as `check_png` does, OSError where nothing can be written."""
    width, height = _PANEL
    figure = blank(path, width * len(panels), height)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, panel)
    figure.suptitle(title, fontsize=10)
    save_png(figure, path)


def _draw(axes: Any, panel: Panel) -> None:
    for place, line in enumerate(panel.lines):
        if line.between:
            spread = [
                [value - low for value, (low, _) in zip(line.values, line.between, strict=True)],
                [high - value for value, (_, high) in zip(line.values, line.between, strict=True)],
            ]
            axes.errorbar(
                panel.x, line.values, spread, fmt="o", color="black", capsize=3, label=line.name, zorder=3
            )
        else:
            axes.plot(panel.x, line.values, color=f"C{place}", linewidth=1.4, label=line.name, zorder=2)
    axes.set(xscale="log", yscale="log", xlabel=panel.x_name, ylabel=panel.y_name)
    axes.set_xticks(panel.x, [f"{x:,.0f}" for x in panel.x])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
    axes.set_title(panel.title, fontsize=9)
    axes.grid(which="major", alpha=0.25)
    axes.legend(fontsize=8)
