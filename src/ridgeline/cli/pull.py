"""`ridgeline pull`: fetch a model into the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from ridgeline.cli.progress import download_bar

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Catalog name, or hf.co/<org>/<repo>[:<file or quant>].")
]


def pull(name: Name) -> None:
    """Fetch a model, check it and keep it in the cache. Prints where it lies."""
    from ridgeline.model import catalog

    with download_bar() as report:
        path = catalog.pull(name, report)
    print(path)
