"""A real router process and fake engines, over real ZeroMQ and HTTP."""

import asyncio
import json
import os
import signal
import subprocess
import sys

import aiohttp
import pytest

from vllm_llmd import wire
from vllm_llmd.kv_connector.hints import read_hint
from vllm_llmd.names import BlockName
from vllm_llmd.testing.fake_engine import Behaviour, FakeEngine, FakeSettings
from vllm_llmd.testing.site import CHAT, COMPLETIONS, Site, chat, until

LONG = "You are a helpful assistant who knows everything about the cache of every engine in the fleet. " * 20


async def test_an_answer_passes_byte_for_byte_with_its_status_and_headers(site: Site) -> None:
    engine = await site.engine("a")
    await site.ready(engine)
    async with site.post(chat("hello")) as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        assert response.headers["X-Fake-Engine"] == "a"
        assert await response.read() == engine.answers[0]


async def test_a_stream_passes_byte_for_byte(site: Site) -> None:
    engine = await site.engine("a")
    await site.ready(engine)
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    async with site.post(chat("hello", **asked)) as response:
        assert response.content_type == "text/event-stream"
        assert await response.read() == engine.answers[0]
    async with site.post({"model": "fake", "prompt": "hello", **asked}, COMPLETIONS) as response:
        assert await response.read() == engine.answers[1]


async def test_chunks_are_forwarded_as_they_arrive(site: Site) -> None:
    engine = await site.engine("a")
    engine.behaviour = Behaviour.STALL_MIDWAY
    await site.ready(engine)
    async with site.post(chat("hello", stream=True)) as response:
        chunk = await response.content.readany()
        response.close()
    assert chunk and engine.answers[0].startswith(chunk)


async def test_no_engine_is_503_with_retry_after_in_openai_shape(site: Site) -> None:
    async with site.post(chat("hello")) as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) > 0
        assert set((await response.json())["error"]) == {"message", "type", "param", "code"}
    async with site.client.get(site.router.http + "/health") as response:
        assert response.status == 503


async def test_an_unknown_model_is_404_and_the_known_ones_are_listed(site: Site) -> None:
    one, two = await site.engine("a", models=("x", "y")), await site.engine("b", models=("y", "z"))
    await site.ready(one, two)
    async with site.post({"model": "nope", "messages": []}) as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "model_not_found"
    models = await site.get_json("/v1/models")
    assert [model["id"] for model in models["data"]] == ["x", "y", "z"]
    assert (await site.get_json("/health"))["ready"] == 2


async def test_a_model_is_routed_only_to_an_engine_that_serves_it(site: Site) -> None:
    one, two = await site.engine("a", models=("x",)), await site.engine("b", models=("y",))
    await site.ready(one, two)
    for _ in range(6):
        async with site.post({"model": "y", "messages": [{"role": "user", "content": "hi"}]}) as response:
            assert response.headers["X-Fake-Engine"] == "b"
    assert not one.requests


@pytest.mark.parametrize(("body", "said"), [(b"{", "JSON"), (b"[]", "object"), (b'{"model": 1}', "model")])
async def test_a_bad_body_is_400_in_openai_shape(site: Site, body: bytes, said: str) -> None:
    async with site.client.post(site.router.http + CHAT, data=body) as response:
        assert response.status == 400
        assert said in (await response.json())["error"]["message"]


async def test_an_unknown_path_is_404_in_openai_shape(site: Site) -> None:
    async with site.client.get(site.router.http + "/nothing") as response:
        assert response.status == 404
        assert "message" in (await response.json())["error"]


async def test_what_a_client_may_not_send_does_not_reach_the_engine(site: Site) -> None:
    engine = await site.engine("a")
    await site.ready(engine)
    forged = {"llmd": {"source": "evil", "addr": "http://evil"}, "remote_host": "evil"}
    body = chat("hello", kv_transfer_params=forged, vllm_xargs={"kv_transfer_params": forged, "kept": 1})
    headers = {"x-llmd-source": "evil", "X-Forwarded-For": "evil", "X-Gateway-Destination-Endpoint": "evil"}
    async with site.post(body, headers={**headers, "Authorization": "Bearer k", "X-Custom": "kept"}) as response:
        assert response.status == 200
    received = engine.requests[0]
    assert b"evil" not in received.raw and "evil" not in str(received.headers)
    assert received.body["vllm_xargs"] == {"kept": 1}
    assert received.body["kv_transfer_params"] == {"llmd": {"request": received.headers["x-request-id"]}}
    assert received.headers["authorization"] == "Bearer k"
    assert received.headers["x-custom"] == "kept"


