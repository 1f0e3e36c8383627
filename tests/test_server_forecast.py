"""What a request is told of its class and of its wait."""

from __future__ import annotations

import pytest

from ridgeline.cli.serve import targets
from ridgeline.config import CLASS_TARGETS, ClassTarget, EngineConfig
from ridgeline.server import forecast
from ridgeline.server.config import ApiKey
from ridgeline.server.forecast import WaitForecast
from ridgeline.server.messages import Abort, Add, Begun, Failed, Sender
from ridgeline.server.service import class_of, overloaded, tier_of
from ridgeline.types import ConfigError, SamplingParams, ServiceClass


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(forecast, "time", clock)
    return clock


def add(number: int, tokens: int, service_class: ServiceClass = "interactive") -> Add:
    return Add(number, (1,) * tokens, SamplingParams(), sender=Sender(service_class=service_class))


def test_the_wait_is_what_is_before_at_the_rate_of_late(clock: Clock) -> None:
    waits = WaitForecast()
    for number in range(10):
        waits.hear(add(number, 100))
    assert waits.wait_s("interactive") is None, "nothing has begun yet"
    clock.now_s += 2
    waits.hear(Begun((0, 1), clock.now_s))
    assert waits.wait_s("interactive") == pytest.approx(8)
    assert waits.wait_s("keystroke") == 0, "it goes before all of them"
    waits.hear(add(10, 400, "batch"))
    assert waits.wait_s("interactive") == pytest.approx(8)
    assert waits.wait_s("batch") == pytest.approx(12)
    waits.hear(Abort(10))
    assert waits.wait_s("batch") == pytest.approx(8)
    clock.now_s += 100
    assert waits.wait_s("batch") is None, "what began long ago says nothing"
    waits.hear(Failed("gone", startup=False))
    assert waits.wait_s("batch") is None


@pytest.mark.parametrize(
    ("most", "tier", "service_class", "told"),
    [
        (None, None, "interactive", None),
        (None, "flex", "batch", "flex"),
        (None, "keystroke", "keystroke", "priority"),
        ("batch", None, "batch", None),
        ("batch", "auto", "batch", "flex"),
        ("batch", "priority", "batch", "flex"),
        ("interactive", "keystroke", "interactive", "default"),
        ("interactive", "batch", "batch", "flex"),
        ("keystroke", None, "keystroke", None),
        ("keystroke", "default", "interactive", "default"),
    ],
)
def test_a_key_bounds_the_class_of_its_requests(
    most: ServiceClass | None, tier: str | None, service_class: ServiceClass, told: str | None
) -> None:
    assert class_of(ApiKey.of("k", "sk", None, most), tier) == service_class
    assert tier_of(service_class, tier) == told


def test_retry_after_is_the_wait_in_whole_seconds() -> None:
    assert overloaded("full", 7.2).headers == {"retry-after": "8"}
    assert overloaded("full").headers == {"retry-after": "1"}


def test_targets_of_classes_are_settings() -> None:
    config = EngineConfig(**targets("keystroke=0.1/0.02, batch=5/2"))
    assert config.targets == (ClassTarget(0.1, 0.02), CLASS_TARGETS["interactive"], ClassTarget(5, 2))
    assert not EngineConfig(**targets("off")).measured_budget
    for wrong in ("batch", "batch=1", "batch=a/b", "urgent=1/1", "batch=0/1", "batch=1/2/3", "batch=1/nan"):
        with pytest.raises(ConfigError):
            EngineConfig(**targets(wrong))
