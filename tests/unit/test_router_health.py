import itertools
import random

import pytest

from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router.members.health import (
    FAILURES_TO_OPEN,
    FORGIVEN_AFTER_MS,
    OPEN_MOST_MS,
    OPEN_MS,
    OUTCOMES_KEPT,
    RECENT_MS,
    TRANSITIONS,
    Circuit,
    Event,
    Health,
)
from vllm_llmd.router.members.membership import Engine, State
from vllm_llmd.router.members.outliers import Shape
from vllm_llmd.wire import EngineInfo

A = EngineId("a")
SHAPE = Shape.of(1000, 1, remote=False)


def engine(engine_id: str, role: str = "both") -> Engine:
    return Engine(EngineInfo(EngineId(engine_id), Epoch(1), role, "", ["m"], 16, 1, 1, "f", []), State.READY, 0)  # type: ignore[arg-type]


def fail(health: Health, times: int, now_ms: float = 0.0) -> None:
    for _ in range(times):
        health.failed(A, now_ms)


def opened() -> Health:
    health = Health()
    fail(health, FAILURES_TO_OPEN)
    return health


def circuit(health: Health, engine_id: EngineId = A) -> Circuit:
    return health.standing(engine_id).circuit


def test_an_engine_that_fails_often_gets_no_requests() -> None:
    health = Health()
    fail(health, FAILURES_TO_OPEN - 1)
    assert health.admits(A)
    version = health.version
    fail(health, 1)
    assert circuit(health) is Circuit.OPEN and not health.admits(A)
    assert health.version != version and health.opened == {(A, Event.FAILED_OFTEN): 1}


def test_failures_among_many_good_answers_or_long_ago_do_not_count() -> None:
    health = Health()
    for _ in range(10 * OUTCOMES_KEPT):
        fail(health, 1)
        for _ in range(2):
            health.answered(A, 0.0)
    assert health.admits(A)
    health = Health()
    fail(health, FAILURES_TO_OPEN - 1, 0.0)
    fail(health, FAILURES_TO_OPEN - 1, RECENT_MS + 1)
    assert health.admits(A)


def test_after_a_while_one_request_may_try_and_a_good_answer_closes_the_circuit() -> None:
    health = opened()
    health.tick([A], OPEN_MS - 1)
    assert not health.admits(A)
    health.tick([A], OPEN_MS)
    assert circuit(health) is Circuit.HALF_OPEN and health.admits(A)
    health.asked(A, "one")
    assert not health.admits(A)
    health.answered(A, OPEN_MS)
    assert circuit(health) is Circuit.CLOSED and health.admits(A)
    fail(health, FAILURES_TO_OPEN - 1, OPEN_MS)
    assert health.admits(A)


def test_a_try_that_fails_opens_the_circuit_for_twice_as_long() -> None:
    health, now_ms = opened(), 0.0
    for openings in range(1, 12):
        wait_ms = min(OPEN_MS * 2 ** (openings - 1), OPEN_MOST_MS)
        health.tick([A], now_ms + wait_ms - 1)
        assert circuit(health) is Circuit.OPEN
        now_ms += wait_ms
        health.tick([A], now_ms)
        assert circuit(health) is Circuit.HALF_OPEN
        fail(health, 1, now_ms)
        assert circuit(health) is Circuit.OPEN


def test_a_try_whose_client_leaves_makes_room_for_another() -> None:
    health = opened()
    health.tick([A], OPEN_MS)
    health.asked(A, "one")
    health.ended(A, "one")
    assert circuit(health) is Circuit.HALF_OPEN and health.admits(A)


def test_what_is_long_past_is_forgiven() -> None:
    health = opened()
    health.tick([A], OPEN_MS)
    health.answered(A, OPEN_MS)
    now_ms = OPEN_MS + FORGIVEN_AFTER_MS + 1
    fail(health, FAILURES_TO_OPEN, now_ms)
    health.tick([A], now_ms + OPEN_MS)
    assert circuit(health) is Circuit.HALF_OPEN


