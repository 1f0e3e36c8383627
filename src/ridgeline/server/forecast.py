"""How long a request would wait: what waits before it, at the rate at which requests have begun lately.

Rates are in prompt tokens, so that long prompts count for what they are; that answers hold seats shows in the
rate. There is a forecast only while requests wait, and once some have begun since they do.
"""

from __future__ import annotations

import time
from collections import deque

from ridgeline.server.messages import (
    Abort,
    Add,
    Begun,
    Command,
    Embed,
    Embedded,
    Event,
    Failed,
    Pieces,
    Refused,
    Search,
)
from ridgeline.types import SERVICE_CLASSES, ServiceClass

_WINDOW_S = 30.0
_EVIDENCE_S = 0.5
"""So long requests must have been waiting before their rate says something."""


class WaitForecast:
    """Hears what is said to and by the engine. Belongs to one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[ServiceClass, int]] = {}  # of requests: class and tokens
        self._tokens = dict.fromkeys(SERVICE_CLASSES, 0)  # that wait, by class
        self._begun: deque[tuple[float, int]] = deque()
        self._since_s = 0.0  # when requests began to wait

    def hear(self, message: Event | Command) -> None:
        if isinstance(message, Add | Embed | Search):
            if not self._waiting:
                self._since_s = time.monotonic()
                self._begun.clear()
            service_class = message.sender.service_class
            self._waiting[message.id] = service_class, len(message.tokens)
            self._tokens[service_class] += len(message.tokens)
        elif isinstance(message, Begun):
            for number in message.ids:
                self._begin(number)
        elif isinstance(message, Abort | Refused | Embedded):
            self._forget(message.id)
        elif isinstance(message, Pieces):  # of requests without a deadline nobody says that they have begun
            for piece in message.pieces if self._waiting else ():
                self._begin(piece.id)
        elif isinstance(message, Failed):
            self._waiting.clear()
            self._tokens = dict.fromkeys(SERVICE_CLASSES, 0)

    def wait_s(self, service_class: ServiceClass) -> float | None:
        """Seconds that a new request of this class would wait to begin, None where nothing says so."""
        now_s = time.monotonic()
        since_s = max(self._since_s, now_s - _WINDOW_S)
        while self._begun and self._begun[0][0] < since_s:
            self._begun.popleft()
        begun = sum(tokens for _, tokens in self._begun)
        if not self._waiting or now_s - since_s < _EVIDENCE_S or not begun:
            return None
        before = SERVICE_CLASSES[: SERVICE_CLASSES.index(service_class) + 1]
        return sum(self._tokens[each] for each in before) * (now_s - since_s) / begun

    def _begin(self, number: int) -> None:
        tokens = self._forget(number)
        if tokens:
            self._begun.append((time.monotonic(), tokens))

    def _forget(self, number: int) -> int:
        service_class, tokens = self._waiting.pop(number, ("interactive", 0))
        self._tokens[service_class] -= tokens
        return tokens
