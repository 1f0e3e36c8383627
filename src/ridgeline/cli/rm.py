"""`ridgeline rm`: delete a model from the cache."""

from __future__ import annotations

from typing import Annotated

import typer

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a pulled model, as `ridgeline list` shows it.")
]


def rm(name: Name) -> None:
    """Delete a pulled model from the cache."""
    from ridgeline.model import catalog

    catalog.remove(name)
    print(f"removed {name}")
