"""The shared records: sums of work, and parameters that refuse what they cannot mean in one line."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ridgeline.types import RequestError, SamplingParams, SpeculationParams, Work


def test_totals_are_sums_of_multiples() -> None:
    works = [Work(1, 2, 3, 4, 5), Work(10, 20, 30, 40, 50)]
    assert Work.total(works) == works[0] + works[1] == Work(11, 22, 33, 44, 55)
    assert Work.total(works, (3, 2)) == Work(23, 46, 69, 92, 115)
    assert Work.total([]) == Work()
    assert Work.total(works) - works[0] == works[1]


def test_stops_become_tuples() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[1, 2])
    assert (params.stop, params.stop_token_ids) == (("end",), (1, 2))
    none: Any = None
    assert SamplingParams(stop=none, stop_token_ids=none) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (-1, math.inf, math.nan, 10**400, "1", True, None)],
        *[("n", value) for value in (0, 10**9, 1.0, None)],
        *[("top_p", value) for value in (0, 2, math.nan)],
        ("min_tokens", 257),
        ("logprobs", 10**6),
        ("seed", 2**64),
        *[("stop", value) for value in (5, [""], [1], ["x"] * 65)],
        *[("stop_token_ids", value) for value in (5, [-1], ["1"], [True], [1.5])],
        *[("logit_bias", value) for value in (5, [1], {-1: 0}, {1: 101}, {"1": 0}, {1: 10**400})],
        *[("ignore_eos", value) for value in (0, "no", None)],
    ],
)
def test_parameters_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name if value != ["x"] * 65 else "stop strings") as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).isprintable()
    assert "accepted" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("drafter", value) for value in ("", "medusa", None, 5, ["auto"])],
        *[("max_tokens", value) for value in (0, -1, 65, True, 1.0, "4")],
    ],
)
def test_speculation_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"speculation {name}") as caught:
        SpeculationParams(**{name: value})
    assert str(caught.value).isprintable()
    assert "accepted" in str(caught.value)


def test_speculation_is_what_was_asked_for() -> None:
    for asked in (SpeculationParams("ngram", 4), False, True, None):
        assert SamplingParams(speculation=asked).speculation is asked
    for wrong in ({"drafter": "auto"}, 1, "auto"):
        with pytest.raises(RequestError, match="speculation is"):
            SamplingParams(speculation=wrong)  # type: ignore[arg-type]