@pytest.mark.parametrize("behaviour", [Behaviour.FAIL, Behaviour.RESET, Behaviour.RESET_AFTER_HEADERS])
async def test_an_engine_that_fails_before_its_first_byte_is_retried_elsewhere(
    site: Site, behaviour: Behaviour
) -> None:
    bad, good = await site.engine("bad"), await site.engine("good")
    bad.behaviour = behaviour
    good.load = wire.Load(waiting=100)
    await site.ready(bad, good)
    await until(site.admin_engines, lambda engines: any(engine["load"]["waiting"] for engine in engines))
    async with site.post(chat("hello")) as response:
        assert response.status == 200
        assert await response.read() == good.answers[0]
    assert len(bad.requests) == len(good.requests) == 1


async def test_an_engine_that_refuses_connections_is_retried_elsewhere(site: Site) -> None:
    bad, good = await site.engine("bad"), await site.engine("good")
    good.load = wire.Load(waiting=100)
    await site.ready(bad, good)
    await until(site.admin_engines, lambda engines: any(engine["load"]["waiting"] for engine in engines))
    await bad._runner.cleanup()
    async with site.post(chat("hello")) as response:
        assert response.headers["X-Fake-Engine"] == "good"


async def test_when_every_attempt_fails_the_engines_own_error_passes_through(site: Site) -> None:
    engines = [await site.engine(name) for name in "abc"]
    for engine in engines:
        engine.behaviour = Behaviour.FAIL
    await site.ready(*engines)
    async with site.post(chat("hello")) as response:
        assert response.status == 500
        assert (await response.json())["error"]["message"] == "told to fail"
    assert sum(len(engine.requests) for engine in engines) == 3


async def test_a_stream_that_breaks_midway_ends_with_an_error_event(site: Site) -> None:
    engine = await site.engine("a")
    engine.behaviour = Behaviour.DIE_MIDWAY
    await site.ready(engine)
    async with site.post(chat("hello", stream=True)) as response:
        events = (await response.read()).split(b"\n\n")
    assert json.loads(events[0].removeprefix(b"data: "))["object"] == "chunk"
    assert json.loads(events[-2].removeprefix(b"data: "))["error"]["code"] == "engine_failed"


async def test_an_answer_that_breaks_midway_is_not_taken_for_whole(site: Site) -> None:
    engine = await site.engine("a")
    engine.behaviour = Behaviour.DIE_MIDWAY
    await site.ready(engine)
    with pytest.raises(aiohttp.ClientError):
        async with site.post(chat("hello")) as response:
            await response.read()


@pytest.mark.parametrize("behaviour", [Behaviour.STALL, Behaviour.STALL_MIDWAY])
async def test_a_client_that_goes_away_cancels_the_engines_work(site: Site, behaviour: Behaviour) -> None:
    engine = await site.engine("a")
    engine.behaviour = behaviour
    await site.ready(engine)

    async def ask() -> None:
        async with site.post(chat("hello", stream=True)) as response:
            await response.read()

    asking = asyncio.create_task(ask())
    await until(lambda: asyncio.sleep(0, len(engine.requests)), lambda count: count == 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: asyncio.sleep(0, engine.cancelled), lambda count: count == 1)
    await until(lambda: site.metric("vllm_llmd_cancelled_requests_total"), lambda count: count == 1)
    assert await site.metric("vllm_llmd_inflight_requests") == 0


