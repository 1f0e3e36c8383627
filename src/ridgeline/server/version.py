"""Which version of the package runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    try:
        return version("ridgeline")
    except PackageNotFoundError:
        return "unknown"
