"""Best-effort requests that engines are told to leave so that more urgent ones have room, in a real router process."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from vllm_llmd.testing.fake_engine import Behaviour, FakeEngine
from vllm_llmd.testing.fake_stock_engine import FakeStockEngine
from vllm_llmd.testing.site import COMPLETIONS, Router, Site, chat, open_client, statuses, until

Answers = list["asyncio.Task[aiohttp.ClientResponse]"]


def queueing(*flags: str) -> Any:
    """Sites whose engines may have no more than they run."""
    return pytest.mark.parametrize("site", [("--engine-queue", "0", "--heartbeat-ms", "50", *flags)], indirect=True)


async def held(site: Site, name: str = "a", sequences: int = 2) -> FakeEngine:
    """An engine that answers only whom its turnstile lets through."""
    engine = await site.engine(name, max_sequences=sequences)
    engine.turnstile = asyncio.Semaphore(0)
    await site.ready(engine)
    return engine


def ask(site: Site, text: str, priority: int, **more: Any) -> "asyncio.Task[aiohttp.ClientResponse]":
    return asyncio.ensure_future(site.post(chat(text, **more), headers={"x-llmd-priority": str(priority)}))


async def received(engine: FakeEngine, *texts: str) -> None:
    """All that the engine has been asked, in this order."""

    async def got() -> list[str]:
        return [request.body["messages"][0]["content"] for request in engine.requests]

    await until(got, lambda found: found == list(texts))


async def best_effort(site: Site, engine: FakeEngine, *texts: str) -> Answers:
    """The engine has them, in this order."""
    answers: Answers = []
    for text in texts:
        answers.append(ask(site, text, -1))
        await received(engine, *texts[: len(answers)])
    return answers


async def given_up(engine: FakeEngine, count: int = 1) -> None:
    """The engine has noticed that so many have been: its turnstile lets only others through."""
    await until(lambda: asyncio.sleep(0, engine.cancelled), lambda found: found == count)


async def given_up_for(site: Site, engine: FakeEngine) -> Answers:
    """Of two that are best effort, one makes room for an urgent one."""
    answers = await best_effort(site, engine, "one", "two")
    answers.append(ask(site, "urgent", 0))
    await received(engine, "one", "two", "urgent")
    await given_up(engine)
    return answers


async def waiting(site: Site, band: str, count: int) -> None:
    await until(lambda: site.metric(f'vllm_llmd_queued_requests{{band="{band}"}}'), lambda found: found == count)


def let_through(engine: FakeEngine, count: int) -> None:
    assert engine.turnstile is not None
    for _ in range(count):
        engine.turnstile.release()


async def engine_state(site: Site, name: str = "a") -> dict[str, Any]:
    [found] = [each for each in await site.admin_engines() if each["id"] == name]
    return found


@queueing()
async def test_an_urgent_request_takes_the_place_of_the_latest_best_effort_which_is_served_later(site: Site) -> None:
    engine = await held(site)
    answers = await given_up_for(site, engine)
    await waiting(site, "best_effort", 1)
    assert await site.metric('vllm_llmd_preempted_requests_total{engine="a"}') == 1
    let_through(engine, 1)
    await received(engine, "one", "two", "urgent", "two")
    let_through(engine, 2)
    assert await statuses(answers) == [200] * 3
    assert engine.requests[3].body["messages"] == chat("two")["messages"]


@queueing()
async def test_who_is_given_up_is_no_failure_and_no_retry_and_leaves_nothing_behind(site: Site) -> None:
    engine = await held(site)
    answers = await given_up_for(site, engine)
    assert (await engine_state(site))["requests"] == 2
    let_through(engine, 9)
    assert await statuses(answers) == [200] * 3
    state = await engine_state(site)
    assert (state["requests"], state["circuit"]) == (0, "closed")
    exposed = await _metrics(site)
    assert "vllm_llmd_engine_failures_total{" not in exposed
    assert "vllm_llmd_retries_refused_total 0" in exposed
    assert "vllm_llmd_cancelled_requests_total 0" in exposed
    assert "vllm_llmd_body_bytes 0" in exposed
    decisions = (await site.get_json("/admin/decisions"))["decisions"]
    given_up = [
        each for each in decisions if (each["outcome"] or {}).get("failure") == "given up for a more urgent request"
    ]
    assert len(given_up) == 1
    [again] = [each for each in decisions if each["id"] == given_up[0]["request"] + ".2"]
    assert again["outcome"]["failure"] is None


async def _metrics(site: Site) -> str:
    async with site.client.get(site.router.http + "/metrics") as response:
        return await response.text()


@queueing()
async def test_nobody_is_given_up_more_than_twice(site: Site) -> None:
    engine = await held(site, sequences=1)
    answers = await best_effort(site, engine, "one")
    got = ["one"]
    for number, text in enumerate(("first", "second"), 1):
        answers.append(ask(site, text, 0))
        got.append(text)
        await received(engine, *got)
        await given_up(engine, number)
        let_through(engine, 1)
        got.append("one")
        await received(engine, *got)
    answers.append(ask(site, "third", 0))
    await waiting(site, "normal", 1)
    let_through(engine, 1)
    await received(engine, *got, "third")
    let_through(engine, 1)
    assert await statuses(answers) == [200] * 4


@queueing("--preemptions", "0")
async def test_it_can_be_switched_off(site: Site) -> None:
    engine = await held(site)
    answers = await best_effort(site, engine, "one", "two")
    answers.append(ask(site, "urgent", 10))
    await waiting(site, "high", 1)
    let_through(engine, 1)
    await received(engine, "one", "two", "urgent")
    let_through(engine, 2)
    assert await statuses(answers) == [200] * 3


@queueing()
async def test_who_has_begun_to_answer_is_left_alone(site: Site) -> None:
    engine = await held(site, sequences=1)
    engine.behaviour = Behaviour.STALL_MIDWAY
    begun = ask(site, "one", -1, stream=True)
    await received(engine, "one")
    let_through(engine, 1)
    response = await begun
    await response.content.readany()
    urgent = ask(site, "urgent", 0)
    await waiting(site, "normal", 1)
    assert await site.metric('vllm_llmd_preempted_requests_total{engine="a"}') == 0
    response.close()
    engine.behaviour = Behaviour.ANSWER
    let_through(engine, 1)
    assert await statuses([urgent]) == [200]


@queueing()
async def test_a_client_that_leaves_when_its_request_was_given_up_leaves_the_queue(site: Site) -> None:
    engine = await held(site, sequences=1)
    [gone] = await best_effort(site, engine, "one")
    urgent = ask(site, "urgent", 0)
    await waiting(site, "best_effort", 1)
    await given_up(engine)
    gone.cancel()
    await waiting(site, "best_effort", 0)
    let_through(engine, 1)
    assert await statuses([urgent]) == [200]
    assert await site.metric("vllm_llmd_cancelled_requests_total") == 1


@queueing("--queue-ttl-ms", "1500")
async def test_the_time_to_wait_counts_from_the_beginning(site: Site) -> None:
    engine = await held(site, sequences=1)
    answers = await best_effort(site, engine, "one")
    answers.append(ask(site, "urgent", 0))
    await received(engine, "one", "urgent")
    await given_up(engine)
    late = await answers[0]
    await late.read()
    assert (late.status, late.headers["x-llmd-reason"]) == (503, "expired")
    let_through(engine, 1)
    assert await statuses([answers[1]]) == [200]


@queueing()
async def test_everybody_is_served_in_a_storm_of_both(site: Site) -> None:
    a, b = await held(site, "a"), await held(site, "b")
    a.turnstile = b.turnstile = None
    answers = [ask(site, f"request {number}", (-1, -1, 0, 5)[number % 4]) for number in range(120)]
    assert await statuses(answers) == [200] * 120
    assert [(await engine_state(site, name))["requests"] for name in "ab"] == [0, 0]
    await waiting(site, "best_effort", 0)
    assert await site.metric("vllm_llmd_body_bytes") == 0


@pytest.fixture
async def stock_engine() -> AsyncIterator[FakeStockEngine]:
    engine = await FakeStockEngine().start()
    yield engine
    await engine.stop()


@pytest.fixture
async def stock(stock_engine: FakeStockEngine, tmp_path: Path) -> AsyncIterator[Site]:
    """A router that is told of the engine, and gives it one request at a time."""
    flags = ("--heartbeat-ms", "50", "--engine-queue", "0", "--engine-requests", "1")
    router = Router(tmp_path / "router.log", (*flags, "--stock-engine", stock_engine.flag))
    await router.start()
    async with open_client() as client:
        site = Site(router, client)
        await until(site.admin_engines, lambda engines: [each["state"] for each in engines] == ["ready"])
        yield site
        assert router.end(signal.SIGTERM) == 0, router.log.read_text()
    assert "Traceback" not in router.log.read_text()


async def test_a_stock_engine_is_made_to_leave_a_request_in_the_same_way(
    stock: Site, stock_engine: FakeStockEngine
) -> None:
    async def asked() -> int:
        return len(stock_engine.requests)

    async def aborted() -> int:
        return stock_engine.aborted

    stock_engine.running = 0.0
    stock_engine.hangs.add(COMPLETIONS)
    body = {"model": "stock", "prompt": [1, 2, 3]}
    best_effort = asyncio.ensure_future(stock.post(body, COMPLETIONS, headers={"x-llmd-priority": "-1"}))
    await until(asked, lambda count: count == 1)
    stock_engine.hangs.clear()
    async with stock.post({"model": "stock", "prompt": [4]}, COMPLETIONS) as response:
        assert response.status == 200
    assert await statuses([best_effort]) == [200]
    await until(aborted, lambda count: count == 1)
    assert [request.body["prompt"] for request in stock_engine.requests] == [[1, 2, 3], [4], [1, 2, 3]]
