"""What the index predicted against what engines found, and how far they are believed for it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router.learning import truth
from vllm_llmd.router.learning.truth import By, Error, Prediction, Trust, Truth, expected, kept_share
from vllm_llmd.router.upstream.usage import Usage

A = EngineId("a")
LIFE = Epoch(1)
BLOCK = 16
KIND = "completion"


class Engine:
    """An engine whose index claims ten blocks of every prompt; each answer says how many there were."""

    def __init__(self) -> None:
        self.truth, self.now_ms = Truth(), 0.0
        self.truth.joined(A, LIFE)
        self.truth.resynced(A)

    @property
    def state(self) -> Trust:
        standing = self.truth.standing(A)
        assert standing is not None
        return standing.state

    def foretold(self, blocks: int = 10, by: By = "tokens") -> Prediction:
        standing = self.truth.standing(A)
        assert standing is not None
        return Prediction(A, LIFE, BLOCK, blocks, by, standing.resyncs)

    def answers(self, *found_blocks: int) -> None:
        for blocks in found_blocks:
            self.truth.compare(self.foretold(), KIND, Usage(1000, blocks * BLOCK), self.now_ms)

    @property
    def believed(self) -> int:
        """Of ten blocks claimed."""
        return int(self.truth.believed([EngineId("b"), A], np.array([10, 10]))[1])

    def resync(self) -> None:
        assert self.truth.to_resync == {A}
        self.truth.to_resync.clear()
        self.truth.resynced(A)


def test_one_who_keeps_what_was_predicted_is_trusted() -> None:
    engine = Engine()
    engine.answers(*[10] * 100)
    assert engine.state is Trust.TRUSTED and not engine.truth.to_resync
    assert engine.believed == 10


def test_one_whose_predictions_are_all_wrong_is_resynced_then_scored_by_observation() -> None:
    engine = Engine()
    engine.answers(*[0] * 10)
    assert engine.state is Trust.TRUSTED
    engine.answers(0)
    assert engine.state is Trust.SUSPECT
    assert engine.believed == 10
    engine.resync()
    engine.answers(*[2] * truth.PROBATION)
    assert engine.state is Trust.OBSERVED
    assert engine.believed == 2
    engine.answers(*[4] * 200)
    assert engine.believed == 4


def test_one_whose_index_was_stale_is_trusted_again_after_the_resync() -> None:
    engine = Engine()
    engine.answers(*[0] * 11)
    engine.resync()
    engine.answers(*[10] * truth.PROBATION)
    assert engine.state is Trust.TRUSTED
    engine.answers(*[0] * 10)
    assert engine.state is Trust.TRUSTED


def test_until_the_resync_is_done_a_suspect_is_not_judged() -> None:
    engine = Engine()
    before = engine.foretold()
    engine.answers(*[0] * 50)
    assert engine.state is Trust.SUSPECT
    engine.resync()
    for _ in range(50):
        assert engine.truth.compare(before, KIND, Usage(1000, 0), 0.0) == Error(A, "tokens", 160)
    assert engine.state is Trust.SUSPECT


def test_one_scored_by_observation_is_trusted_once_its_predictions_have_held_for_a_while() -> None:
    engine = Engine()
    engine.answers(*[0] * 11)
    engine.resync()
    engine.answers(*[0] * truth.PROBATION)
    engine.answers(*[10] * 24)
    assert engine.state is Trust.OBSERVED
    engine.answers(10)
    assert engine.state is Trust.TRUSTED
    assert engine.believed == 10


def test_one_that_nothing_is_seen_of_gets_another_chance() -> None:
    engine = Engine()
    engine.answers(*[0] * 11)
    engine.resync()
    engine.answers(*[0] * truth.PROBATION)
    engine.truth.tick(truth.UNSEEN_MS)
    assert engine.state is Trust.OBSERVED and not engine.truth.to_resync
    engine.truth.tick(truth.UNSEEN_MS + 1)
    assert engine.state is Trust.SUSPECT
    assert engine.believed == 10
    engine.resync()
    engine.answers(*[10] * truth.PROBATION)
    assert engine.state is Trust.TRUSTED


def test_a_fifth_of_all_predictions_may_fail_altogether() -> None:
    engine = Engine()
    for number in range(500):
        engine.answers(0 if number % 5 == 0 else 10)
    assert engine.state is Trust.TRUSTED and not engine.truth.to_resync


@given(st.lists(st.integers(10, 60), max_size=60))
def test_finding_more_than_was_predicted_is_no_fault(found: list[int]) -> None:
    engine = Engine()
    engine.answers(*found)
    assert engine.state is Trust.TRUSTED
    assert engine.believed == 10


def test_the_error_is_signed_and_labelled() -> None:
    engine = Engine()
    assert engine.truth.compare(engine.foretold(), KIND, Usage(1000, 32), 0.0) == Error(A, "tokens", 128)
    text = engine.foretold(blocks=0, by="text")
    assert engine.truth.compare(text, KIND, Usage(1000, 32), 0.0) == Error(A, "text", -32)


def test_a_prediction_of_a_former_life_says_nothing_of_this_one() -> None:
    engine = Engine()
    former = engine.foretold()
    engine.answers(*[0] * 11)
    engine.truth.joined(A, Epoch(2))
    assert engine.state is Trust.TRUSTED and not engine.truth.to_resync
    assert engine.truth.compare(former, KIND, Usage(1000, 0), 0.0) is None
    engine.truth.left(A)
    assert engine.truth.compare(former, KIND, Usage(1000, 0), 0.0) is None
    assert engine.believed == 10


def test_an_engine_that_does_not_tell_what_was_cached_is_not_judged() -> None:
    engine = Engine()
    for _ in range(100):
        assert engine.truth.compare(engine.foretold(), KIND, Usage(1000, None), 0.0) is None
    standing = engine.truth.standing(A)
    assert standing is not None and (standing.untold, standing.answers) == (100, 0)
    assert engine.state is Trust.TRUSTED


def test_silence_means_zero_in_answers_of_a_kind_that_has_told_before() -> None:
    engine = Engine()
    engine.answers(10)
    assert engine.truth.compare(engine.foretold(), KIND, Usage(1000, None), 0.0) == Error(A, "tokens", 160)
    assert engine.truth.compare(engine.foretold(), "another", Usage(1000, None), 0.0) is None


@pytest.mark.parametrize(
    ("blocks", "prompt_tokens", "tokens"),
    [(10, 1000, 160), (10, 161, 160), (10, 160, 144), (10, 17, 16), (10, 16, 0), (10, 0, 0), (0, 1000, 0)],
)
def test_the_last_token_is_never_expected_to_be_cached(blocks: int, prompt_tokens: int, tokens: int) -> None:
    assert expected(Prediction(A, LIFE, BLOCK, blocks, "tokens", 0), prompt_tokens) == tokens


def test_a_block_too_few_is_no_fault() -> None:
    assert kept_share(160, 144, BLOCK) == 1.0
    assert kept_share(160, 128, BLOCK) == 0.8
    assert kept_share(160, 500, BLOCK) == 1.0


def test_every_change_of_state_is_in_the_table() -> None:
    assert {state for state, _ in truth.TRANSITIONS} == set(Trust)
    assert set(truth.TRANSITIONS.values()) == set(Trust)
