import random

from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.router.upstream.retries import LONGEST_PAUSE_MS, RESERVE, WINDOW_MS, RetryBudget, pause_ms


def taken(budget: RetryBudget, now_ms: float) -> int:
    count = 0
    while budget.take(now_ms):
        count += 1
    return count


def test_a_quiet_router_can_retry_and_a_budget_of_nothing_cannot() -> None:
    assert taken(RetryBudget(50), 0.0) == RESERVE
    assert taken(RetryBudget(0), 0.0) == 0


def test_retries_are_a_share_of_requests_under_way_and_lately_over() -> None:
    budget = RetryBudget(20)
    for _ in range(100):
        budget.began()
    for _ in range(50):
        budget.ended(500.0)
    assert taken(budget, 1000.0) == RESERVE + 20


def test_the_past_is_forgotten() -> None:
    budget = RetryBudget(20)
    for _ in range(100):
        budget.began()
        budget.ended(500.0)
    assert taken(budget, 1000.0) == RESERVE + 20
    assert taken(budget, 1000.0 + WINDOW_MS) == 0
    assert taken(budget, 1001.0 + WINDOW_MS) == RESERVE


@given(st.lists(st.tuples(st.sampled_from(("began", "ended", "take")), st.floats(0, 3000)), max_size=200))
def test_there_are_never_more_than_the_share_of_all_requests_and_the_reserve(steps: list[tuple[str, float]]) -> None:
    budget, now_ms, under_way, requests, taken_ms = RetryBudget(50), 0.0, 0, 0, list[float]()
    for what, pass_ms in steps:
        now_ms += pass_ms
        if what == "began":
            budget.began()
            under_way, requests = under_way + 1, requests + 1
        elif what == "ended" and under_way:
            budget.ended(now_ms)
            under_way -= 1
        elif what == "take" and budget.take(now_ms):
            taken_ms.append(now_ms)
        recent = [at for at in taken_ms if now_ms - at <= WINDOW_MS]
        assert len(recent) <= RESERVE + 0.5 * requests + 1


def test_pauses_differ_and_have_a_limit() -> None:
    rng = random.Random(3)
    pauses = [[pause_ms(retry, rng) for _ in range(200)] for retry in (1, 2, 50)]
    assert all(len(set(each)) > 100 and min(each) >= 0 for each in pauses)
    assert max(pauses[0]) <= 20 < max(pauses[1]) <= 40 and 100 < max(pauses[2]) <= LONGEST_PAUSE_MS
