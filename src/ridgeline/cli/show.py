"""`ridgeline show`: what a model is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ridgeline.cli.options import Json
from ridgeline.cli.output import count, facts, print_json, size

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a pulled model, or a path.")]


def show(name: Name, json: Json = False) -> None:
    """Describe a model. Only its metadata is read: family, size, formats, context, memory of a token."""
    from ridgeline.apps.describe import describe
    from ridgeline.model.catalog import resolve

    found = describe(resolve(name, pull_missing=False))
    if json:
        print_json({"name": name, **asdict(found)})
        return
    facts(
        {
            "name": name,
            "path": found.path,
            "family": found.family,
            "parameters": count(found.parameters),
            "size": size(found.size_bytes),
            "tensors": ", ".join(f"{number} {storage}" for storage, number in found.formats.items()),
            "layers": f"{found.layers} of width {found.hidden}",
            "vocabulary": f"{found.vocabulary} tokens",
            "context": f"{found.context} tokens",
            "KV cache": f"{size(found.kv_bytes_per_token)} per token",
            "chat template": "yes" if found.chat_template else "no",
        }
    )
