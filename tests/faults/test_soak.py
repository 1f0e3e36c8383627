"""The soak, short and long."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.soak import soak
from faults.soak_report import Plan


def test_row_72_mixed_load_with_kills_for_a_moment(tiny_llama: Path) -> None:
    report = soak(tiny_llama, Plan(minutes=0.2, kill_s=2, think_s=0.05, rest_s=6))
    assert all(report.criteria().values()), report.summary()


@pytest.mark.full
@pytest.mark.timeout(6000)
def test_row_72_mixed_load_with_kills_for_an_hour(tiny_llama: Path) -> None:
    report = soak(tiny_llama, Plan())
    assert report.server_slope is not None
    assert report.engine_slope is not None
    assert all(report.criteria().values()), report.summary()
