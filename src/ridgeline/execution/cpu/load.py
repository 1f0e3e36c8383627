"""Matrices of a store of weights, packed: from the cache where that pays, else from the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ridgeline.execution.cpu.packing import Layout, pack_all
from ridgeline.model.weights import Weights
from ridgeline.native import Matrix, Team

if TYPE_CHECKING:
    from ridgeline.execution.cpu.packed_cache import PackedCache


def load_matrices(weights: Weights, team: Team, cache: PackedCache | None = None) -> dict[str, Matrix]:
    """Every matrix by its name, the same with and without the cache.

    Raises CheckpointError that names a tensor whose values are not finite or do not fit its format.
    """
    layout = Layout.of(weights)
    region = layout.allocate()
    key = None
    if cache is not None and cache.pays(layout):
        from ridgeline.execution.cpu.packed_cache import key_of

        key = key_of(weights, layout)
        if key is not None and cache.load(key, region, team):
            return layout.matrices(region)
    pack_all(layout, region, team.threads)
    if cache is not None and key is not None:
        cache.store(key, region, team)
    return layout.matrices(region)
