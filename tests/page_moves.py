"""What every executor owes of moves between its pools and host memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from ridgeline.types import HostPage, PageFill, PageSpill

TOKENS = [(7 * index) % 50 for index in range(80)]


def there_and_back(loaded: Any, expected_bytes: tuple[int, ...] | None = None) -> None:
    """Pages that were spilled, overwritten and filled into other pages are the very bytes that they were."""
    executor, groups = loaded.executor, range(len(loaded.program.groups))
    loaded.run(TOKENS[:20], pages=[0, 1])
    host = {(g, page): HostPage() for g in groups for page in (0, 1)}
    executor.transfer([PageSpill(g, page, held) for (g, page), held in host.items()])
    expected = loaded.run(TOKENS[20:23], 20, pages=[0, 1])
    loaded.run(TOKENS[30:60], pages=[0, 1])  # and what was spilled is no longer there
    sizes = tuple(len(host[g, 0].take()) for g in groups)
    assert sizes == executor.host_page_bytes
    assert expected_bytes in (None, sizes)
    # A transfer that is made again, after an interrupt, does not spill what is there now.
    executor.transfer([PageSpill(g, page, held) for (g, page), held in host.items()])
    bits = {place: held.take().copy() for place, held in host.items()}
    fills = [PageFill(g, bits[g, page], target) for g in groups for page, target in ((1, 7), (0, 7), (1, 3))]
    executor.transfer(fills)
    np.testing.assert_array_equal(loaded.run(TOKENS[20:23], 20, pages=[7, 3]), expected)
    again = {place: HostPage() for place in host}
    moved = {0: 7, 1: 8}
    fills = [PageFill(g, bits[g, page], moved[page]) for g, page in host]
    executor.transfer([*fills, *(PageSpill(g, moved[page], held) for (g, page), held in again.items())])
    for place, held in again.items():
        np.testing.assert_array_equal(held.take(), bits[place])
