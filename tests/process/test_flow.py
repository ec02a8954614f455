"""Requests that wait in a real router process while its fake engines are saturated."""

import asyncio
import signal
from typing import Any

import aiohttp
import pytest

from vllm_llmd.clock import unix_ms
from vllm_llmd.testing.fake_engine import FakeEngine
from vllm_llmd.testing.site import COMPLETIONS, Site, chat, statuses, until
from vllm_llmd.wire import Load

Answers = list[asyncio.Task[aiohttp.ClientResponse]]


def queueing(*flags: str) -> Any:
    """Sites whose engines may have no more than they run."""
    return pytest.mark.parametrize("site", [("--engine-queue", "0", "--heartbeat-ms", "50", *flags)], indirect=True)


async def held(site: Site, name: str = "a", **settings: Any) -> FakeEngine:
    """An engine that runs two requests at a time, and answers only whom its turnstile lets through."""
    engine = await site.engine(name, **{"max_sequences": 2, **settings})
    engine.turnstile = asyncio.Semaphore(0)
    await site.ready(engine)
    return engine


def ask(site: Site, text: str, **headers: str) -> "asyncio.Task[aiohttp.ClientResponse]":
    named = {"x-llmd-" + name.replace("_", "-"): value for name, value in headers.items()}
    return asyncio.ensure_future(site.post(chat(text), headers=named))


async def queued(site: Site, count: int, band: str = "normal") -> None:
    line = f'vllm_llmd_queued_requests{{band="{band}"}}'
    await until(lambda: site.metric(line), lambda waiting: waiting == count)


async def ask_in_turn(site: Site, *texts: str, band: str = "normal", **headers: str) -> Answers:
    """Each waits before the next one asks."""
    line, answers = f'vllm_llmd_queued_requests{{band="{band}"}}', []
    before = await site.metric(line)
    for number, text in enumerate(texts):
        answers.append(ask(site, text, **headers))
        await queued(site, int(before) + number + 1, band)
    return answers


async def fill(site: Site, engine: FakeEngine) -> Answers:
    """The engine gets what it can run."""
    answers = [ask(site, f"first {number}") for number in range(2)]
    await received(engine, 2)
    return answers


async def received(engine: FakeEngine, count: int) -> list[str]:
    async def texts() -> list[str]:
        return [request.body["messages"][0]["content"] for request in engine.requests]

    return await until(texts, lambda got: len(got) == count)


async def let_through(engine: FakeEngine, count: int) -> list[str]:
    """One after the other; what the engine has received in their places."""
    assert engine.turnstile is not None
    before = len(engine.requests)
    for number in range(count):
        engine.turnstile.release()
        await received(engine, before + number + 1)
    return (await received(engine, before + count))[before:]


async def finish(engine: FakeEngine, *answers: "asyncio.Task[aiohttp.ClientResponse]") -> list[int]:
    assert engine.turnstile is not None
    for _ in range(100):
        engine.turnstile.release()
    return await statuses(answers)


@queueing()
async def test_a_burst_waits_in_the_router_and_drains(site: Site) -> None:
    engine = await held(site)
    answers = [ask(site, f"request {number}") for number in range(20)]
    await queued(site, 18)
    await received(engine, 2)
    assert await finish(engine, *answers) == [200] * 20
    assert sorted(await received(engine, 20)) == sorted(f"request {number}" for number in range(20))
    assert await site.metric('vllm_llmd_queue_wait_seconds_count{band="normal"}') == 18
    await queued(site, 0)


@queueing("--policy", "least_requests")
async def test_who_waits_goes_to_whichever_engine_has_room(site: Site) -> None:
    a, b = await held(site, "a"), await held(site, "b")
    answers = [ask(site, f"request {number}") for number in range(6)]
    await queued(site, 2)
    a.load = Load(running=2)  # or the policy would take it to be idle
    await until(site.admin_engines, lambda engines: [each["load"]["running"] for each in engines] == [2, 0])
    assert b.turnstile is not None
    b.turnstile.release()
    b.turnstile.release()
    await received(b, 4)
    await finish(a)
    assert await finish(b, *answers) == [200] * 6


@queueing()
async def test_a_flood_of_low_priority_does_not_delay_high_priority(site: Site) -> None:
    engine = await held(site)
    first = await fill(site, engine)
    flood = await ask_in_turn(site, *(f"low {number}" for number in range(10)), band="best_effort", priority="-1")
    urgent = await ask_in_turn(site, "high", band="high", priority="10")
    assert await let_through(engine, 2) == ["high", "low 0"]
    assert await finish(engine, *first, *flood, *urgent) == [200] * 13


