"""Meters: what passes is what came, and the usage is known, wherever the stream is cut."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_llmd.router.upstream import sse
from vllm_llmd.router.upstream.sse import EVENT_BYTES, Splitter
from vllm_llmd.router.upstream.usage import Asked, Body, Unasked, Usage, read_usage, tells_of_its_prompt

FINGERPRINT = b',"system_fingerprint":"vllm-1-ab"'
DONE = b"data: [DONE]\n\n"
USAGE = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":8}}%s}\n\n'
SEEN = Usage(9, 8)


def token(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "x", "choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


def stamped(event: bytes) -> bytes:
    return event[:-3] + FINGERPRINT + event[-3:]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(stream) + 1) for place in places} | {0, len(stream)})
    return [stream[begin:end] for begin, end in pairwise(ends)]


def passed(meter: Any, chunks: list[bytes]) -> bytes:
    return b"".join([*map(meter.feed, chunks), meter.end()])


places = st.lists(st.integers(0, 10_000), max_size=12)
texts = st.lists(
    st.text(max_size=12) | st.sampled_from(['"usage"', '"choices":[]', "\n\n", "\r", "[DONE]"]), max_size=5
)


@given(texts, places)
def test_an_unasked_stream_loses_the_usage_and_nothing_else(words: list[str], at: list[int]) -> None:
    tokens = b"".join(map(token, words))
    meter = Unasked(stamp=b"")
    assert passed(meter, cut(tokens + USAGE % b"" + DONE, at)) == tokens + DONE
    assert meter.usage == SEEN


@given(texts, places, st.booleans())
def test_the_fingerprint_goes_back_to_where_it_is_without_usage(words: list[str], at: list[int], known: bool) -> None:
    tokens, last = b"".join(map(token, words)), token("end", "stop")
    meter = Unasked(FINGERPRINT if known else None)
    assert passed(meter, cut(tokens + last + USAGE % FINGERPRINT + DONE, at)) == tokens + stamped(last) + DONE
    assert (meter.usage, meter.stamp) == (SEEN, FINGERPRINT)


def test_with_several_choices_no_token_waits_for_the_others_to_end() -> None:
    meter = Unasked(stamp=None)
    assert meter.feed(token("a", "stop")) == b""
    assert meter.feed(token("b")) == token("a", "stop") + token("b")
    assert meter.feed(token("c", "stop")) == b""
    assert meter.feed(USAGE % FINGERPRINT) == stamped(token("c", "stop"))
    again = Unasked(meter.stamp)
    assert again.feed(token("a", "stop")) == stamped(token("a", "stop"))


def test_an_engine_without_a_fingerprint_gets_none() -> None:
    meter = Unasked(stamp=None)
    stream = token("a", "stop") + USAGE % b"" + DONE
    assert passed(meter, [stream]) == token("a", "stop") + DONE
    assert meter.stamp == b""


@given(places)
def test_an_engine_that_always_tells_its_usage_is_left_alone(at: list[int]) -> None:
    said = b'data: {"choices":[{"index":0,"finish_reason":"stop"}],"usage":{"prompt_tokens":9}}\n\n'
    stream = said + USAGE % FINGERPRINT + DONE
    meter = Unasked(stamp=None)
    assert passed(meter, cut(stream, at)) == stream
    assert meter.usage == SEEN


@given(texts, places)
def test_a_stream_whose_client_asked_passes_as_it_comes(words: list[str], at: list[int]) -> None:
    stream = b"".join(map(token, words)) + token("end", "stop") + USAGE % FINGERPRINT + DONE
    meter = Asked()
    for chunk in cut(stream, at):
        assert meter.feed(chunk) == chunk
    assert meter.usage == SEEN


def test_a_whole_event_never_waits_for_the_next_one() -> None:
    meter = Unasked(stamp=FINGERPRINT)
    half = len(token("a")) // 2
    assert meter.feed(token("a") + token("b")[:half]) == token("a")
    assert meter.feed(token("b")[half:]) == token("b")


@pytest.mark.parametrize("end", [1, 30, 60])
def test_a_stream_that_breaks_off_keeps_what_came_but_for_a_part_of_the_usage(end: int) -> None:
    assert passed(Unasked(stamp=b""), [token("a") + token("b")[:end]]) == token("a") + token("b")[:end]
    assert passed(Unasked(stamp=b""), [token("a") + (USAGE % b"")[: end + 30]]) == token("a")
    assert passed(Unasked(stamp=None), [token("a", "stop")]) == token("a", "stop")


ends = st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n", b"\r\n\r", b"\n\r"])
odd = st.sampled_from(
    [b"data: x", b": a comment", b"event: e\ndata: y", b"data: a\r\ndata: b", b"", b"\n", b"data", b"id: 1\rdata: z"]
)
usages = st.sampled_from(
    [
        b'data: {"choices": [],\ndata: "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}}}',
        b'id:2\rdata:{"choices":[],\r\ndata:"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":8}}}',
    ]
)


@given(
    st.lists(st.tuples(odd, ends), max_size=4),
    st.tuples(usages, ends),
    st.lists(st.tuples(odd, ends), max_size=4),
    places,
)
@example([], (b"data: x", b"\r\r"), [(b"", b"\n")], [])
def test_any_kind_of_line_end_and_event_gives_the_same_wherever_it_is_cut(
    before: list[tuple[bytes, bytes]], usage: tuple[bytes, bytes], after: list[tuple[bytes, bytes]], at: list[int]
) -> None:
    stream = b"".join(line + end for line, end in [*before, usage, *after]) + b"data: rest"
    whole, pieces = Unasked(stamp=b""), Unasked(stamp=b"")
    assert passed(pieces, cut(stream, at)) == passed(whole, [stream])
    assert pieces.usage == whole.usage


@given(st.lists(st.tuples(st.integers(0, 60), ends), max_size=5), usages, places, st.integers(1, 140))
def test_events_on_either_side_of_the_limit_give_the_same_wherever_they_are_cut(
    before: list[tuple[int, bytes]], usage: bytes, at: list[int], limit: int
) -> None:
    stream = b"".join(b"data: " + b"x" * size + end for size, end in before) + usage + b"\n\n" + DONE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sse, "EVENT_BYTES", limit)
        whole, pieces = Unasked(stamp=b""), Unasked(stamp=b"")
        chunks = cut(stream, at)
        out = b""
        for chunk in chunks:
            out += pieces.feed(chunk)
            assert len(pieces._events._held) <= limit + 3
        assert out + pieces.end() == passed(whole, [stream])
        assert pieces.usage == whole.usage
        assert (whole.usage == SEEN) == (len(usage) + 2 <= limit)


@given(st.binary(max_size=80), places)
def test_bytes_that_are_no_stream_pass_unchanged(noise: bytes, at: list[int]) -> None:
    assert passed(Unasked(stamp=None), cut(noise, at)) == noise


@pytest.mark.parametrize("size", [EVENT_BYTES - 1, EVENT_BYTES, EVENT_BYTES + 1, 10 << 20])
def test_a_long_event_is_passed_on_in_parts_and_never_held(size: int) -> None:
    event = b"data: ".ljust(size - 2, b"x") + b"\n\n"
    chunks = cut(event + USAGE % b"" + DONE, list(range(0, size, 9_999)))
    meter, out, held = Unasked(stamp=b""), 0, 0
    for number, chunk in enumerate(chunks, 1):
        out += len(meter.feed(chunk))
        held = max(held, sum(map(len, chunks[:number])) - out) if number < len(chunks) - 2 else held
    assert held <= EVENT_BYTES
    assert out == len(event + DONE)
    assert meter.usage == SEEN


@given(st.binary(max_size=60) | st.text("\r\nd:", max_size=30).map(str.encode), places)
def test_the_pieces_of_a_stream_are_the_stream(stream: bytes, at: list[int]) -> None:
    splitter, once = Splitter(), Splitter()
    found = [piece for chunk in cut(stream, at) for piece in splitter.feed(chunk)]
    assert [piece for piece in found if piece.whole] == [piece for piece in once.feed(stream) if piece.whole]
    assert b"".join(piece.raw for piece in found) + splitter.end() == stream


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3), places, st.sampled_from([None, 1]))
def test_the_usage_of_a_whole_answer_is_read_in_passing(
    more: dict[str, str], at: list[int], indent: int | None
) -> None:
    usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}}
    said = {"choices": [{"text": '"usage": {"prompt_tokens": 1}', **more}], "usage": usage, "after": "x" * 9_000}
    raw = json.dumps(said, indent=indent).encode()
    meter = Body()
    for chunk in cut(raw, at):
        assert meter.feed(chunk) == chunk
    assert meter.usage == SEEN


@pytest.mark.parametrize(
    ("body", "tells"),
    [
        ({}, True),
        ({"n": 1, "best_of": None, "logprobs": 1, "echo": False}, True),
        ({"n": 2}, False),
        ({"best_of": 2}, False),
        ({"use_beam_search": True}, False),
        ({"prompt_logprobs": 0}, False),
        ({"echo": True, "logprobs": 1}, False),
        ({"echo": True}, True),
    ],
)
def test_only_one_sequence_that_is_looked_up_tells_of_its_prompt(body: dict[str, Any], tells: bool) -> None:
    assert tells_of_its_prompt(body) == tells


def test_what_only_looks_like_a_usage_is_not_one() -> None:
    for raw in (
        b'{"usage":null}',
        b'{"usage":{"prompt_tokens":true}}',
        b'{"usage":{"a":',
        b'["usage"]',
        b'"usage":[[[[',
    ):
        meter = Body()
        meter.feed(raw)
        assert meter.usage is None
    meter = Body()
    meter.feed(b'{"usage":null,"usage":{"prompt_tokens":3}}')
    assert meter.usage == Usage(3, None)


@pytest.mark.parametrize(
    ("value", "usage"),
    [
        ({"prompt_tokens": 3}, Usage(3, None)),
        ({"prompt_tokens": 3, "prompt_tokens_details": None}, Usage(3, None)),
        ({"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0}}, Usage(3, 0)),
        ({"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": -1}}, Usage(3, None)),
        ({"prompt_tokens": "3"}, None),
        ([], None),
    ],
)
def test_a_usage_is_taken_for_what_it_says(value: Any, usage: Usage | None) -> None:
    assert read_usage(value) == usage
