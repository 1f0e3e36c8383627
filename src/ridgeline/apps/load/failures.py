"""Why a request failed."""

from __future__ import annotations

TIMEOUT = "timeout"
BROKEN = "broken stream"
ERROR_EVENT = "error event"
UNREACHED = "no connection"


class FailureError(Exception):
    """One request failed. `cause` is what failures are counted by, `detail` one line about this one."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.detail = " ".join(detail.split())[:300]
