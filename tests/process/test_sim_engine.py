"""Simulated engines: their API, their orders through a real router process, their KV events, their failures."""

import argparse
import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import zmq
import zmq.asyncio

from vllm_llmd.kernels.hash_chain import chain_names
from vllm_llmd.sim.asks import Ask
from vllm_llmd.sim.engine import Stream
from vllm_llmd.sim.main import SimFleet
from vllm_llmd.sim.settings import add_arguments, from_args
from vllm_llmd.testing.process import ServerProcess
from vllm_llmd.testing.site import CHAT, COMPLETIONS, DEADLINE_S, Router, open_client, until


class Site:
    """Engines in this process, a router and other engines in theirs, and a client for all of them."""

    def __init__(self, logs: Path, client: aiohttp.ClientSession) -> None:
        self._logs = logs
        self.client = client
        self.processes: list[ServerProcess] = []
        self.fleets: list[SimFleet] = []
        self.router = ""

    async def engines(self, *flags: str) -> list[str]:
        """Base URLs; they join the router, if the site has one."""
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        fleet = SimFleet(from_args(parser.parse_args(["--speed-up", "10", *self.routers, *flags]), {}))
        self.fleets.append(fleet)
        await fleet.start()
        return [address["http"] for address in fleet.addresses()]

    @property
    def routers(self) -> tuple[str, ...]:
        return ("--router", self.link) if self.router else ()

    async def start_process(self, *flags: str) -> Any:
        """What engines in a process of their own say when they listen."""
        log = self._logs / f"sim-{len(self.processes)}.log"
        self.processes.append(ServerProcess("vllm_llmd.sim.main", ("--speed-up", "10", *self.routers, *flags), log))
        return await asyncio.to_thread(self.processes[-1].start)

    async def ready(self, count: int) -> None:
        """The router has so many engines, all ready, and all that are of this process know each other."""
        await until(self.states, lambda states: states == ["ready"] * count)
        await until(self.members, lambda known: known <= {count})

    async def members(self) -> set[int]:
        return {len(engine.members()) for fleet in self.fleets for engine in fleet.engines}

    async def states(self) -> list[str]:
        return [engine["state"] for engine in (await self.get(f"{self.router}/admin/engines"))["engines"]]

    async def get(self, url: str) -> Any:
        async with self.client.get(url) as response:
            return await response.json()

    async def post(self, url: str, body: Any) -> Any:
        async with self.client.post(url, json=body) as response:
            return await response.json() | {"status": response.status}

    async def metric(self, engine: str, name: str) -> float:
        async with self.client.get(engine + "/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        client = open_client()
        site = Site(tmp_path, await stack.enter_async_context(client))
        try:
            yield site
        finally:
            for fleet in site.fleets:
                await fleet.stop()
            for process in site.processes:
                if process.running:
                    assert process.end() == 0, process.log.read_text()
    for process in site.processes:
        assert "Traceback" not in process.log.read_text()


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """One process for all tests here; each leaves it without engines."""
    flags = ("--stale-after-ms", "10000", "--gone-after-ms", "20000")  # so long if a goodbye is lost
    router = Router(tmp_path_factory.mktemp("router") / "router.log", flags)
    asyncio.run(router.start())
    yield router
    assert router.end(signal.SIGTERM) == 0, router.log.read_text()
    assert "Traceback" not in router.log.read_text()


@pytest.fixture
async def routed(site: Site, router: Router) -> AsyncIterator[Site]:
    """A site whose engines join the router."""
    site.router, site.link = router.http, router.zmq
    await site.ready(0)
    yield site
    site.router = ""


@pytest.fixture
async def routed_apart(site: Site, tmp_path: Path) -> AsyncIterator[Site]:
    """Likewise, with a router of its own, which goes on believing in engines that are killed."""
    router = Router(tmp_path / "router.log", ())
    await router.start()
    site.router, site.link = router.http, router.zmq
    yield site
    site.router = ""
    assert router.end(signal.SIGTERM) == 0, router.log.read_text()
    assert "Traceback" not in router.log.read_text()


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


async def test_a_chat_is_answered_in_openais_shape(site: Site) -> None:
    [engine] = await site.engines("--model", "m")
    answer = await site.post(engine + CHAT, chat("hello", model="m", max_tokens=5))
    assert answer["object"] == "chat.completion" and answer["model"] == "m"
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant" and len(choice["message"]["content"].split()) == 5
    assert choice["finish_reason"] == "length"
    details = {"cached_tokens": 0}
    assert answer["usage"] == {
        "prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "prompt_tokens_details": details
    }  # fmt: skip
    models = await site.get(engine + "/v1/models")
    assert [(model["id"], model["max_model_len"]) for model in models["data"]] == [("m", 131_072)]


async def test_a_stream_says_the_same_and_its_usage_if_asked(site: Site) -> None:
    [engine] = await site.engines()
    whole = await site.post(engine + CHAT, chat("hello", max_tokens=5))
    body = chat("hello", max_tokens=5, stream=True, stream_options={"include_usage": True})
    async with site.client.post(engine + CHAT, json=body) as response:
        assert response.content_type == "text/event-stream"
        events = (await response.read()).decode().removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    *chunks, last = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    said = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert said == whole["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 5


async def test_equal_prompts_have_equal_answers_wherever_they_are_asked(site: Site) -> None:
    one, two = await site.engines("--count", "2")
    answers = [await site.post(each + CHAT, chat("what?")) for each in (one, two, one)]
    texts = {answer["choices"][0]["message"]["content"] for answer in answers}
    assert len(texts) == 1
    other = await site.post(one + CHAT, chat("what now?"))
    assert other["choices"][0]["message"]["content"] not in texts


async def test_the_next_turn_of_a_chat_finds_prompt_and_answer_cached(site: Site) -> None:
    [engine] = await site.engines("--block-size", "4")
    messages = [{"role": "user", "content": "a question that takes up some blocks of the cache " * 4}]
    first = await site.post(engine + CHAT, {"messages": messages, "max_tokens": 40})
    messages += [first["choices"][0]["message"], {"role": "user", "content": "and now?"}]
    second = await site.post(engine + CHAT, {"messages": messages, "max_tokens": 4})
    known = first["usage"]["total_tokens"] - 1
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == known // 4 * 4


async def test_token_prompts_texts_and_batches_are_completed(site: Site) -> None:
    [engine] = await site.engines()
    url = engine + COMPLETIONS
    tokens = await site.post(url, {"prompt": list(range(100)), "max_tokens": 3})
    assert (tokens["usage"]["prompt_tokens"], tokens["object"]) == (100, "text_completion")
    batch = await site.post(url, {"prompt": [list(range(100)), [7]], "max_tokens": 3})
    assert [choice["index"] for choice in batch["choices"]] == [0, 1]
    assert batch["choices"][0]["text"] == tokens["choices"][0]["text"]
    assert batch["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
    text = await site.post(url, {"prompt": "once upon a time"})
    assert text["usage"]["completion_tokens"] <= 16


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": "hi"}, 400, "messages"),
        (CHAT, [], 400, "JSON object"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt"),
        (COMPLETIONS, {"prompt": [1, -1]}, 400, "32 bits"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "at least 1"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "x"}, 400, "integer"),
        (COMPLETIONS, {"prompt": [1] * 5000}, 400, "maximum context length is 4096"),
        (COMPLETIONS, {"model": "nope", "prompt": "a"}, 404, "does not exist"),
    ],
)
async def test_what_makes_no_sense_is_refused_in_openais_shape(
    site: Site, path: str, body: Any, status: int, said: str
) -> None:
    [engine] = await site.engines("--max-model-len", "4096")
    answer = await site.post(engine + path, body)
    assert answer["status"] == status
    assert said in answer["error"]["message"] and set(answer["error"]) == {"message", "type", "param", "code"}


async def test_a_client_that_goes_away_gives_its_blocks_back(site: Site) -> None:
    [engine] = await site.engines("--speed-up", "1")
    body = chat("hello", max_tokens=10_000, ignore_eos=True, stream=True)
    async with site.client.post(engine + CHAT, json=body) as response:
        await response.content.readany()
        assert await site.metric(engine, "vllm:num_requests_running") == 1
        response.close()
    await until(lambda: site.metric(engine, "vllm:num_requests_running"), lambda running: running == 0)
    assert await site.metric(engine, "vllm:kv_cache_usage_perc") == 0


async def test_metrics_have_vllms_names(site: Site) -> None:
    [engine] = await site.engines("--blocks", "100")
    for _ in range(2):
        await site.post(engine + COMPLETIONS, {"prompt": list(range(64)), "max_tokens": 2})
    names = ("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generation_tokens", "request_success")
    found = [await site.metric(engine, f"vllm:{name}_total") for name in names]
    assert found == [128, 48, 128, 4, 2]
    async with site.client.get(engine + "/metrics") as response:
        assert 'block_size="16",num_gpu_blocks="100"' in await response.text()


async def test_a_decode_engine_has_its_prompt_computed_by_the_source_that_the_router_hints(routed: Site) -> None:
    [prefill] = await routed.engines("--id", "p", "--role", "prefill")
    [decode] = await routed.engines("--id", "d", "--role", "decode")
    await routed.ready(2)
    body = {"prompt": list(range(4000)), "max_tokens": 4}
    answer = await routed.post(routed.router + COMPLETIONS, body)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3999
    assert await routed.metric(prefill, "vllm:prompt_tokens_total") == 3999
    assert await routed.metric(prefill, "vllm:generation_tokens_total") == 1
    assert await routed.metric(decode, "vllm:llmd_orders_total") == 1
    assert await routed.metric(decode, "vllm:external_prefix_cache_hits_total") == 3999
    assert await routed.metric(decode, "vllm:llmd_fallbacks_total") == 0
    alone = await routed.post(prefill + COMPLETIONS, body)
    assert alone["choices"] == answer["choices"]


ALONE = {"prompt": list(range(4000)), "max_tokens": 4}
SOURCED = {**ALONE, "kv_transfer_params": {"llmd": {"source": "p"}}}


async def computed_itself(site: Site, decode: str, answer: Any, whole: Any) -> None:
    """As if there were no sources."""
    assert answer["choices"] == whole["choices"]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert await site.metric(decode, "vllm:llmd_fallbacks_total") == 1


@pytest.mark.parametrize("failure", ["error", "reset"])
async def test_if_its_source_fails_an_engine_computes_the_prompt_itself(routed: Site, failure: str) -> None:
    [prefill] = await routed.engines("--id", "p", "--role", "prefill")
    [decode] = await routed.engines("--id", "d", "--role", "decode")
    await routed.ready(2)
    whole = await routed.post(prefill + COMPLETIONS, ALONE)
    await routed.post(prefill + "/sim/failures", {"answers": failure})
    await computed_itself(routed, decode, await routed.post(decode + COMPLETIONS, SOURCED), whole)
    assert await routed.metric(decode, "vllm:llmd_orders_total") == 1


async def test_if_its_source_is_unknown_an_engine_computes_the_prompt_itself(routed: Site) -> None:
    [decode] = await routed.engines("--id", "d", "--role", "decode")
    await routed.ready(1)
    whole = await routed.post(decode + COMPLETIONS, ALONE)
    async with routed.client.post(decode + "/reset_prefix_cache") as response:
        assert response.status == 200
    await computed_itself(routed, decode, await routed.post(decode + COMPLETIONS, SOURCED), whole)
    assert await routed.metric(decode, "vllm:llmd_orders_total") == 0


@pytest.mark.parametrize("when", ["before", "midway"])
async def test_if_its_source_is_killed_an_engine_computes_the_prompt_itself(routed_apart: Site, when: str) -> None:
    prefill = (await routed_apart.start_process("--id", "p", "--role", "prefill"))["engines"][0]["http"]
    [decode] = await routed_apart.engines("--id", "d", "--role", "decode")
    await routed_apart.ready(2)
    whole = await routed_apart.post(prefill + COMPLETIONS, ALONE)
    if when == "midway":
        await routed_apart.post(prefill + "/sim/failures", {"answers": "stall-midway"})
    else:
        routed_apart.processes[-1].end(signal.SIGKILL)
    asking = asyncio.create_task(routed_apart.post(decode + COMPLETIONS, SOURCED))
    await until(lambda: routed_apart.metric(decode, "vllm:llmd_orders_total"), lambda orders: orders == 1)
    if when == "midway":
        routed_apart.processes[-1].end(signal.SIGKILL)
    await computed_itself(routed_apart, decode, await asking, whole)


@pytest.mark.parametrize(("policy", "hinted", "served_by"), [("priority", None, 7), ("priority", 3, 3), ("fcfs", 3, 0)])
async def test_an_order_has_the_priority_that_is_hinted_or_its_requests_where_the_source_goes_by_it(
    routed: Site, policy: str, hinted: int | None, served_by: int
) -> None:
    await routed.engines("--id", "p", "--role", "prefill", "--policy", policy)
    [decode] = await routed.engines("--id", "d", "--role", "decode", "--policy", "priority")
    await routed.ready(2)
    [source] = routed.fleets[0].engines
    asked: list[Ask] = []

    def noting(ask: Ask, submit: Callable[[Ask], list[Stream]] = source.submit) -> list[Stream]:
        asked.append(ask)
        return submit(ask)

    source.submit = noting  # type: ignore[method-assign]
    hint = {"engine": "p"} if hinted is None else {"engine": "p", "priority": hinted}
    body = {"prompt": list(range(4000)), "max_tokens": 4, "priority": 7}
    await routed.post(decode + COMPLETIONS, body | {"kv_transfer_params": {"llmd": {"sources": [hint]}}})
    assert [each.priority for each in asked] == [served_by]


async def test_an_order_without_the_fleets_secret_is_an_ordinary_request(routed: Site) -> None:
    [prefill] = await routed.engines("--id", "p", "--role", "prefill", "--secret", "s")
    [decode] = await routed.engines("--id", "d", "--role", "decode", "--secret", "other")
    await routed.ready(2)
    await routed.post(routed.router + COMPLETIONS, {"prompt": list(range(4000)), "max_tokens": 4})
    served = await routed.get(f"{routed.router}/admin/engines")
    loads = {engine["id"]: engine["load"] for engine in served["engines"]}
    assert loads["p"]["orders_served"] == 0
    assert await routed.metric(decode, "vllm:llmd_orders_total") == 1
    assert await routed.metric(prefill, "vllm:prompt_tokens_total") == 3999


async def test_the_router_learns_what_an_engine_caches_and_goes_back_there(routed: Site) -> None:
    engines = await routed.engines("--count", "4")
    await routed.ready(4)
    text = "the same long document for everybody, told at some length. " * 40
    body = chat(text, max_tokens=1)
    assert (await routed.post(routed.router + CHAT, body))["usage"]["prompt_tokens_details"]["cached_tokens"] == 0

    async def cached() -> int:
        found: int = (await routed.post(routed.router + CHAT, body))["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    await until(cached, lambda tokens: tokens > 500)
    hits = [await routed.metric(engine, "vllm:prefix_cache_hits_total") for engine in engines]
    assert sum(hit > 0 for hit in hits) == 1


@pytest.mark.parametrize("form", ["map", "array"])
@pytest.mark.parametrize("hashes", ["int", "bytes"])
async def test_kv_events_are_those_of_vllm_and_can_be_replayed(site: Site, form: str, hashes: str) -> None:
    flags = ("--kv-events-form", form, "--kv-events-hashes", hashes, "--blocks", "8", "--kv-events-port", "0")
    [engine] = await site.engines(*flags)
    [address] = site.fleets[-1].addresses()
    context = zmq.asyncio.Context()
    subscriber, asker = context.socket(zmq.SUB), context.socket(zmq.DEALER)
    try:
        subscriber.subscribe(b"")
        subscriber.connect(address["kv_events"])
        asker.connect(address["kv_events_replay"])
        await site.post(engine + COMPLETIONS, {"prompt": list(range(100)), "max_tokens": 1})
        await site.post(engine + COMPLETIONS, {"prompt": list(range(500, 600)), "max_tokens": 1})
        async with site.client.post(engine + "/reset_prefix_cache") as response:
            assert response.status == 200
        await asker.send_multipart((b"", (0).to_bytes(8, "big")))
        batches = []
        while True:
            frames = await asyncio.wait_for(asker.recv_multipart(), DEADLINE_S)
            number = int.from_bytes(frames[-2], "big", signed=True)
            if number < 0:
                break
            assert number == len(batches)
            batches.append(msgspec.msgpack.decode(frames[-1]))
    finally:
        context.destroy(linger=0)
    events = [event for _, events, rank in batches for event in events]
    if form == "array":
        events = [dict(zip(("type", *_fields(event[0])), event, strict=False)) for event in events]
    kinds = [event["type"] for event in events]
    assert set(kinds) == {"BlockStored", "BlockRemoved", "AllBlocksCleared"} and kinds[-1] == "AllBlocksCleared"
    stored = [event for event in events if event["type"] == "BlockStored"]
    assert [token for event in stored for token in event["token_ids"]] == [*range(96), *range(500, 596)]
    assert {type(each) for event in stored for each in event["block_hashes"]} == {bytes if hashes == "bytes" else int}
    assert stored[0]["parent_block_hash"] is None and stored[0]["medium"] == "GPU"
    assert len(chain_names(range(96), 16)) == sum(len(event["block_hashes"]) for event in stored) // 2


@pytest.mark.parametrize(("form", "hashes"), [("map", "int"), ("array", "bytes")])
async def test_a_router_that_takes_stock_engines_indexes_it_by_its_kv_events(
    site: Site, tmp_path: Path, form: str, hashes: str
) -> None:
    flags = ("--kv-events-form", form, "--kv-events-hashes", hashes, "--kv-events-port", "0")
    [engine] = await site.engines(*flags, "--model", "m", "--model", "adapter", "--blocks", "40")
    [address] = site.fleets[-1].addresses()
    said = f"http={engine},events={address['kv_events']},replay={address['kv_events_replay']},id=stock"
    router = Router(tmp_path / "router.log", ("--stock-engine", said))
    for number, more in enumerate(({}, {"cache_salt": "tenant"}, {"model": "adapter"}, {}, {})):
        await site.post(engine + COMPLETIONS, {"prompt": list(range(number, number + 200)), "max_tokens": 20, **more})
    await router.start()
    try:
        for number in range(3, 6):
            prompt = {"prompt": list(range(number, number + 200)), "max_tokens": 20}
            await until(lambda: site.get(router.http + "/health"), lambda health: health.get("ready") == 1)
            assert (await site.post(router.http + COMPLETIONS, prompt))["status"] == 200

        async def differ() -> set[str]:
            index = await site.get(router.http + "/admin/index/stock")
            return set(index["names"]) ^ set((await site.get(engine + "/sim/cache"))["gpu"])

        await until(differ, lambda names: not names)
        assert len((await site.get(engine + "/sim/cache"))["gpu"]) > 30
    finally:
        assert router.end(signal.SIGTERM) == 0, router.log.read_text()


def _fields(kind: str) -> tuple[str, ...]:
    return {
        "BlockStored": (
            "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name",
        ),
        "BlockRemoved": ("block_hashes", "medium"),
        "AllBlocksCleared": (),
    }[kind]  # fmt: skip


async def test_a_process_of_several_engines_says_where_they_are_and_ends_in_good_order(routed: Site) -> None:
    said = await routed.start_process("--count", "3", "--model", "m")
    assert [engine["id"] for engine in said["engines"]] == ["sim-0", "sim-1", "sim-2"]
    await routed.ready(3)
    answer = await routed.post(routed.router + CHAT, chat("hello", model="m"))
    assert answer["status"] == 200
    assert await asyncio.to_thread(routed.processes[-1].end) == 0
    await until(routed.states, lambda states: not states)


async def test_failures_can_be_turned_on_and_off(site: Site) -> None:
    [engine] = await site.engines()
    assert (await site.post(engine + "/sim/failures", {"answers": "refuse"}))["answers"] == "refuse"
    assert (await site.post(engine + CHAT, chat("hi")))["status"] == 503
    for wrong in ({"answers": "x"}, {"slow": 0}, {"lies": 2}, {"wire": {"drop": -1}}, {"what": 1}, [1]):
        answer = await site.post(engine + "/sim/failures", wrong)
        assert answer["status"] == 400 and "failures" in answer["error"]["message"], wrong
    assert (await site.get(engine + "/sim/failures"))["answers"] == "refuse"
    await site.post(engine + "/sim/failures", {"answers": "none", "slow": 2.5})
    assert (await site.post(engine + CHAT, chat("hi")))["status"] == 200


async def test_an_engine_that_lies_has_less_than_the_router_believes(routed: Site) -> None:
    [engine] = await routed.engines("--blocks", "16", "--failures", '{"lies": 1}')
    await routed.ready(1)
    bodies = [{"prompt": list(range(first, first + 160)), "max_tokens": 1} for first in (0, 1000, 0)]
    _, _, again = [await routed.post(routed.router + COMPLETIONS, body) for body in bodies]

    async def predicted() -> float:
        async with routed.client.get(routed.router + "/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm_llmd_index_blocks{"))

    assert await until(predicted, lambda blocks: blocks == 20)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] < 160
    await routed.post(engine + "/sim/failures", {"lies": 0})
    assert await until(predicted, lambda blocks: blocks <= 16)
