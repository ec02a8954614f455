"""How many engines are wanted: safe whatever is asked, never fewer for more, and right where the answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.router.autoscaling.scaling import MOST, PLACED_AMONG, Ability, Demand, Goal, desired, misses, waiting

ONE = Ability(step_ms=10.0, step_running_ms=0.5, kv_tokens=100_000.0, sequences=256.0)
GOAL = Goal(missing=0.1, horizon_ms=120_000.0, least=1, most=1000)

QUIETLY = settings(max_examples=60)

sizes = st.floats(0.0, 1e6)
paces = st.floats(0.0, 10.0)


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    prompts, answers = draw(st.integers(0, 3)), draw(st.integers(0, 3))

    def sample(count: int, *values: st.SearchStrategy[float]) -> np.ndarray:
        return np.array([draw(st.one_of(*values)) for _ in range(count)], np.float64)

    return Demand(
        prefills_per_ms=draw(paces) if prompts else 0.0,
        prefill_ms=sample(prompts, sizes),
        until_ms=sample(prompts, sizes, st.just(math.inf), st.floats(-100.0, 0.0)),
        placed_among=draw(st.sampled_from([1, PLACED_AMONG, 5, MOST])),
        backlog_ms=draw(sizes),
        answers_per_ms=draw(paces) if answers else 0.0,
        output_tokens=sample(answers, sizes),
        tpot_ms=sample(answers, sizes, st.just(math.inf)),
        kv_tokens=sample(answers, sizes),
        held_ms=sample(answers, sizes),
    )


abilities = st.builds(
    Ability,
    step_ms=st.floats(1e-3, 1e4),
    step_running_ms=st.floats(1e-4, 1e3),
    kv_tokens=st.floats(1.0, 1e12),
    sequences=st.floats(1.0, 1e12),
)
goals = st.builds(
    Goal,
    missing=st.floats(0.01, 0.99),
    horizon_ms=st.floats(1e3, 1e6),
    least=st.integers(0, 10),
    most=st.integers(10, 10_000),
)


@QUIETLY
@given(demands(), abilities, goals)
def test_what_is_wanted_is_a_number_within_its_bounds(demand: Demand, ability: Ability, goal: Goal) -> None:
    wanted = desired(demand, ability, goal)
    assert goal.least <= wanted.replicas <= goal.most
    assert all(math.isfinite(each) and each >= 0 for each in (wanted.wait_ms, wanted.sequences))
    assert all(0 <= share <= 1 for share in (wanted.misses.ttft, wanted.misses.tpot, wanted.misses.memory))


@QUIETLY
@given(demands(), abilities, goals, st.floats(1.0, 10.0))
def test_more_demand_never_wants_fewer(demand: Demand, ability: Ability, goal: Goal, times: float) -> None:
    more = replace(
        demand,
        prefills_per_ms=times * demand.prefills_per_ms,
        answers_per_ms=times * demand.answers_per_ms,
        backlog_ms=times * demand.backlog_ms,
    )
    assert desired(more, ability, goal).replicas >= desired(demand, ability, goal).replicas


@QUIETLY
@given(demands(), abilities, goals, st.floats(0.1, 1.0))
def test_a_stricter_goal_never_wants_fewer(demand: Demand, ability: Ability, goal: Goal, times: float) -> None:
    stricter = replace(goal, missing=times * goal.missing)
    assert desired(demand, ability, stricter).replicas >= desired(demand, ability, goal).replicas


@QUIETLY
@given(demands(), abilities, st.integers(1, 100), st.integers(0, 100))
def test_more_engines_never_miss_more(demand: Demand, ability: Ability, engines: int, more: int) -> None:
    assert misses(engines + more, demand, ability).all <= misses(engines, demand, ability).all + 1e-9


@QUIETLY
@given(demands(), abilities, goals)
def test_somebody_is_wanted_as_long_as_anybody_asks(demand: Demand, ability: Ability, goal: Goal) -> None:
    asked = demand.prefills_per_ms > 0 or demand.answers_per_ms > 0 or demand.backlog_ms > 0
    assert desired(demand, ability, replace(goal, least=0)).replicas >= int(asked)


def test_without_demand_the_least_is_wanted() -> None:
    assert desired(Demand(), ONE, replace(GOAL, least=3)).replicas == 3
    assert desired(Demand(), ONE, replace(GOAL, least=0)).replicas == 0


def prompts(per_s: float, ms: float, until_ms: float = math.inf) -> Demand:
    return Demand(per_s / 1000, np.full(8, ms), np.full(8, until_ms))


def answers(per_s: float, tokens: float, tpot_ms: float = math.inf, kv: float = 0.0) -> Demand:
    column = np.ones(8)
    return Demand(
        answers_per_ms=per_s / 1000,
        output_tokens=tokens * column,
        tpot_ms=tpot_ms * column,
        kv_tokens=kv * column,
        held_ms=0 * column,
    )


def test_one_engine_waits_as_in_m_d_1() -> None:
    """Mean wait of constant service at load 0.5 and of one server: half of the service time (Pollaczek-Khinchine)."""
    wait = waiting(1, prompts(per_s=1.0, ms=500.0))
    assert wait is not None and wait.share * wait.mean_ms == pytest.approx(250.0, rel=0.05)


@pytest.mark.parametrize(("engines", "busy"), [(2, 0.5), (4, 0.7), (6, 0.8), (20, 0.9)])
def test_one_queue_for_all_engines_is_waited_in_as_in_m_m_c(engines: int, busy: float) -> None:
    """Erlang's formula; exponential service, as a sample of its quantiles."""
    service_ms = -500.0 * np.log1p(-(np.arange(4000) + 0.5) / 4000)
    load = engines * busy
    queued = load**engines / math.factorial(engines) / (1 - busy)
    share = queued / (queued + sum(load**k / math.factorial(k) for k in range(engines)))
    per_ms = load / float(np.mean(service_ms))
    wait = waiting(engines, Demand(per_ms, service_ms, np.full(4000, math.inf), placed_among=MOST))
    assert wait is not None
    assert wait.share == pytest.approx(share, rel=0.1)
    assert wait.mean_ms == pytest.approx(500.0 / (engines * (1 - busy)), rel=0.02)


