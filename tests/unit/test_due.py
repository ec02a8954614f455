import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.due import once_answering, rank_of
from vllm_llmd.router.slo import MOST_URGENT
from vllm_llmd.router.upstream.turns import due_ms, priority

bands = st.integers(-MOST_URGENT, MOST_URGENT)
times_ms = st.integers(1_500_000_000_000, 3_000_000_000_000)
own = st.integers(-MOST_URGENT, MOST_URGENT)


@given(bands, times_ms, st.floats(0, 1e6))
def test_what_a_router_says_is_understood(band: int, came_ms: int, work_ms: float) -> None:
    said = priority(band, came_ms, work_ms)
    assert rank_of(said).due_ms == pytest.approx(due_ms(came_ms, work_ms, None), abs=1)
    assert rank_of(said).band == -band
    assert once_answering(said) == 0


@given(own, times_ms)
def test_a_clients_own_priority_stays_and_is_before_all_times(said: int, came_ms: int) -> None:
    assert once_answering(said) == said == rank_of(said).due_ms
    assert rank_of(said).before(rank_of(priority(0, came_ms, 0.0)))


@given(own, own)
def test_among_clients_own_less_goes_first(one: int, other: int) -> None:
    assert rank_of(one).before(rank_of(other)) == (one < other)