@queueing()
async def test_a_greedy_tenant_does_not_starve_another(site: Site) -> None:
    engine = await held(site)
    first = await fill(site, engine)
    greedy = await ask_in_turn(site, *(f"greedy {number}" for number in range(10)), tenant="greedy")
    modest = await ask_in_turn(site, "modest 0", "modest 1", tenant="modest")
    assert await let_through(engine, 4) == ["greedy 0", "modest 0", "greedy 1", "modest 1"]
    assert await finish(engine, *first, *greedy, *modest) == [200] * 14


@queueing()
async def test_the_tighter_objective_of_a_tenant_goes_first(site: Site) -> None:
    engine = await held(site)
    first = await fill(site, engine)
    waiting = await ask_in_turn(site, "whenever")
    waiting += await ask_in_turn(site, "in five seconds", slo_ttft_ms="5000")
    waiting += await ask_in_turn(site, "in two", slo_ttft_ms="2000")
    assert await let_through(engine, 3) == ["in two", "in five seconds", "whenever"]
    assert await finish(engine, *first, *waiting) == [200] * 5


@queueing("--queue-requests", "2")
async def test_a_full_queue_refuses_and_says_why_and_when_to_come_back(site: Site) -> None:
    engine = await held(site)
    first = await fill(site, engine)
    waiting = await ask_in_turn(site, "one", "two")
    async with site.post(chat("three")) as response:
        assert response.status == 429
        assert response.headers["x-llmd-reason"] == "queue-full"
        assert response.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"
        assert int(response.headers["Retry-After"]) >= 1
        assert (await response.json())["error"]["code"] == "queue_full"
    assert await site.metric('vllm_llmd_shed_requests_total{band="normal",reason="queue-full"}') == 1
    assert await finish(engine, *first, *waiting) == [200] * 4


@queueing("--queue-requests", "2")
async def test_best_effort_makes_room_for_others(site: Site) -> None:
    engine = await held(site)
    first = await fill(site, engine)
    [stays, goes] = await ask_in_turn(site, "one", "two", band="best_effort", priority="-1")
    waiting = await ask_in_turn(site, "urgent", slo_ttft_ms="1000")
    response = await goes
    await response.read()
    assert (response.status, response.headers["x-llmd-reason"]) == (429, "displaced")
    assert await finish(engine, *first, stays, *waiting) == [200] * 4


@queueing("--queue-ttl-ms", "100")
async def test_nobody_waits_for_ever(site: Site) -> None:
    engine = await held(site)
    first = await fill(site, engine)
    async with site.post(chat("late")) as response:
        assert (response.status, response.headers["x-llmd-reason"]) == (503, "expired")
        assert response.headers["x-llm-d-request-dropped-reason"] == "rejected-ttl-expired"
        assert "Retry-After" in response.headers
    assert await finish(engine, *first) == [200] * 2


@queueing()
async def test_a_client_that_goes_away_leaves_the_queue(site: Site) -> None:
    engine = await held(site)
    first = await fill(site, engine)
    [gone, stays] = await ask_in_turn(site, "gone", "stays")
    gone.cancel()
    await queued(site, 1)
    assert await let_through(engine, 1) == ["stays"]
    assert await finish(engine, *first, stays) == [200] * 3
    assert await site.metric("vllm_llmd_cancelled_requests_total") == 1


@queueing()
async def test_an_engine_that_claims_to_be_full_for_ever_is_still_used(site: Site) -> None:
    engine = await site.engine("liar")
    engine.load = Load(running=10**6, waiting=10**6, prefill_tokens=10**9)
    await site.ready(engine)
    answers = [ask(site, f"request {number}") for number in range(10)]
    assert await statuses(answers) == [200] * 10


@queueing()
async def test_an_engine_that_fails_gives_its_room_back(site: Site) -> None:
    engine = await held(site)
    first = await fill(site, engine)
    waiting = await ask_in_turn(site, "one", "two", "three")
    for answer in first:
        answer.cancel()
    await received(engine, 4)
    assert await finish(engine, *waiting) == [200] * 3


