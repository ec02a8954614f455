"""Real engines that are killed, or told to stop, while they stream: the client's answer is that of one engine."""

import json
import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

EVENTS = 25
TOKENS = 100
LONG = 3000
"""So many that a fast engine is still busy when it has been noticed that it leaves."""
DEADLINE_S = 60.0
TEXT = "Write about prefix caches — 日本語も — with an emoji 🎉 in every line:\n"


@pytest.fixture
def both(twins) -> Iterator[Any]:
    """The fleet, made whole again after a test has ended an engine."""
    yield twins
    for engine in twins.fleet.engines:
        if not engine.process.running:
            twins.fleet.start_engine(engine.spec.id)


def body_of(path: str, **more: Any) -> dict[str, Any]:
    asked = {"prompt": TEXT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": TEXT}]}
    body = {"model": "m", "stream": True, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
    return body | asked | {"stream_options": {"include_usage": True}} | more


def events_of(response: Any) -> Any:
    for line in response:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line.removeprefix(b"data: "))


def text_of(events: list[dict[str, Any]]) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)


def broken_streams(lab) -> list[str]:
    """How many broke off, engine by engine, since the router's start."""
    return re.findall(r"^vllm_llmd_broken_streams_total.*$", lab.router.get("/metrics"), re.MULTILINE)


def server_of(lab) -> str:
    """The engine that has the one request that is under way."""
    [engine] = [engine_id for engine_id, engine in lab.engines().items() if engine["requests"]]
    return engine


def disturbed(lab, path: str, body: dict[str, Any], number: signal.Signals) -> tuple[str, list[dict[str, Any]]]:
    """Which engine was signalled midway, and the events that the client got."""
    events, signalled = [], ""
    with lab.router.open(path, body) as response:
        for event in events_of(response):
            events.append(event)
            if len(events) == EVENTS:
                signalled = server_of(lab)
                lab.fleet.kill_engine(signalled, number)
    return signalled, events


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/completions", {}),
        ("/v1/completions", {"temperature": 0.8, "seed": 7}),
        ("/v1/chat/completions", {}),
    ],
)
def test_a_stream_whose_engine_is_killed_is_that_of_an_undisturbed_engine(both, path: str, more: Any) -> None:
    body = body_of(path, **more)
    killed, events = disturbed(both, path, body, signal.SIGKILL)
    other = next(engine.spec.id for engine in both.fleet.engines if engine.spec.id != killed)
    with both.engine(other).open(path, body | {"cache_salt": "undisturbed"}) as response:
        undisturbed = list(events_of(response))
    assert not [event for event in events if "error" in event]
    assert text_of(events) == text_of(undisturbed)
    assert len({event["id"] for event in events}) == len({event["created"] for event in events}) == 1
    usage, expected = events[-1]["usage"], undisturbed[-1]["usage"]
    assert {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        name: expected[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    assert [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]] == ["length"]


def test_an_engine_told_to_stop_finishes_its_stream_and_gets_nothing_new(both) -> None:
    body = body_of("/v1/completions", max_tokens=LONG)
    events, leaving, others, broken = [], "", 0, broken_streams(both)
    with both.router.open("/v1/completions", body) as response:
        for event in events_of(response):
            events.append(event)
            if len(events) == EVENTS:
                leaving = server_of(both)
                os.kill(both.fleet.engine(leaving).pid, signal.SIGTERM)  # as a container's runtime does
                both.until(lambda at=leaving: both.engines()[at]["draining"], "it does not say that it leaves")
                for _ in range(3):
                    both.router.complete(both.prompt(20), max_tokens=1)
                    others += 1
    assert others == 3 and events[-1]["usage"]["completion_tokens"] == LONG
    both.fleet.engine(leaving).process.guard.wait(DEADLINE_S)
    assert leaving not in both.engines(), "it has said goodbye"
    assert broken_streams(both) == broken