async def test_the_same_text_goes_to_the_engine_that_has_it_cached(site: Site) -> None:
    one, two = await site.engine("a"), await site.engine("b")
    await site.ready(one, two)
    async with site.post(chat(LONG + "first")) as response:
        home = response.headers["X-Fake-Engine"]
    cached = one if home == "a" else two
    await site.index_equals_truth(cached)
    await until(lambda: site.metric("vllm_llmd_text_chunks"), lambda count: count > 0)
    cached.load = wire.Load(prefill_tokens=100)  # fewer than are cached
    await until(site.admin_engines, lambda engines: any(engine["load"]["prefill_tokens"] for engine in engines))
    for question in ("second", "third", "fourth"):
        async with site.post(chat(LONG + question)) as response:
            assert response.headers["X-Fake-Engine"] == home
    async with site.post(chat("something else")) as response:
        assert response.headers["X-Fake-Engine"] != home


async def test_a_session_that_the_client_names_goes_back_to_where_it_was(site: Site) -> None:
    one, two = await site.engine("a"), await site.engine("b")
    await site.ready(one, two)
    mine, other = {"X-LLMD-Session": "mine"}, {"X-LLMD-Session": "other"}
    async with site.post(chat(LONG), headers=mine) as response:
        home = response.headers["X-Fake-Engine"]
    engine = one if home == "a" else two
    engine.load = wire.Load(running=2)  # others': less than what is cached is worth
    await until(site.admin_engines, lambda engines: any(engine["load"]["running"] for engine in engines))
    assert await site.metric("vllm_llmd_sessions") == 1
    for headers, same in ((mine, True), (other, False), ({}, False), (mine, True)):
        async with site.post(chat(f"a text of another kind {same} {headers} " * 25), headers=headers) as response:
            assert (response.headers["X-Fake-Engine"] == home) is same
    assert "x-llmd-session" not in engine.requests[0].headers
    assert await site.metric("vllm_llmd_sessions") == 2


async def test_token_prompts_match_exactly_from_the_first_request(site: Site) -> None:
    one, two = await site.engine("a"), await site.engine("b")
    tokens = list(range(100))
    two.publish(stored=two.names(tokens))
    two.load = wire.Load(prefill_tokens=50)
    await site.ready(one, two)
    await site.index_equals_truth(two)
    async with site.post({"model": "fake", "prompt": tokens}, COMPLETIONS) as response:
        assert response.headers["X-Fake-Engine"] == "b"
    assert await site.metric("vllm_llmd_predicted_cached_tokens_total") == 96


async def test_a_long_prompt_gets_the_prefill_engine_as_its_source_and_a_short_one_does_not(site: Site) -> None:
    decode, prefill = await site.engine("d", role="decode"), await site.engine("p", role="prefill")
    await site.ready(decode, prefill)
    for text in (LONG, "short"):
        async with site.post(chat(text)) as response:
            assert response.headers["X-Fake-Engine"] == "d"
    hints = [read_hint(received.body["kv_transfer_params"]) for received in decode.requests]
    assert [[source.engine for source in hint.sources] for hint in hints] == [["p"], []]
    assert not prefill.requests


async def test_who_will_find_what_is_on_its_way_for_another_is_told_its_source(
    site: Site,
) -> None:
    decode, prefill = await site.engine("d", role="decode"), await site.engine("p", role="prefill")
    await site.ready(decode, prefill)
    decode.behaviour = Behaviour.STALL
    stalled = []
    for number, end in enumerate(("one", "another"), start=1):
        stalled.append(asyncio.create_task(site.post(chat(LONG + end)).__aenter__()))
        await until(lambda: asyncio.sleep(0, len(decode.requests)), lambda count, number=number: count == number)
    hints = [read_hint(received.body["kv_transfer_params"]) for received in decode.requests]
    assert [[source.engine for source in hint.sources] for hint in hints] == [["p"], ["p"]]
    (first,), (second,) = (hint.sources for hint in hints)
    assert (first.until, first.least) == (None, None)
    assert second.until is not None and second.least == second.until // 2
    for each in stalled:
        each.cancel()


async def test_two_routers_know_the_same_and_neither_needs_the_other(site: Site, other: Site) -> None:
    engine = FakeEngine(FakeSettings("a", (site.router.zmq, other.router.zmq)))
    site.engines.append(await engine.start())
    engine.publish(stored=[BlockName(name) for name in range(1, 1001)])
    for each in (site, other):
        await each.ready(engine)
        await each.index_equals_truth(engine)
    other.router.end(signal.SIGKILL)
    engine.publish(removed=[BlockName(name) for name in range(1, 501)])
    await site.index_equals_truth(engine)
    await other.router.start()
    engine.publish(stored=[BlockName(2000)])
    for each in (site, other):
        await each.ready(engine)
        await each.index_equals_truth(engine)
        async with each.post(chat("hello")) as response:
            assert response.headers["X-Fake-Engine"] == "a"