@queueing()
@pytest.mark.usefixtures("goodbyes_arrive")
async def test_the_last_engine_to_leave_lets_everyone_go(site: Site) -> None:
    engine = await held(site)
    first = await fill(site, engine)
    [waiting] = await ask_in_turn(site, "one")
    site.engines.remove(engine)
    await asyncio.to_thread(engine.link.close)
    response = await waiting
    assert (response.status, (await response.json())["error"]["code"]) == (503, "no_engine_ready")
    await finish(engine, *first)
    await engine.stop()


@queueing("--shutdown-ms", "60000")
async def test_a_router_that_stops_sends_away_who_waits(site: Site) -> None:
    engine = await held(site)
    first = await fill(site, engine)
    [waiting] = await ask_in_turn(site, "one")
    stopping = asyncio.ensure_future(asyncio.to_thread(site.router.end, signal.SIGTERM))
    response = await waiting
    assert (response.status, response.headers["x-llmd-reason"]) == (503, "shutting-down")
    await response.read()
    assert await finish(engine, *first) == [200] * 2
    assert await stopping == 0


@pytest.mark.parametrize(("name", "value"), [("priority", "urgent"), ("slo-ttft-ms", "-1"), ("ttl-ms", "1e9")])
async def test_a_malformed_header_is_an_error_that_names_it(site: Site, name: str, value: str) -> None:
    engine = await site.engine("a")
    await site.ready(engine)
    async with site.post(chat("hello"), headers={"x-llmd-" + name: value}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "x-llmd-" + name
    assert not engine.requests


HELLO = {"model": "fake", "prompt": "hello"}


async def test_an_engine_that_schedules_by_priority_is_told_when_a_request_is_due_in_bands(site: Site) -> None:
    engine = await site.engine("a", priorities=True)
    await site.ready(engine)
    before_ms = unix_ms()
    asked = [{**HELLO, "priority": 3}, HELLO, {**HELLO, "prompt": "hello " * 3000}, {**HELLO, "priority": 10**6}]
    asked_for = [site.post(body, COMPLETIONS) for body in asked]
    urgent = site.post(HELLO, COMPLETIONS, headers={"x-llmd-priority": "5"})
    assert await statuses([*asked_for, urgent]) == [200] * 5
    told = {(len(each.body["prompt"]), each.body["priority"]) for each in engine.requests}
    [less], [more] = ([due for length, due in told if length == 5 and due // 4e12 == band] for band in (3, -5))
    [short] = [due for length, due in told if length == 5 and before_ms <= due < 4e12]
    [long] = [due for length, due in told if length > 5]
    assert more < short < long < less, "in its own sense, where less goes first"
    assert (5, 10**6) in told, "what is none of our bands stays what it is"
    assert all("x-llmd-priority" not in request.headers for request in engine.requests)


async def test_an_engine_that_does_not_schedule_by_priority_is_told_none(site: Site) -> None:
    engine = await site.engine("a")
    await site.ready(engine)
    asked = [
        site.post(body, COMPLETIONS, headers={"x-llmd-priority": "5"}) for body in (HELLO, {**HELLO, "priority": 3})
    ]
    assert await statuses(asked) == [200, 200]
    assert sorted(str(each.body.get("priority")) for each in engine.requests) == ["3", "None"]


@queueing()
async def test_a_request_waits_for_the_engine_that_has_its_prompt_though_another_has_room(site: Site) -> None:
    tokens = list(range(60_000))
    holder, other = (
        await held(site, max_model_len=100_000),
        await site.engine("b", max_model_len=100_000, fingerprint="g"),
    )
    await site.ready(other)
    holder.publish(stored=holder.names(tokens))
    await site.index_equals_truth(holder)
    first = [asyncio.ensure_future(site.post({"model": "fake", "prompt": tokens}, COMPLETIONS)) for _ in range(2)]

    async def requests() -> int:
        return len(holder.requests)

    await until(requests, lambda count: count == 2)
    waits = asyncio.ensure_future(site.post({"model": "fake", "prompt": tokens}, COMPLETIONS))
    await until(lambda: site.metric("vllm_llmd_held_requests_total"), lambda count: count == 1)
    async with site.post({"model": "fake", "prompt": [7] * 100}, COMPLETIONS) as response:
        assert response.headers["X-Fake-Engine"] == "b", "it blocks nobody who goes elsewhere"
    assert holder.turnstile is not None
    for _ in range(3):
        holder.turnstile.release()
    for answer in await asyncio.gather(*first, waits):
        await answer.read()
        assert answer.headers["X-Fake-Engine"] == "a"
