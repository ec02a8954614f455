"""Engines that fail, are drained or are killed behind a real router process: fakes, and simulated engines."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from vllm_llmd import wire
from vllm_llmd.router.upstream.sse import Splitter, data_of
from vllm_llmd.testing.fake_engine import Behaviour, FakeEngine
from vllm_llmd.testing.process import ServerProcess
from vllm_llmd.testing.site import CHAT, COMPLETIONS, Site, chat, until

TOKENS = 150
ENOUGH_EVENTS = 8
SLOW = ("--failures", '{"slow": 20}')
"""So that no answer is over before what a test does to its engine."""

Start = Callable[..., Any]


@pytest.fixture
async def start(site: Site, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts simulated engines, each in a process of its own, and waits until they are ready."""
    async with AsyncExitStack() as stack:

        async def started(*names: str, flags: tuple[str, ...] = ()) -> dict[str, ServerProcess]:
            processes = {}
            for name in names:
                more = ("--router", site.router.zmq, "--id", name, *SLOW, *flags)
                processes[name] = process = ServerProcess("vllm_llmd.sim.main", more, tmp_path / f"{name}.log")
                await asyncio.to_thread(process.start)
                stack.callback(lambda process=process: process.running and process.end(signal.SIGKILL))
            await until(
                site.states, lambda states: {(name, "ready") for name in names} <= {(n, s) for n, _, s in states}
            )
            return processes

        yield started


async def shown(site: Site, engine_id: str) -> dict[str, Any]:
    [engine] = [each for each in await site.admin_engines() if each["id"] == engine_id]
    return engine


async def preferred(site: Site, engine: FakeEngine, *others: FakeEngine) -> None:
    """Everything goes to the engine, as long as it may."""
    for other in others:
        other.load = wire.Load(waiting=100)
    await site.ready(engine, *others)
    await until(
        site.admin_engines, lambda engines: sum(each["load"]["waiting"] for each in engines) == 100 * len(others)
    )


async def ask(site: Site) -> str:
    async with site.post(chat("hello")) as response:
        assert response.status == 200
        return str(response.headers["X-Fake-Engine"])


async def openings_of(site: Site, engine: str) -> float:
    line = f'vllm_llmd_circuits_opened_total{{engine="{engine}",reason="%s"}}'
    return await site.metric(line % "failed often") + await site.metric(line % "failed")


async def test_a_circuit_opens_when_an_engine_fails_often_and_closes_when_it_has_recovered(site: Site) -> None:
    bad, good = await site.engine("bad"), await site.engine("good")
    bad.behaviour = Behaviour.FAIL
    await preferred(site, bad, good)
    while (await shown(site, "bad"))["circuit"] == "closed":
        assert await ask(site) == "good"
    assert len(bad.requests) == 5
    assert await site.metric('vllm_llmd_circuits_opened_total{engine="bad",reason="failed often"}') == 1
    openings = 0.0
    while openings != await openings_of(site, "bad"):  # on a slow machine it is time to try again meanwhile
        openings, asked = await openings_of(site, "bad"), len(bad.requests)
        assert [await ask(site) for _ in range(5)] == ["good"] * 5
    assert len(bad.requests) == asked
    assert await site.metric('vllm_llmd_engine_circuit_closed{engine="bad"}') == 0
    bad.behaviour = Behaviour.ANSWER
    await until(lambda: shown(site, "bad"), lambda engine: engine["circuit"] == "half open")
    assert await ask(site) == "bad"
    assert (await shown(site, "bad"))["circuit"] == "closed"


async def test_when_every_circuit_is_open_requests_are_served_all_the_same(site: Site) -> None:
    engine = await site.engine("a")
    engine.behaviour = Behaviour.FAIL
    await site.ready(engine)
    for _ in range(8):
        async with site.post(chat("hello")) as response:
            assert response.status == 500
    assert (await shown(site, "a"))["circuit"] == "open" and len(engine.requests) == 8
    engine.behaviour = Behaviour.ANSWER
    assert await ask(site) == "a"


