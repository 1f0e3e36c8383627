"""`ridgeline list`: the models in the cache."""

from __future__ import annotations

from dataclasses import asdict

from ridgeline.cli.options import Json
from ridgeline.cli.output import console, note, print_json, size, table


def list_models(json: Json = False) -> None:
    """List the models that were pulled."""
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
