"""Which launches only the rows with outputs need.

Behind the last layer's keys and values a row is read by nobody but its own output. Of a chunk of a prompt one
row has any, or none, so that most of that layer need not be computed for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ridgeline.execution.cpu.launches import (
    ActivateLaunch,
    AddLaunch,
    AttentionLaunch,
    CpuLaunch,
    LinearLaunch,
    NormLaunch,
    QuantiseLaunch,
)
from ridgeline.execution.lowering import borders
from ridgeline.model.program import Program, Select

_OF_CHOSEN_ROWS = (ActivateLaunch, AddLaunch, AttentionLaunch, LinearLaunch, NormLaunch, QuantiseLaunch)
"""What the tape can run over some of a step's rows, each where it lies."""


def for_outputs(program: Program, launches: Sequence[CpuLaunch]) -> tuple[CpuLaunch, ...]:
    """The launches, of which those are for `only_outputs` whose results are read of no other rows."""
    every_row: set[str] = set()  # values of which some launch reads every row
    made: list[CpuLaunch] = []
    for launch, border in reversed([*zip(launches, borders(program, launches), strict=True)]):
        of_rows = [v for v in border.writes if not v.selected and not program.leaves(v)]
        spared = len(of_rows) == len(border.writes) > 0 and every_row.isdisjoint(v.name for v in of_rows)
        if spared and isinstance(launch, _OF_CHOSEN_ROWS):
            launch = replace(launch, only_outputs=True)
        elif not any(isinstance(op, Select) for op in launch.covers):
            every_row.update(v.name for v in border.reads)
        made.append(launch)
    return tuple(reversed(made))
