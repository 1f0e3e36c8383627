"""Everything that the full probe of a machine found, how far its samples spread, and where it is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ridgeline.resources.ceilings import Ceilings, ceilings_path
from ridgeline.resources.cuda import GPU
from ridgeline.resources.measurement import Measurement
from ridgeline.resources.paths import write_atomic

SURVEY_VERSION = 1
"""Raised when the file means something else; one of another version is not read."""

QUIET_SPREAD = 0.15
QUIET_SHARE = 0.9
"""On a machine without other work samples of a ceiling lie no further apart than this, and the threads run
for more than this share of the time."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The ceilings of one device, the measurements behind them, and those by working set and thread count.

    `absent` says of what could not be measured why.
    """

    ceilings: Ceilings
    measurements: tuple[Measurement, ...]
    absent: dict[str, str] = field(default_factory=dict)

    def of(self, what: str) -> tuple[Measurement, ...]:
        """The measurements of one kind, by number of threads and bytes."""
        found = (one for one in self.measurements if one.what == what)
        return tuple(sorted(found, key=lambda one: (one.threads, one.bytes_each)))

    def whole(self, what: str) -> Measurement | None:
        """The measurement of one kind with as many threads as the ceilings have."""
        counts = (0, self.ceilings.threads)
        return next((one for one in self.of(what) if one.threads in counts and not one.bytes_each), None)

    @property
    def spread(self) -> float:
        """The largest spread of the samples behind a ceiling."""
        kinds = ("memory read", "int8", "fp8", "bf16", "fp32")
        return max((one.spread for one in map(self.whole, kinds) if one is not None), default=0.0)

    @property
    def core_share(self) -> float:
        """The least share of the time in which the system let the threads run; 1 for a GPU."""
        return min((one.figure for one in self.of("share of the cores")), default=1.0)

    @property
    def disturbance(self) -> str | None:
        """One sentence that says what tells of other work on the machine; None where nothing does."""
        signs = []
        if self.spread > QUIET_SPREAD:
            signs.append(f"the samples spread by {self.spread:.0%}")
        if self.core_share < QUIET_SHARE:
            signs.append(f"the threads could run for {self.core_share:.0%} of the time")
        return f"{' and '.join(signs)}: other work is running here" if signs else None

    def to_json(self) -> dict[str, Any]:
        return {
            "version": SURVEY_VERSION,
            **self.ceilings.to_json(),
            "spread": round(self.spread, 4),
            "core_share": round(self.core_share, 4),
            "quiet": self.disturbance is None,
            "absent": self.absent,
            "measurements": [one.to_json() for one in self.measurements],
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Survey:
        """Raises KeyError, TypeError or ValueError for anything that `to_json` did not make."""
        if fields["version"] != SURVEY_VERSION:
            raise ValueError(f"version is {fields['version']!r}; accepted: {SURVEY_VERSION}")
        derived = ("version", "spread", "core_share", "quiet", "absent", "measurements")
        return cls(
            Ceilings.from_json({name: value for name, value in fields.items() if name not in derived}),
            tuple(map(Measurement.from_json, fields["measurements"])),
            {str(name): str(why) for name, why in dict(fields["absent"]).items()},
        )


def load_survey(threads: int, isa: str, gpu: GPU | None = None) -> Survey | None:
    """What was found earlier on this machine, None if there is nothing that can be read; never measures."""
    device = "cuda" if gpu is not None else "cpu"
    try:
        content = json.loads(_path(threads, isa, gpu.description if gpu else None).read_bytes())
        survey = Survey.from_json(content)
    except (OSError, KeyError, ValueError, TypeError, AttributeError):
        return None  # not measured, or a damaged file: measuring again mends both
    found = survey.ceilings
    return survey if (found.device, found.threads, found.isa) == (device, threads, isa) else None


def save_survey(survey: Survey) -> Path:
    """Keep it for later processes; raises CapacityError when the cache cannot be written."""
    found = survey.ceilings
    path = _path(found.threads, found.isa, found.machine if found.device == "cuda" else None)
    write_atomic(path, (json.dumps(survey.to_json()) + "\n").encode())
    return path


def _path(threads: int, isa: str, gpu: str | None) -> Path:
    """Beside the ceilings, filed under the same hardware."""
    ceilings = ceilings_path(threads, isa, gpu)
    return ceilings.with_name(f"{ceilings.stem}-survey.json")
