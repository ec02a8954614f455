"""How likely a request is to miss its objectives."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.router.candidates import Candidates, Loads, RateColumns, Roster
from vllm_llmd.router.placement.misses import LEAST_ERROR, LEAST_MS, NONE, Objectives, late, missed, objectives
from vllm_llmd.router.request import Facts

times_ms = st.floats(0, 1e12)
errors = st.floats(LEAST_ERROR, 10)


def asked(
    ttft_ms: float | None, tpot_ms: float | None, doubt: float = 1.5, step_doubt: float = 1.2, most: int | None = None
) -> Objectives:
    blocks = np.zeros(0, np.int64)
    nobody = Candidates(Roster.of([], None), blocks, blocks, blocks, Loads.of([]), RateColumns.of([]))
    of = Candidates(**{**vars(nobody), "doubt": doubt, "step_doubt": step_doubt})
    facts = Facts("m", None, b"", b"", 100, None, output_tokens=most, ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    return objectives(facts, of, 100.0)


def test_what_is_expected_to_be_just_in_time_is_late_every_other_time() -> None:
    assert late(np.array([500.0]), 500.0, 0.3) == 0.5


def test_chances_are_those_of_errors_of_this_mean() -> None:
    rng = np.random.default_rng(0)
    took_ms = 400.0 * np.exp(rng.laplace(0, 0.5, 200_000))
    for objective_ms in 100.0, 300.0, 500.0, 2000.0:
        share = (took_ms > objective_ms).mean()
        assert late(np.array([400.0]), objective_ms, 0.5) == pytest.approx(share, abs=0.01)


@given(times_ms, times_ms, st.floats(LEAST_MS, 1e12), errors)
def test_the_longer_it_is_expected_to_take_the_likelier_it_is_late(
    one_ms: float, other_ms: float, objective_ms: float, error: float
) -> None:
    sooner, later = late(np.sort([one_ms, other_ms]), objective_ms, error)
    assert 0 <= sooner <= later <= 1


@given(times_ms, st.floats(LEAST_MS, 1e12), st.floats(LEAST_MS, 1e12), errors)
def test_the_looser_the_objective_the_likelier_it_is_kept(
    expected_ms: float, one_ms: float, other_ms: float, error: float
) -> None:
    tight_ms, loose_ms = sorted((one_ms, other_ms))
    expected = np.array([expected_ms])
    assert late(expected, tight_ms, error) >= late(expected, loose_ms, error)


def test_either_objective_can_be_missed() -> None:
    of, first_ms, answer_ms = asked(1000.0, 10.0), np.array([500.0]), np.array([900.0])
    either = missed(of, first_ms, answer_ms)
    first = missed(asked(1000.0, None), first_ms, answer_ms)
    answer = missed(asked(None, 10.0), first_ms, answer_ms)
    assert either == pytest.approx(1 - (1 - first) * (1 - answer))
    assert either > max(first, answer)


def test_who_names_no_objective_can_miss_none() -> None:
    assert asked(None, None) is NONE


def test_an_answer_of_one_token_has_no_time_per_token_to_keep() -> None:
    assert asked(None, 10.0, most=1).answer_ms == math.inf
    assert asked(None, 10.0, most=2).answer_ms == 1000.0


@pytest.mark.parametrize("odd", [math.nan, 0.0, -5.0, -math.inf])
def test_an_objective_that_makes_no_sense_or_has_passed_is_as_short_as_can_be(odd: float) -> None:
    assert asked(odd, odd)[:2] == (LEAST_MS, LEAST_MS)


@pytest.mark.parametrize("odd", [math.nan, 0.0, 0.5, -1.0, math.inf])
def test_where_it_is_not_known_how_far_predictions_are_off_all_is_as_likely_late_as_not(odd: float) -> None:
    of = asked(1000.0, None, doubt=odd)
    assert (missed(of, np.array([1.0, 1e9]), np.zeros(2)) == 0.5).all()


def test_predictions_that_are_never_off_decide() -> None:
    of = asked(1000.0, None, doubt=1.0)
    assert missed(of, np.array([900.0, 1100.0]), np.zeros(2)) == pytest.approx([0, 1], abs=1e-6)
