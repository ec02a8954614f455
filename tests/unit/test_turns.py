from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.router.slo import MOST_URGENT, Wish
from vllm_llmd.router.upstream.turns import STRETCH, band_of, due_ms, priority

NOW_MS = 1_790_000_000_000.0
works = st.floats(0, 1e6)
bands = st.integers(-MOST_URGENT, MOST_URGENT)


def test_a_short_prompt_overtakes_a_long_one_that_came_shortly_before() -> None:
    long, short = priority(0, NOW_MS, 5000), priority(0, NOW_MS + 1000, 50)
    assert short < long


@given(works, works, st.floats(0, 1e7))
def test_nobody_waits_for_who_comes_when_it_is_due(long_ms: float, short_ms: float, later_ms: float) -> None:
    came_later = priority(0, NOW_MS + STRETCH * long_ms + later_ms + 1, short_ms)
    assert priority(0, NOW_MS, long_ms) < came_later


@given(bands, bands, works, works, st.floats(0, 3.6e6))
def test_bands_are_strict_and_can_be_said_exactly_in_json(one: int, two: int, a: float, b: float, age: float) -> None:
    first, second = priority(one, NOW_MS - age, a), priority(two, NOW_MS, b)
    if one != two:
        assert (first < second) == (one > two)
    assert abs(first) < 2**53


def test_an_objective_makes_a_request_due_sooner_and_never_later() -> None:
    assert due_ms(NOW_MS, 1000, 500) == NOW_MS + 500
    assert due_ms(NOW_MS, 1000, 60_000) == due_ms(NOW_MS, 1000, None) == NOW_MS + 1000 * STRETCH


@pytest.mark.parametrize("work_ms", [float("nan"), float("inf"), -1e300, -1.0])
def test_work_that_cannot_be_makes_it_due_at_once_or_within_hours(work_ms: float) -> None:
    assert NOW_MS <= priority(0, NOW_MS, work_ms) <= NOW_MS + STRETCH * 3.6e6


def test_a_source_that_gives_what_others_compute_is_to_do_so_as_soon_as_it_can() -> None:
    assert priority(0, NOW_MS, 2000, gives=True) == NOW_MS + 2000
    assert priority(0, NOW_MS, 2000, 700, gives=True) == NOW_MS + 700, "an objective holds for orders, too"
    assert priority(2, NOW_MS, None, gives=True) == -2, "who did not reckon says nothing of when it is due"


@pytest.mark.parametrize(
    ("body", "band"), [({}, 5), ({"priority": 3}, -3), ({"priority": 1001}, None), ({"priority": True}, None)]
)
def test_a_priority_in_the_body_goes_before_that_of_the_header(body: dict[str, Any], band: int | None) -> None:
    assert band_of(body, Wish(priority=5)) == band