def test_a_new_life_starts_with_a_closed_circuit() -> None:
    health = opened()
    health.forget(A)
    assert health.admits(A)


def test_what_is_not_listed_changes_nothing() -> None:
    for state, event in itertools.product(Circuit, Event):
        assert TRANSITIONS.get((state, event)) is not state
    health = opened()
    health.answered(A, 1.0)  # a request of before
    fail(health, 20, 1.0)
    assert circuit(health) is Circuit.OPEN and health.opened.total() == 1


def test_when_no_engine_that_decodes_is_left_all_of_them_are() -> None:
    health = opened()
    a, b, p = engine("a"), engine("b"), engine("p", "prefill")
    assert health.admitted([a, b, p]) == [b, p]
    assert health.admitted([a, p]) == [a, p]
    assert health.admitted([a]) == [a]
    assert health.admitted([]) == []


# --- the slow ---------------------------------------------------------------------------------------------------


def serve(health: Health, factors: dict[str, float], rounds: int = 40, shape: Shape = SHAPE) -> None:
    rng = random.Random(1)
    for _ in range(rounds):
        for engine_id, factor in factors.items():
            health.took(EngineId(engine_id), shape, 100 * factor * rng.uniform(0.7, 1.4))


def ejected(factors: dict[str, float]) -> set[str]:
    health = Health()
    serve(health, factors)
    health.tick([EngineId(engine_id) for engine_id in factors], 1000.0)
    return {engine_id for engine_id in factors if not health.admits(EngineId(engine_id))}


def test_an_engine_far_slower_than_the_others_is_spared() -> None:
    assert ejected({"a": 1, "b": 1, "c": 1, "d": 8}) == {"d"}
    assert ejected({"a": 1, "b": 1, "c": 8}) == {"c"}


@pytest.mark.parametrize(
    "factors", [{"a": 1, "b": 1, "c": 2}, {"a": 1, "b": 2, "c": 4, "d": 8, "e": 16}, {"a": 1, "b": 9}]
)
def test_a_fleet_of_different_or_few_engines_keeps_them_all(factors: dict[str, float]) -> None:
    assert ejected(factors) == set()


def test_never_more_than_a_third_of_the_fleet_is_spared() -> None:
    factors = {str(number): 1.0 for number in range(9)} | dict.fromkeys("abcd", 10.0)
    assert len(ejected(factors)) == 4
    assert len(ejected(factors | dict.fromkeys("efg", 10.0))) <= 5
    health = Health()
    serve(health, {"a": 1, "b": 1, "c": 8})
    for _ in range(FAILURES_TO_OPEN):
        health.failed(EngineId("b"), 0.0)
    health.tick(map(EngineId, "abc"), 1000.0)
    assert health.admits(EngineId("c"))  # b is away already


def test_long_prompts_and_queues_count_against_nobody() -> None:
    health = Health()
    serve(health, {"a": 1, "b": 1, "c": 1})
    serve(health, {"d": 20}, shape=Shape.of(100_000, 9, remote=False))
    health.tick(map(EngineId, "abcd"), 1000.0)
    assert health.admits(EngineId("d"))


def test_an_engine_let_in_again_is_judged_anew() -> None:
    health = Health()
    serve(health, {"a": 1, "b": 1, "c": 8})
    health.tick(map(EngineId, "abc"), 1000.0)
    health.tick(map(EngineId, "abc"), 1000.0 + OPEN_MS)
    health.answered(EngineId("c"), 1000.0 + OPEN_MS)
    health.tick(map(EngineId, "abc"), 3000.0 + OPEN_MS)
    assert health.admits(EngineId("c"))
    serve(health, {"a": 1, "b": 1, "c": 8})
    health.tick(map(EngineId, "abc"), 5000.0 + OPEN_MS)
    assert not health.admits(EngineId("c")) and health.opened[EngineId("c"), Event.SLOW] == 2