@pytest.mark.parametrize("site", [("--retry-percent", "0")], indirect=True)
async def test_without_a_budget_nothing_is_retried(site: Site) -> None:
    engines = [await site.engine(name) for name in "ab"]
    for engine in engines:
        engine.behaviour = Behaviour.RESET
    await site.ready(*engines)
    async with site.post(chat("hello")) as response:
        assert response.status == 503
    assert sum(len(engine.requests) for engine in engines) == 1
    assert await site.metric("vllm_llmd_retries_refused_total") == 1


async def test_a_fleet_that_fails_altogether_gets_half_as_many_retries_as_requests(site: Site) -> None:
    engines = [await site.engine(name) for name in "abcd"]
    for engine in engines:
        engine.behaviour = Behaviour.RESET
    await site.ready(*engines)

    async def one() -> int:
        async with site.post(chat("hello")) as response:
            return response.status

    assert await asyncio.gather(*(one() for _ in range(50))) == [503] * 50
    assert 50 < sum(len(engine.requests) for engine in engines) <= 50 + 25 + 10


async def test_a_drained_engine_finishes_what_it_has_and_gets_nothing_new(site: Site) -> None:
    one, two = await site.engine("a"), await site.engine("b")
    one.behaviour = Behaviour.STALL
    await preferred(site, one, two)
    stalled = asyncio.create_task(ask(site))
    await until(lambda: asyncio.sleep(0, len(one.requests)), lambda count: count == 1)
    async with site.client.post(site.router.http + "/admin/engines/a/drain") as response:
        assert await response.json() == {"id": "a", "draining": True, "requests": 1}
    assert [await ask(site) for _ in range(5)] == ["b"] * 5
    assert await site.metric('vllm_llmd_engine_draining{engine="a"}') == 1
    engine = await shown(site, "a")
    assert (engine["draining"], engine["requests"], engine["state"]) == (True, 1, "ready")
    assert not stalled.done() and not one.cancelled
    stalled.cancel()
    await until(lambda: shown(site, "a"), lambda engine: engine["requests"] == 0)
    one.behaviour = Behaviour.ANSWER
    async with site.client.post(site.router.http + "/admin/engines/a/undrain") as response:
        assert (await response.json())["draining"] is False
    assert await ask(site) == "a"
    async with site.client.post(site.router.http + "/admin/engines/nobody/drain") as response:
        assert response.status == 404


async def test_a_fleet_that_is_drained_altogether_is_not_ready(site: Site) -> None:
    engine = await site.engine("a")
    await site.ready(engine)
    async with site.client.post(site.router.http + "/admin/engines/a/drain") as response:
        assert response.status == 200
    assert (await site.get_json("/health"))["error"]["code"] == "no_engine_ready"
    async with site.post(chat("hello")) as response:
        assert response.status == 503


# --- streams ----------------------------------------------------------------------------------------------------