def test_the_more_engines_a_prompt_is_placed_among_the_fewer_are_wanted() -> None:
    asked = replace(prompts(per_s=8.0, ms=700.0, until_ms=2000.0), placed_among=1)
    wanted = [desired(replace(asked, placed_among=among), ONE, GOAL).replicas for among in (1, 2, MOST)]
    assert wanted[0] > wanted[1] > wanted[2]


def test_prompts_that_come_faster_than_they_are_computed_want_another_engine() -> None:
    wanted = desired(prompts(per_s=5.0, ms=1000.0), ONE, GOAL)
    assert wanted.replicas == 6


def test_a_short_objective_wants_more_than_a_long_one() -> None:
    short, long = (desired(prompts(5.0, 1000.0, until_ms), ONE, GOAL) for until_ms in (1200.0, 10_000.0))
    assert short.bound == "ttft"
    assert short.replicas > long.replicas


def test_objectives_that_nobody_can_keep_want_no_more_than_queueing_does() -> None:
    impossible = desired(prompts(5.0, 1000.0, until_ms=500.0), ONE, GOAL)
    assert impossible.replicas == 6
    assert impossible.misses.ttft == 1.0


def test_the_batch_that_keeps_the_time_per_token_says_how_many_decode() -> None:
    """At 10 ms and 0.5 ms per sequence, 30 ms allow 40 sequences: 1,333 tokens per second of an engine at most."""
    wanted = desired(answers(per_s=50.0, tokens=200.0, tpot_ms=30.0), ONE, GOAL)
    assert wanted.bound == "tpot"
    assert wanted.replicas == pytest.approx(10_000 / 1333, abs=1.0)


def test_answers_under_way_are_those_that_make_the_tokens_asked_for() -> None:
    """Two engines, 100 tokens per second each: one step of 10 ms per token and one sequence, as nearly as can be."""
    wanted = desired(answers(per_s=1.0, tokens=200.0), ONE, replace(GOAL, least=2))
    assert wanted.sequences == pytest.approx(2.0, rel=0.06)


def test_what_has_to_fit_into_caches_says_how_many_decode() -> None:
    """50 answers per second of 2 to 3 seconds hold 10,000 tokens each: over a million, in caches of 100,000."""
    wanted = desired(answers(per_s=50.0, tokens=200.0, kv=10_000.0), ONE, GOAL)
    assert wanted.bound == "memory"
    assert 10 < wanted.replicas < 25


def test_computing_prompts_beside_takes_time_from_answers() -> None:
    alone = answers(per_s=20.0, tokens=200.0, tpot_ms=30.0)
    beside = replace(alone, prefills_per_ms=0.02, prefill_ms=np.full(8, 100.0), until_ms=np.full(8, math.inf))
    assert desired(beside, ONE, GOAL).replicas > desired(alone, ONE, GOAL).replicas + 2


def test_a_backlog_wants_more_until_it_is_worked_off() -> None:
    calm = prompts(per_s=5.0, ms=1000.0)
    wanted = desired(replace(calm, backlog_ms=10 * GOAL.horizon_ms), ONE, GOAL)
    assert (wanted.replicas, wanted.bound) == (15, "queue")


def test_the_most_is_never_exceeded() -> None:
    wanted = desired(prompts(per_s=5000.0, ms=1000.0), ONE, replace(GOAL, most=20))
    assert (wanted.replicas, wanted.bound) == (20, "max")
