"""Traces: what they must look like, what is said of those that do not, and what can be made of them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.errors import ConfigError
from vllm_llmd.kernels.hash_chain_cpu import chain_names
from vllm_llmd.router.slo import Wish
from vllm_llmd.simulate import traffic
from vllm_llmd.simulate.settings import Slo
from vllm_llmd.simulate.trace import HASHED_TOKENS, TraceRequest, as_line, read_trace

GOOD = b'{"timestamp": 3, "input_length": 600, "output_length": 2, "hash_ids": [0, 7]}'


def test_a_line_becomes_a_request() -> None:
    [request] = read_trace([GOOD, b"\n"], "t")
    assert (request.at_ms, request.prompt_tokens, request.output_tokens, list(request.hash_ids)) == (3, 600, 2, [0, 7])


def test_requests_are_sorted_by_time() -> None:
    later = GOOD.replace(b"3", b"5")
    assert [request.at_ms for request in read_trace([later, GOOD], "t")] == [3, 5]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "t.jsonl, line 3: .*write"),
        (b"[]", "t.jsonl, line 3: .*write"),
        (b"\xff\xff", "t.jsonl, line 3: .*write"),
        (GOOD.replace(b"600", b'"600"'), "line 3: Expected `int`, got `str` - at `\\$.input_length`; write"),
        (GOOD.replace(b"600", b"0"), "line 3: .*input_length"),
        (GOOD.replace(b'"output_length": 2, ', b""), "line 3: .*output_length"),
        (GOOD.replace(b"7]", b"-7]"), "line 3: .*hash_ids"),
        (GOOD.replace(b"7]", b"9999999999]"), "line 3: .*hash_ids"),
        (GOOD.replace(b", 7]", b"]"), "line 3: input_length 600 needs 2 hash_ids.*got 1.*correct either"),
    ],
)
def test_a_bad_line_is_named_with_what_to_do(line: bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_trace([GOOD, GOOD, line], "t.jsonl")


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ConfigError, match="t has no requests"):
        read_trace([b"\n"], "t")


prompts = st.lists(st.integers(0, 3), min_size=1, max_size=4).flatmap(
    lambda ids: st.tuples(st.just(ids), st.integers(1, HASHED_TOKENS))
)


@given(prompts, prompts, st.sampled_from([16, 128, 512]))
def test_block_names_are_equal_exactly_where_hash_ids_are(
    one: tuple[list[int], int], other: tuple[list[int], int], size: int
) -> None:
    requests = [TraceRequest(0, (len(ids) - 1) * HASHED_TOKENS + last, 1, ids) for ids, last in (one, other)]
    ours, theirs = (chain_names(request.prompt(), size).tolist() for request in requests)
    ids = [[hash_id for hash_id in request.hash_ids for _ in range(HASHED_TOKENS // size)] for request in requests]
    for at in range(min(len(ours), len(theirs))):
        assert (ours[at] == theirs[at]) == (ids[0][: at + 1] == ids[1][: at + 1])


def test_an_answer_is_unlike_every_prompt_and_every_other_answer() -> None:
    request = TraceRequest(0, 600, 20, [1, 2])
    assert len({*request.prompt().tolist(), *request.answer(0).tolist(), *request.answer(1).tolist()}) == 4


def requests_at(*times_ms: float) -> list[TraceRequest]:
    return [TraceRequest(at_ms, 600, 2, [0, number + 1]) for number, at_ms in enumerate(times_ms)]


def test_those_of_one_timestamp_are_spread_until_the_next() -> None:
    moved = traffic.spread(requests_at(0, 0, 0, 3000, 3000, 6000), random.Random(1))
    assert [request.at_ms // 3000 for request in moved] == [0, 0, 0, 1, 1, 2]
    assert len({request.at_ms for request in moved}) == 6
    assert moved == sorted(moved, key=lambda request: request.at_ms)


def test_copies_share_no_prompt() -> None:
    made = traffic.copies(requests_at(0, 10), 3)
    assert [request.at_ms for request in made] == [0, 0, 0, 10, 10, 10]
    assert len({tuple(request.hash_ids) for request in made}) == 6
    assert {request.hash_ids[0] for request in made} == {0, 3, 6}


def test_some_requests_have_tighter_objectives_and_clients_say_which_theirs_are() -> None:
    tight, others = Slo(ttft_ms=500, tpot_ms=20), Slo(ttft_ms=5000, tpot_ms=100)
    made = traffic.telling(traffic.tightened(requests_at(*range(1000)), 0.3, tight, random.Random(0)), others)
    assert sum(request.slo == tight for request in made) == pytest.approx(300, abs=50)
    assert {request.wish for request in made if request.slo is None} == {Wish(ttft_ms=5000, tpot_ms=100)}
    assert {request.wish for request in made if request.slo is not None} == {Wish(ttft_ms=500, tpot_ms=20)}


def test_too_many_copies_are_refused() -> None:
    with pytest.raises(ConfigError, match="copies must be at most"):
        traffic.copies(requests_at(0, 10), 1 << 31)


def test_a_part_of_a_trace_and_its_haste() -> None:
    requests = requests_at(60_000, 61_000, 130_000)
    assert len(traffic.first(requests, None, 1.0)) == 2
    assert len(traffic.first(requests, 1, None)) == 1
    assert [request.at_ms for request in traffic.hastened(requests, 2.0)] == [0, 500, 35_000]
    assert traffic.rate_of(requests_at(0, 1000)) == 2


def test_a_rate_needs_a_trace_that_lasts() -> None:
    with pytest.raises(ConfigError, match="give speedup instead"):
        traffic.rate_of(requests_at(5, 5))


def test_made_up_chats_are_a_trace_whose_prompts_grow() -> None:
    made = traffic.synthetic(200, random.Random(3))
    assert len(made) == 200
    assert read_trace(map(as_line, made), "made up") == made
    begun = {request.hash_ids[0] for request in made}
    assert len(begun) <= traffic.Chats().systems
    assert made == traffic.synthetic(200, random.Random(3)) != traffic.synthetic(200, random.Random(4))