def body_of(path: str, **more: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompt": list(range(100))} if path == COMPLETIONS else chat("tell me of the cache")
    return {
        **asked,
        "model": "sim",
        "stream": True,
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        **more,
    }


def text_of(stream: bytes) -> tuple[str, list[str], list[dict[str, Any]], set[str], bool]:
    """The text, why it ends, usages, ids of the answer, and whether the stream says that it is over."""
    text, finishes, usages, ids, done = "", [], [], set(), False
    for piece in Splitter().feed(stream):
        data = data_of(piece.raw)
        if data == b"[DONE]":
            done = True
            continue
        event = json.loads(data)
        assert "error" not in event, event
        assert b'token_ids":[' not in data
        ids.add(event["id"])
        usages += [event["usage"]] if "usage" in event else []
        for choice in event["choices"]:
            text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            finishes += [choice["finish_reason"]] if choice["finish_reason"] else []
    return text, finishes, usages, ids, done


async def hurry(site: Site, engine: ServerProcess) -> None:
    """From now on it is slow no more."""
    if engine.running:
        async with site.client.post(engine.said["engines"][0]["http"] + "/sim/failures", json={"slow": 1}) as response:
            assert response.status == 200


async def disturbed(site: Site, path: str, body: dict[str, Any], processes: dict[str, ServerProcess]) -> bytes:
    """The stream that a client gets whose engine is killed midway."""
    got = b""
    async with site.post(body, path) as response:
        async for chunk in response.content.iter_any():
            got += chunk
            engine = processes[response.headers["X-Sim-Engine"]]
            if got.count(b"\n\n") > ENOUGH_EVENTS and engine.running:
                await asyncio.to_thread(engine.end, signal.SIGKILL)
                for other in processes.values():
                    await hurry(site, other)
    return got


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (COMPLETIONS, {"stream_options": {"include_usage": True}}),
        (COMPLETIONS, {"prompt": "a text"}),
        (CHAT, {}),
        (CHAT, {"temperature": 0.5, "seed": 3, "stream_options": {"include_usage": True}}),
    ],
)
async def test_a_stream_whose_engine_is_killed_goes_on_as_if_nothing_had_happened(
    site: Site, start: Start, path: str, more: dict[str, Any]
) -> None:
    processes = await start("a", "b")
    body = body_of(path, **more)
    text, finishes, usages, ids, done = text_of(await disturbed(site, path, body, processes))
    assert sum(process.running for process in processes.values()) == 1
    async with site.post(body, path) as response:
        undisturbed = text_of(await response.read())
    for usage in (*usages, *undisturbed[2]):
        del usage["prompt_tokens_details"]
    assert (text, finishes, usages, done) == (undisturbed[0], ["length"], undisturbed[2], True)
    assert len(text) == 4 * TOKENS and len(ids) == 1
    assert await site.metric('vllm_llmd_continued_streams_total{result="whole"}') == 1


@pytest.mark.parametrize("more", [{"temperature": 1}, {"temperature": None}, {"logprobs": 1}])
async def test_a_stream_that_could_go_on_differently_ends_with_an_error_event(
    site: Site, start: Start, more: dict[str, Any]
) -> None:
    processes = await start("a", "b")
    got = await disturbed(site, COMPLETIONS, body_of(COMPLETIONS, **more), processes)
    assert json.loads(got.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]["code"] == "engine_failed"


async def test_a_stream_that_nobody_can_continue_ends_with_an_error_event(site: Site, start: Start) -> None:
    processes = await start("a")
    got = await disturbed(site, COMPLETIONS, body_of(COMPLETIONS), processes)
    assert json.loads(got.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]["code"] == "engine_failed"
    assert await site.metric('vllm_llmd_continued_streams_total{result="broken"}') == 1


async def test_an_engine_told_to_stop_finishes_what_it_has_while_new_requests_go_elsewhere(
    site: Site, start: Start
) -> None:
    processes = await start("a", "b", flags=("--drain-ms", "120000"))
    async with site.post(body_of(COMPLETIONS), COMPLETIONS) as response:
        await response.content.readany()
        leaving = response.headers["X-Sim-Engine"]
        ending = asyncio.create_task(asyncio.to_thread(processes[leaving].end, signal.SIGTERM))
        await until(lambda: shown(site, leaving), lambda engine: engine["draining"])
        for _ in range(3):
            async with site.post(body_of(COMPLETIONS, stream=False, max_tokens=1), COMPLETIONS) as other:
                assert other.status == 200 and other.headers["X-Sim-Engine"] != leaving
        await hurry(site, processes[leaving])
        rest = await response.read()
    assert b'"finish_reason":"length"' in rest and rest.endswith(b"data: [DONE]\n\n")
    assert await ending == 0
    await until(site.states, lambda states: len(states) == 1)
    assert await site.metric(f'vllm_llmd_broken_streams_total{{engine="{leaving}"}}') == 0
