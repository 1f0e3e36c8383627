"""`ridgeline list`: the models in the cache, the families that run, or the machines that are known."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from ridgeline.cli.options import Json, flag
from ridgeline.cli.output import console, note, print_json, size, table

Families = Annotated[
    bool, flag("families", "List the families of models that run, and what files call them.")
]
Machines = Annotated[
    bool, flag("machines", "List the machines whose datasheets are known, with what they can do at most.")
]


def list_models(json: Json = False, families: Families = False, machines: Machines = False) -> None:
    """List the models that were pulled."""
    if machines:
        _list_machines(json)
        return
    if families:
        _list_families(json)
        return
    from ridgeline.model import catalog

    models = catalog.list_models()
    if json:
        print_json([{**asdict(m), "path": str(m.path), "modified": m.modified.isoformat()} for m in models])
        return
    if not models:
        note(f"no models yet; `ridgeline pull {catalog.DEFAULT_MODEL}` fetches the default one")
        return
    shown = table("name", "size", "modified", "path", right=("size",))
    for model in models:
        modified = model.modified.astimezone().strftime("%Y-%m-%d %H:%M")
        shown.add_row(model.name, size(model.size_bytes), modified, str(model.path))
    console().print(shown)


def _list_families(json: bool) -> None:
    from ridgeline.model.families import FAMILIES

    ordered = sorted(FAMILIES, key=lambda family: family.name)
    if json:
        names = [
            {"name": f.name, "architectures": list(f.architectures), "model_types": list(f.model_types)}
            for f in ordered
        ]
        print_json(names)
        return
    shown = table("family", "general.architecture (GGUF)", "model_type (config.json)")
    for family in ordered:
        shown.add_row(family.name, ", ".join(family.architectures), ", ".join(family.model_types))
    console().print(shown)


def _list_machines(json: bool) -> None:
    from ridgeline.resources.presets import PEAKS, presets
    from ridgeline.resources.roofline import ridge_ops_per_byte

    known = list(presets().values())
    if json:
        print_json([preset.to_json() for preset in known])
        return
    numbers = ("memory", "GB/s", *(f"{name} T/s" for name in PEAKS), "ridge", "W", "USD/h")
    shown = table("machine", *numbers, "link", right=numbers)
    for preset in known:
        peaks = preset.peaks
        ridge = ridge_ops_per_byte(peaks.get("bf16", peaks["fp32"]), preset)
        shown.add_row(
            preset.name,
            f"{preset.memory_bytes / 2**30:.0f} GiB",
            f"{preset.read_bytes_per_s / 1e9:.4g}",
            *(f"{peaks[name] / 1e12:.4g}" if name in peaks else "" for name in PEAKS),
            f"{ridge:.0f}",
            f"{preset.power_w:g}" if preset.power_w is not None else "",
            f"{preset.usd_per_hour:.2f}" if preset.usd_per_hour is not None else "",
            preset.link or "",
        )
    console().print(shown)
    note(
        "peaks in T operations per second, dense; ridge in operations per byte, of bf16 or else fp32; "
        "sources with --json"
    )
