"""Show a comparison: a table on standard output, and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.peers.figures import OURS
from ridgeline.apps.png import blank, save_png

_SHARES = {"mbu": "of the read bandwidth", "int8_share": "of the int8 peak"}


def lines(name: str, cell: Mapping[str, Any]) -> list[str]:
    """A cell's part of the table, from its JSON."""
    limits = (
        f"read {_range(cell['read_bytes_per_s'], 1e9)} GB/s, int8 {_range(cell['int8_ops_per_s'], 1e9)} Gop/s"
    )
    head = f"{'':<16}{cell['unit']:>10}  {'least to most':<19}"
    shown = [f"{name}: {cell['what']}; {limits}", head + f"{'Ridgeline is':<14}{'of pairs':<26}best rounds"]
    for system, figures in cell["systems"].items():
        if "failed" in figures:
            shown.append(f"{system:<16}  none: {figures['failed']}")
            continue
        rate = figures["rate"]
        between = f"{_short(rate['least'])} to {_short(rate['most'])}"
        shown.append(f"{system:<16}{_short(rate['median']):>10}  {between:<19}{_against(system, figures)}")
    return shown


def _against(system: str, figures: Mapping[str, Any]) -> str:
    parts = [
        f"{share['median']:.0%} ({share['least']:.0%} to {share['most']:.0%}) {_SHARES[key]}"
        for key, share in figures.items()
        if key in _SHARES
    ]
    ratio = figures.get("ridgeline_over_it")
    if ratio is not None:
        pairs = ratio["of_pairs"]
        times = f"{ratio['of_medians']:.2f}×"
        spread = f"{pairs['median']:.2f} ({pairs['least']:.2f} to {pairs['most']:.2f})"
        parts.insert(0, f"{times:<14}{spread:<26}{ratio['of_best']:.2f}")
    return "  ".join(parts)


def _range(spread: Mapping[str, float], unit: float) -> str:
    return f"{spread['median'] / unit:.1f} ({spread['least'] / unit:.1f} to {spread['most'] / unit:.1f})"


def _short(value: float) -> str:
    """Three digits and more of a rate."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """A panel for each cell: the systems' medians with the least and the most, and our ratio to each."""
    cells = result["cells"]
    columns = min(len(cells), 3)
    rows = -(-len(cells) // columns)
    widest = max(len(cell["systems"]) for cell in cells.values())
    figure = blank(path, 5.2 * columns, rows * (1.3 + 0.4 * widest))
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for panel, (name, cell) in zip(axes, cells.items(), strict=False):
        _panel(panel, name, cell)
    for panel in list(axes)[len(cells) :]:
        panel.set_visible(False)
    figure.suptitle(f"{Path(result['model']).name}, {result['threads']} threads, {result['rounds']} rounds")
    save_png(figure, path)


def _panel(axes: Any, name: str, cell: Mapping[str, Any]) -> None:
    systems = list(cell["systems"].items())
    axes.set_title(f"{name}: {cell['what']}", fontsize=9)
    axes.set_xlabel(cell["unit"], fontsize=8)
    axes.set_yticks(range(len(systems)), [system for system, _ in systems])
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()
    most = max((f["rate"]["most"] for _, f in systems if "rate" in f), default=1.0)
    for place, (system, figures) in enumerate(systems):
        if "failed" in figures:
            axes.text(0, place, " not measured", va="center", fontsize=8)
            continue
        rate = figures["rate"]
        error = [[rate["median"] - rate["least"]], [rate["most"] - rate["median"]]]
        colour = "tab:blue" if system == OURS else "tab:gray"
        axes.barh(place, rate["median"], xerr=error, color=colour, capsize=3)
        said = _short(rate["median"])
        if "ridgeline_over_it" in figures:
            said += f", Ridgeline is {figures['ridgeline_over_it']['of_medians']:.2f}×"
        axes.text(rate["most"] + 0.02 * most, place, said, va="center", fontsize=8)
    axes.set_xlim(0, 1.6 * most)
    axes.set_ylim(len(systems) - 0.5, -0.5)
