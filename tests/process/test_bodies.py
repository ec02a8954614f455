"""Bodies of requests that a real router process holds: how many bytes, and until when."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from vllm_llmd.testing.fake_engine import Behaviour, FakeEngine
from vllm_llmd.testing.site import CHAT, COMPLETIONS, Site, chat, statuses, until

KIB = 1 << 10
BYTES: str = "vllm_llmd_body_bytes"


def at_most(size_bytes: int, *flags: str) -> Any:
    """Sites whose router holds so many bytes of bodies."""
    return pytest.mark.parametrize("site", [("--bodies-bytes", str(size_bytes), *flags)], indirect=True)


def body(size_bytes: int, **more: Any) -> bytes:
    """Of a chat."""
    bare = len(json.dumps(chat("", **more)))
    return json.dumps(chat("x" * (size_bytes - bare), **more)).encode()


async def held(site: Site, size_bytes: int) -> None:
    await until(lambda: site.metric(BYTES), lambda size: size == size_bytes)


async def behind_a_turnstile(site: Site) -> FakeEngine:
    engine = await site.engine("a")
    engine.turnstile = asyncio.Semaphore(0)
    await site.ready(engine)
    return engine


async def with_a_body(site: Site, size_bytes: int) -> "tuple[FakeEngine, asyncio.Task[aiohttp.ClientResponse]]":
    """An engine that has not let it through."""
    engine = await behind_a_turnstile(site)
    stays = ask(site, body(size_bytes))
    await held(site, size_bytes)
    return engine, stays


def ask(site: Site, data: Any, **more: Any) -> "asyncio.Task[aiohttp.ClientResponse]":
    return asyncio.ensure_future(site.client.post(site.router.http + CHAT, data=data, **more))


async def in_chunks(data: bytes, went: list[int] | None = None) -> AsyncIterator[bytes]:
    for first in range(0, len(data), KIB):
        yield data[first : first + KIB]
        if went is not None:
            went.append(KIB)
        await asyncio.sleep(0)


def let_through(engine: FakeEngine, count: int = 1) -> None:
    assert engine.turnstile is not None
    for _ in range(count):
        engine.turnstile.release()


async def test_a_body_counts_until_its_answer_begins(site: Site) -> None:
    engine = await behind_a_turnstile(site)
    engine.behaviour = Behaviour.STALL_MIDWAY
    first, second = ask(site, body(5000)), ask(site, in_chunks(body(7000, stream=True)))
    await held(site, 12_000)
    let_through(engine)
    await until(lambda: site.metric(BYTES), lambda size: size in (5000, 7000))
    let_through(engine)
    await held(site, 0)
    assert await site.metric("vllm_llmd_inflight_requests") == 2
    for answer in (first, second):
        (await answer).close()


async def test_a_body_counts_for_as_long_as_another_engine_may_go_on_with_its_stream(site: Site) -> None:
    engine = await behind_a_turnstile(site)
    engine.behaviour = Behaviour.STALL_MIDWAY
    answer = ask(site, body(5000, stream=True, temperature=0))
    await held(site, 5000)
    let_through(engine)
    response = await answer
    await response.content.readany()
    assert await site.metric(BYTES) == 5000
    response.close()
    await held(site, 0)


@at_most(64 * KIB)
async def test_who_finds_no_room_is_refused_before_its_body_is_read(site: Site) -> None:
    engine, stays = await with_a_body(site, 40 * KIB)
    reader, writer = await asyncio.open_connection(*site.router.http.removeprefix("http://").split(":"))
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {30 * KIB}\r\n\r\n".encode())
    refused = (await reader.readuntil(b"\r\n\r\n")).decode()
    writer.close()
    await writer.wait_closed()
    assert refused.startswith("HTTP/1.1 429 ")
    assert "x-llmd-reason: bodies-full" in refused
    assert "x-llm-d-request-dropped-reason: rejected-saturated" in refused
    assert "Retry-After: 1" in refused
    assert await site.metric('vllm_llmd_shed_requests_total{band="normal",reason="bodies-full"}') == 1
    assert await site.metric(BYTES) == 40 * KIB
    let_through(engine)
    assert await statuses([stays]) == [200]


@at_most(64 * KIB)
async def test_a_body_of_untold_length_is_refused_once_it_finds_no_room(site: Site) -> None:
    engine, stays = await with_a_body(site, 40 * KIB)
    refused = await ask(site, in_chunks(body(30 * KIB)), headers={"x-llmd-priority": "-1"})
    assert (refused.status, refused.headers["x-llmd-reason"]) == (429, "bodies-full")
    assert (await refused.json())["error"]["code"] == "bodies_full"
    assert await site.metric('vllm_llmd_shed_requests_total{band="best_effort",reason="bodies-full"}') == 1
    await held(site, 40 * KIB)
    let_through(engine)
    assert await statuses([stays]) == [200]
    await held(site, 0)


@at_most(64 * KIB)
async def test_small_requests_are_served_beside_giants(site: Site) -> None:
    engine, giant = await with_a_body(site, 56 * KIB)
    async with site.client.post(site.router.http + CHAT, data=body(2 * KIB)) as refused:
        assert refused.status == 429
    small = [ask(site, body(KIB)) for _ in range(8)]
    await held(site, 64 * KIB)
    let_through(engine, 9)
    assert await statuses([giant, *small]) == [200] * 9
    await held(site, 0)


@at_most(64 * KIB)
async def test_a_body_that_would_never_find_room_is_413_and_says_what_to_do(site: Site) -> None:
    await site.ready(await site.engine("a"))
    for data in (body(57 * KIB), in_chunks(body(57 * KIB))):
        async with site.client.post(site.router.http + CHAT, data=data) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (413, "request_too_large")
            assert str(56 * KIB) in error["message"]
            assert "--bodies-bytes" in error["message"]
    await held(site, 0)


@at_most(512 * KIB)
async def test_many_at_once_are_each_served_or_told_to_come_back(site: Site) -> None:
    await site.ready(await site.engine("a"))
    answers = [ask(site, (body(60 * KIB), in_chunks(body(50 * KIB)))[number % 2]) for number in range(40)]
    found = await statuses(answers)
    assert set(found) <= {200, 429}
    assert 200 in found
    await held(site, 0)
    async with site.client.post(site.router.http + CHAT, data=body(60 * KIB)) as response:
        assert response.status == 200


async def test_nothing_is_held_after_errors_and_clients_that_leave(site: Site) -> None:
    engine = await site.engine("a")
    await site.ready(engine)
    for bad in (b"{" * 9000, b"", json.dumps({"model": "none", "prompt": "x" * 9000}).encode()):
        async with site.client.post(site.router.http + COMPLETIONS, data=bad) as response:
            assert response.status in (400, 404)
    engine.behaviour = Behaviour.FAIL
    async with site.client.post(site.router.http + CHAT, data=body(9000)) as response:
        assert response.status == 500
    engine.behaviour = Behaviour.ANSWER
    await held(site, 0)
    engine.turnstile = asyncio.Semaphore(0)

    async def endless() -> AsyncIterator[bytes]:
        yield body(3000)[:-1]
        await asyncio.sleep(1000)

    leaving = [ask(site, endless()), ask(site, body(9000))]
    await held(site, 11_999)
    for answer in leaving:
        answer.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    await held(site, 0)


@at_most(64 * KIB)
async def test_who_asks_before_sending_is_told_once_there_is_room(site: Site) -> None:
    engine, stays = await with_a_body(site, 40 * KIB)
    async with site.client.post(site.router.http + CHAT, data=body(30 * KIB), expect100=True) as response:
        assert response.status == 429
    let_through(engine, 2)
    assert await statuses([stays]) == [200]
    async with site.client.post(site.router.http + CHAT, data=body(30 * KIB), expect100=True) as response:
        assert response.status == 200
    async with site.client.post(site.router.http + CHAT, data=b"{}", headers={"Expect": "miracles"}) as response:
        assert response.status == 417
