"""Streams of a toy engine that break anywhere and are continued by another: the client must not notice."""

import codecs
import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.router.request import Kind, read_facts
from vllm_llmd.router.upstream.failover import Way, way_to_continue
from vllm_llmd.router.upstream.sse import Splitter, data_of
from vllm_llmd.router.upstream.told import Told

ANSWER = "Grüße aus 東京 — 🎉🎉 and out.".encode()
"""Tokens are bytes, so that many of them have no text of their own."""

PROMPT = [1, 2, 3]


def body_of(kind: Kind, **more: Any) -> dict[str, Any]:
    asked: dict[str, Any] = (
        {"prompt": "p"} if kind == "completion" else {"messages": [{"role": "user", "content": "p"}]}
    )
    return {"model": "m", "stream": True, "temperature": 0, "max_tokens": len(ANSWER), **asked, **more}


@dataclass
class ToyEngine:
    """Answers any prompt that ends with a part of the answer with the rest. `sizes`: tokens per event, in turn.

    The text comes `lag` characters late, as with stop strings.
    """

    id: str
    sizes: list[int]
    lag: int = 0
    cached: int = 3

    def stream(self, kind: Kind, raw: bytes) -> bytes:
        body = json.loads(raw)
        prompt = body["prompt"] if kind == "completion" and isinstance(body["prompt"], list) else PROMPT
        rest = ANSWER[len(prompt) - len(PROMPT) :][: body["max_tokens"]]
        assert bytes(prompt[len(PROMPT) :]) + rest == ANSWER
        events = [] if kind == "completion" else [self._opening(prompt)]
        decoder, at, turn, text, told = codecs.getincrementaldecoder("utf-8")(), 0, 0, "", 0
        while at < len(rest):
            ids = rest[at : at + self.sizes[turn % len(self.sizes)]]
            at, turn = at + len(ids), turn + 1
            text += "".join(decoder.decode(bytes([each])) for each in ids)
            end = len(text) if at == len(rest) else max(len(text) - self.lag, told)
            events.append(self._event(kind, text[told:end], list(ids), prompt if turn == 1 else None, at == len(rest)))
            told = end
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(rest), "total_tokens": len(prompt) + len(rest)}
        events.append(self._head() | {"choices": [], "usage": usage})
        return b"".join(b"data: %b\n\n" % written(event) for event in events) + b"data: [DONE]\n\n"

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "chunk", "created": len(self.id), "model": "m"}

    def _opening(self, prompt: list[int]) -> dict[str, Any]:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return self._head() | {"choices": [choice], "prompt_token_ids": prompt}

    def _event(self, kind: Kind, text: str, ids: list[int], prompt: list[int] | None, last: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if last else None, "token_ids": ids}
        choice |= {"text": text, "prompt_token_ids": prompt} if kind == "completion" else {"delta": {"content": text}}
        return self._head() | {"choices": [choice]}


