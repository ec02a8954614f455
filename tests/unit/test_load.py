"""What an engine counts of its own load, and how much of a prompt a hint takes from it."""

import pytest

from vllm_llmd.kv_connector.hints import HINT_KEY, read_hint
from vllm_llmd.kv_connector.load import LoadCounter
from vllm_llmd.names import RequestId

R, S = RequestId("r"), RequestId("s")


def tokens(counter: LoadCounter) -> tuple[int, int | None]:
    load = counter.read(0)
    return load.prefill_tokens, load.unplaced_tokens


def test_what_others_compute_is_not_to_be_computed_here_but_wants_blocks() -> None:
    counter = LoadCounter()
    counter.arrived(R, 1000, 999)
    counter.arrived(S, 500)
    assert tokens(counter) == (501, 1500)
    counter.parked(R)
    assert tokens(counter) == (501, 500)
    counter.scheduled(R, 0)
    counter.scheduled(S, 200)
    assert tokens(counter) == (200, 200)
    counter.ended(S)
    counter.ended(R)
    assert tokens(counter) == (0, 0)


def test_a_request_whose_source_fails_is_to_be_computed_here() -> None:
    counter = LoadCounter()
    counter.arrived(R, 1000, 999)
    counter.parked(R)
    counter.scheduled(R, 900)
    assert tokens(counter) == (900, 900)


def test_a_request_that_ends_while_it_waits_leaves_nothing_behind() -> None:
    counter = LoadCounter()
    counter.arrived(R, 1000, 5000)
    counter.parked(R)
    counter.ended(R)
    counter.parked(R)
    counter.arrived(S, 10)
    assert tokens(counter) == (10, 10)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [([], 0), ([{"engine": "a"}], 99), ([{"engine": "a", "until": 40}], 40), ([{"engine": "a", "until": 500}], 99)],
)
def test_a_hint_says_how_much_of_a_prompt_others_supply(sources: list[object], expected: int) -> None:
    assert read_hint({HINT_KEY: {"sources": sources}}).supplied(100) == expected
