"""Show what a probe found: the ceilings, tables by number of threads, and the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ridgeline.apps.roofline_plot import Roofline, draw
from ridgeline.cli.figures import parallel_units, peaks
from ridgeline.cli.output import console, facts, plot, table

if TYPE_CHECKING:
    from ridgeline.resources.measurement import Measurement
    from ridgeline.resources.survey import Survey


def show(found: Survey) -> None:
    """Everything, and a last line where other work ran on the machine."""
    facts(_rows(found))
    _show_reads(found)
    _show_peaks(found)
    print()
    picture = roofline_of(found)
    plot(lambda columns, unicode: draw(picture, columns, unicode))
    if found.disturbance is not None:
        again = "measure again with --force when it is done"
        console().print(f"\n{found.disturbance}; {again}", style="bold", soft_wrap=True)


def roofline_of(found: Survey) -> Roofline:
    """The roofs, and the bandwidths of working sets that caches hold, with all threads."""
    ceilings = found.ceilings
    cached = [one for one in found.of("cache read") if one.threads in (0, ceilings.threads)]
    return Roofline(
        f"{ceilings.machine}: {ceilings.threads} {parallel_units(ceilings)}, {ceilings.isa}",
        ceilings,
        {_binary(one.bytes_each): one.figure for one in cached[::2]},
    )


def _rows(found: Survey) -> dict[str, Any]:
    """Names and values. What belongs to a GPU alone is left out for a CPU, and the other way round."""
    ceilings, gpu = found.ceilings, found.ceilings.device == "cuda"
    formats = ("int8", "fp8", "bf16", "fp32") if gpu else ("int8", "bf16", "fp32")
    rows = {
        "machine": ceilings.machine,
        parallel_units(ceilings): ceilings.threads,
        "instruction level": ceilings.isa,
        "memory read": _with_spread(found, "memory read", _bandwidth(ceilings.read_bytes_per_s)),
        **dict.fromkeys(formats, "not at this level"),
        **{name: _with_spread(found, name, peak) for name, peak in peaks(ceilings).items()},
    }
    if gpu:
        in_graph = _microseconds(ceilings.graph_launch_s)
        rows["kernel launch"] = f"{_microseconds(ceilings.launch_s)}, {in_graph} in a graph"
        rows["host to device"] = _bandwidth(ceilings.host_to_device_bytes_per_s)
        rows["device to host"] = _bandwidth(ceilings.device_to_host_bytes_per_s)
    else:
        rows["barrier"] = _microseconds(ceilings.barrier_s)
        awake, asleep = found.whole("start"), found.whole("start after a pause")
        if awake is not None and asleep is not None:
            rows["start of a step"] = (
                f"{_microseconds(awake.figure)}, {_microseconds(asleep.figure)} after a pause"
            )
    disk = found.whole("disk")
    rows["disk read"] = (
        _with_spread(found, "disk", _bandwidth(disk.figure)) + f" ({disk.how})"
        if disk is not None
        else f"not measured: {found.absent.get('disk', 'not asked for')}"
    )
    rows["measured"] = ceilings.measured_at
    return rows


def _with_spread(found: Survey, what: str, text: str) -> str:
    one = found.whole(what)
    return f"{text}, samples spread by {one.spread:.0%}" if one is not None and len(one.samples) > 1 else text


def _show_reads(found: Survey) -> None:
    """Bandwidth by what each thread reads again and again, for each number of threads."""
    cached, memory = found.of("cache read"), found.of("memory read")
    if not cached:
        return
    counts = sorted({one.threads for one in (*cached, *memory)})
    names = [_counted(count) for count in counts]
    shown = table("GB/s, reading", *names, right=tuple(names))
    for size_bytes in sorted({one.bytes_each for one in cached}):
        row = [one for one in cached if one.bytes_each == size_bytes]
        each = _binary(size_bytes) + (" each" if counts != [0] else "")
        shown.add_row(each, *(_cell(row, count, 1e9) for count in counts))
    shown.add_row("memory", *(_cell(memory, count, 1e9) for count in counts))
    print()
    console().print(shown)


def _show_peaks(found: Survey) -> None:
    """Arithmetic by number of threads, where that is for choosing."""
    from ridgeline.resources.cpu_probe import FORMATS

    counts = sorted({one.threads for one in found.of("fp32")})
    if len(counts) < 2:
        return
    names = [_counted(count) for count in counts]
    shown = table("Gop/s", *names, right=tuple(names))
    for name in FORMATS:
        if row := found.of(name):
            shown.add_row(name, *(_cell(row, count, 1e9) for count in counts))
    print()
    console().print(shown)


def _cell(row: list[Measurement] | tuple[Measurement, ...], threads: int, unit: float) -> str:
    found = next((one.figure / unit for one in row if one.threads == threads), None)
    if found is None:
        return ""
    return f"{found:.1f}" if found < 100 else f"{found:.0f}"


def _counted(threads: int) -> str:
    return f"{threads} thread{'s' if threads != 1 else ''}" if threads else "GPU"


def _bandwidth(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs"


def _binary(size_bytes: int) -> str:
    """A size of caches, which come in powers of two: 16 KiB, 1 MiB."""
    return f"{size_bytes / 2**20:g} MiB" if size_bytes >= 2**20 else f"{size_bytes / 2**10:g} KiB"


def write_plot(found: Survey, path: Path) -> None:
    """The roofline as PNG."""
    from ridgeline.apps.roofline_plot import write_png

    write_png(roofline_of(found), path)