def written(event: dict[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass
class Heard:
    """What a client makes of a stream."""

    text: str
    ids: list[int]
    finishes: list[str]
    usage: list[dict[str, int]]
    heads: set[tuple[str, int]]
    roles: int
    ends: int


def heard(stream: bytes) -> Heard:
    found = Heard("", [], [], [], set(), 0, 0)
    for piece in Splitter().feed(stream):
        data = data_of(piece.raw)
        if data == b"[DONE]":
            found.ends += 1
            continue
        event = json.loads(data)
        found.heads.add((event["id"], event["created"]))
        found.usage += [event["usage"]] if "usage" in event else []
        for choice in event["choices"]:
            delta = choice.get("delta", {})
            found.roles += "role" in delta
            found.text += choice.get("text", delta.get("content", ""))
            found.ids += choice.get("token_ids") or []
            found.finishes += [choice["finish_reason"]] if choice["finish_reason"] else []
    return found


def way_of(kind: Kind, body: dict[str, Any]) -> Way | None:
    return way_to_continue(kind, body, read_facts(kind, body))


def through(kind: Kind, body: dict[str, Any], engines: list[ToyEngine], breaks: list[float]) -> Heard:
    """What a client hears while each engine but the last breaks off after a share of its stream."""
    way = way_of(kind, body)
    assert way is not None
    told, raw, client = Told(way, body.get("return_token_ids") is True), json.dumps(body).encode(), b""
    for engine, share in zip(engines, [*breaks, 1.0], strict=True):
        stream = engine.stream(kind, told.rest(raw))
        until = int(len(stream) * share)
        client += told.feed(stream[: until // 2]) + told.feed(stream[until // 2 : until])
        if engine is not engines[-1]:
            assert told.can_go_on and told.failure is None
            told.broke()
    assert told.is_whole and told.failure is None and told.end() == b""
    return heard(client)


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)
shares = st.floats(0, 0.999)


@given(st.sampled_from(("chat", "completion")), sizes, sizes, sizes, shares, shares, st.integers(0, 4), st.booleans())
def test_a_stream_that_breaks_twice_is_heard_as_if_it_had_not(
    kind: Kind, first: list[int], second: list[int], third: list[int], one: float, two: float, lag: int, shows: bool
) -> None:
    more: dict[str, Any] = ({"stop": ["xyz"]} if lag else {}) | ({"return_token_ids": True} if shows else {})
    engines = [ToyEngine(id, sizes, lag) for id, sizes in (("a", first), ("bb", second), ("ccc", third))]
    got = through(kind, body_of(kind, **more), engines, [one, two])
    assert got.text.encode() == ANSWER
    assert got.ids == (list(ANSWER) if shows else [])
    assert got.finishes == ["length"] and got.ends == 1 and got.roles == (kind == "chat")
    assert len(got.heads) == 1
    assert got.usage == [{"prompt_tokens": 3, "completion_tokens": len(ANSWER), "total_tokens": 3 + len(ANSWER)}]


def test_a_greedy_completion_is_resumed_after_the_last_token_whose_text_is_out() -> None:
    body = body_of("completion")
    told, raw = Told(Way.RESUME, shows_ids=False), json.dumps(body).encode()
    stream = ToyEngine("a", [1]).stream("completion", raw)
    events = stream.split(b"\n\n")
    told.feed(b"\n\n".join(events[:3]) + b"\n\n")  # G, r, and the first byte of ü
    told.broke()
    asked = json.loads(told.rest(raw))
    assert asked["prompt"] == [*PROMPT, *b"Gr"] and asked["max_tokens"] == len(ANSWER) - 2
    facts = told.rest_facts(read_facts("completion", body))
    assert facts.tokens is not None and facts.tokens.tolist() == [*PROMPT, *b"Gr"] and facts.prompt_tokens == 5


def test_the_client_gets_an_undisturbed_stream_byte_for_byte_but_for_the_ids() -> None:
    for kind in ("chat", "completion"):
        stream = ToyEngine("a", [1, 3]).stream(kind, json.dumps(body_of(kind)).encode())
        told = Told(Way.REPLAY, shows_ids=False)
        got = told.feed(stream)
        assert b'token_ids":[' not in got and heard(got).text.encode() == ANSWER
        told = Told(Way.REPLAY, shows_ids=True)
        assert told.feed(stream) == stream


def test_another_answer_is_not_taken_for_the_rest() -> None:
    raw = json.dumps(body_of("chat")).encode()
    stream = ToyEngine("a", [1]).stream("chat", raw)
    told = Told(Way.REPLAY, shows_ids=False)
    told.feed(stream[: len(stream) // 2])
    told.broke()
    assert heard(told.feed(stream.replace(b'"token_ids":[114]', b'"token_ids":[115]'))).text == ""
    assert told.failure is not None and not told.can_go_on


@pytest.mark.parametrize(
    "last", [b'data: {"error":{"message":"engine dead","code":500}}\n\n', b'"finish_reason":"abort"']
)
def test_an_engine_that_says_it_failed_is_not_quoted_if_another_can_go_on(last: bytes) -> None:
    raw = json.dumps(body_of("completion")).encode()
    stream = ToyEngine("a", [1]).stream("completion", raw)
    if b"abort" in last:
        last = stream.split(b"\n\n")[4].replace(b'"finish_reason":null', last) + b"\n\n"
    told = Told(Way.RESUME, shows_ids=False)
    got = told.feed(b"\n\n".join(stream.split(b"\n\n")[:4]) + b"\n\n" + last + b"data: [DONE]\n\n")
    assert told.failure is not None and told.can_go_on and heard(got).text == "Grü"
    assert told.end() == last + b"data: [DONE]\n\n"  # what the client gets if nobody goes on


@pytest.mark.parametrize(
    "event",
    [
        b'{"choices":[{"index":0,"text":"x","finish_reason":null,"token_ids":null}]}',
        b'{"choices":[{"index":0,"text":"x","finish_reason":null}]}',
        b'{"choices":[{"index":0,"delta":{"tool_calls":[{}]},"finish_reason":null,"token_ids":[1]}]}',
        b'{"choices":[{"index":1,"text":"x","finish_reason":null,"token_ids":[1]}]}',
        b'{"choices":[{"index":0,"text":"x","logprobs":{"tokens":[]},"finish_reason":null,"token_ids":[1]}]}',
    ],
)
def test_a_stream_that_cannot_be_followed_is_not_continued(event: bytes) -> None:
    told = Told(Way.REPLAY, shows_ids=False)
    got = told.feed(b"data: " + event + b"\n\n")
    assert got == (b"data: " + event + b"\n\n").replace(b"[1]", b"null")
    assert not told.can_go_on and told.is_whole


@pytest.mark.parametrize(
    ("kind", "more", "way"),
    [
        ("completion", {}, Way.RESUME),
        ("chat", {}, Way.REPLAY),
        ("completion", {"prompt": [1, 2]}, Way.RESUME),
        ("completion", {"prompt": [[1, 2]]}, Way.RESUME),
        ("completion", {"prompt": ["a", "b"]}, None),
        ("completion", {"max_tokens": None}, Way.REPLAY),
        ("completion", {"stop": ["x"]}, Way.REPLAY),
        ("completion", {"stop": []}, Way.RESUME),
        ("completion", {"frequency_penalty": 0}, Way.RESUME),
        ("completion", {"frequency_penalty": 0.5}, Way.REPLAY),
        ("completion", {"temperature": 1}, None),
        ("completion", {"temperature": None}, None),
        ("completion", {"temperature": False}, None),
        ("completion", {"temperature": 1, "seed": 7}, Way.REPLAY),
        ("completion", {"logprobs": 0}, None),
        ("completion", {"echo": True}, None),
        ("completion", {"n": 2}, None),
        ("completion", {"stream": False}, None),
        ("completion", {"stream_options": {"include_usage": True}}, Way.RESUME),
        ("completion", {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, None),
        ("completion", {"structured_outputs": {"regex": "a"}}, None),
        ("completion", {"what_comes_next_year": 1}, None),
        ("completion", {"what_comes_next_year": None}, Way.RESUME),
        ("completion", {"prompt": list(range(40_000))}, None),
        ("chat", {"tools": [{"type": "function"}]}, None),
        ("chat", {"tools": [], "tool_choice": "none"}, Way.REPLAY),
        ("chat", {"response_format": {"type": "json_object"}}, None),
        ("chat", {"response_format": {"type": "text"}}, Way.REPLAY),
        ("chat", {"logprobs": True}, None),
    ],
)
def test_only_what_is_surely_exact_is_continued(kind: Kind, more: dict[str, Any], way: Way | None) -> None:
    assert way_of(kind, body_of(kind, **more)) is way