async def test_the_command_line_proves_that_the_index_is_exact(site: Site) -> None:
    one, two = await site.engine("a"), await site.engine("b")
    one.publish(stored=[BlockName(name) for name in range(1, 1001)])
    await site.ready(one, two)
    await site.index_equals_truth(one)
    status, said, _ = await verify(site)
    assert (status, sorted(said.splitlines())) == (0, ["a: 1000 blocks, exact", "b: 0 blocks, exact"])
    status, said, errors = await verify(site, "--engine", "nobody")
    assert (status, said) == (1, "nobody: not verified: There is no engine nobody.\n")
    assert errors == "error: the index is not exact for nobody\n"
    site.router.end(signal.SIGKILL)
    status, _, errors = await verify(site)
    assert status == 1
    assert "cannot be asked" in errors


async def verify(site: Site, *flags: str) -> tuple[int | None, str, str]:
    """Exit status, output and errors of `vllm-llmd index verify`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "vllm_llmd.cli", "index", "verify", "--router", site.router.http, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    said, errors = await process.communicate()
    return process.returncode, said.decode(), errors.decode()


async def test_a_router_killed_and_started_again_knows_what_the_engines_hold(site: Site) -> None:
    one, two = await site.engine("a"), await site.engine("b")
    one.publish(stored=[BlockName(name) for name in range(1000)])
    await site.ready(one, two)
    site.router.end(signal.SIGKILL)
    one.publish(removed=[BlockName(name) for name in range(500)])
    two.publish(stored=[BlockName(2**64 - 1)])
    await site.router.start()
    await site.ready(one, two)
    await site.index_equals_truth(one)
    await site.index_equals_truth(two)
    two.publish_clear()
    await site.index_equals_truth(two)


@pytest.mark.usefixtures("goodbyes_arrive")
async def test_engines_learn_of_each_other_and_of_departures(site: Site) -> None:
    one, two = await site.engine("a"), await site.engine("b")
    await site.ready(one, two)
    for engine in (one, two):
        await until(lambda engine=engine: asyncio.sleep(0, set(engine.link.members())), lambda ids: ids == {"a", "b"})
    await two.stop()
    site.engines.remove(two)
    await until(lambda: asyncio.sleep(0, set(one.link.members())), lambda ids: ids == {"a"})
    assert {engine["id"] for engine in await site.admin_engines()} == {"a"}


async def test_a_new_life_of_an_engine_replaces_the_old_one(site: Site) -> None:
    old = await site.engine("a", epoch=1)
    old.publish(stored=[BlockName(1), BlockName(2)])
    await site.ready(old)
    new = await site.engine("a", epoch=2)
    new.publish(stored=[BlockName(3)])
    await site.ready(new)
    old.publish(stored=[BlockName(4)])
    await site.index_equals_truth(new)
    await until(lambda: asyncio.to_thread(site.router.log.read_text), lambda text: "a later life" in text)
    await site.index_equals_truth(new)


@pytest.mark.parametrize("site", [("--api-key", "secret")], indirect=True)
async def test_with_a_key_set_a_client_must_send_it(site: Site) -> None:
    engine = await site.engine("a")
    for headers, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 401), ({"Authorization": "Bearer ü"}, 401)):
        async with site.post(chat("hello"), headers=headers) as response:
            assert response.status == status
            assert (await response.json())["error"]["code"] == "invalid_api_key"
    key = {"Authorization": "Bearer secret"}

    async def health() -> int:
        async with site.client.get(site.router.http + "/health") as response:
            return response.status

    await until(health, lambda status: status == 200)
    async with site.post(chat("hello"), headers=key) as response:
        assert response.status == 200
    assert engine.requests


def test_the_router_needs_neither_torch_nor_vllm() -> None:
    program = (
        "import sys, vllm_llmd.router.main;"
        "sys.exit(str({'torch', 'vllm', 'vllm_llmd.kv_connector', 'nixl'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.strip() == "set()"
