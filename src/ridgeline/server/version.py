"""The version that clients and metrics are told."""

from __future__ import annotations

from ridgeline.resources import installation


def package_version() -> str:
    """Of the installed package; "unknown" in a source tree."""
    return installation.package_version() or "unknown"
