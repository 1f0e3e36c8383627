"""`ridgeline list`: the models in the cache, or the families of models that run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from ridgeline.cli.options import Json, flag
from ridgeline.cli.output import console, note, print_json, size, table

Families = Annotated[
    bool, flag("families", "List the families of models that run, and what files call them.")
]


def list_models(json: Json = False, families: Families = False) -> None:
    """List the models that were pulled."""
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
