"""Simulated engines: their API, their KV events, their failures."""

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from vllm_llmd.kernels.hash_chain import chain_names
from vllm_llmd.testing.sim_site import SimSite
from vllm_llmd.testing.site import CHAT, COMPLETIONS, DEADLINE_S, Router, until


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


async def test_a_chat_is_answered_in_openais_shape(site: SimSite) -> None:
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


async def test_a_stream_says_the_same_and_its_usage_if_asked(site: SimSite) -> None:
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


async def test_equal_prompts_have_equal_answers_wherever_they_are_asked(site: SimSite) -> None:
    one, two = await site.engines("--count", "2")
    answers = [await site.post(each + CHAT, chat("what?")) for each in (one, two, one)]
    texts = {answer["choices"][0]["message"]["content"] for answer in answers}
    assert len(texts) == 1
    other = await site.post(one + CHAT, chat("what now?"))
    assert other["choices"][0]["message"]["content"] not in texts


async def test_the_next_turn_of_a_chat_finds_prompt_and_answer_cached(site: SimSite) -> None:
    [engine] = await site.engines("--block-size", "4")
    messages = [{"role": "user", "content": "a question that takes up some blocks of the cache " * 4}]
    first = await site.post(engine + CHAT, {"messages": messages, "max_tokens": 40})
    messages += [first["choices"][0]["message"], {"role": "user", "content": "and now?"}]
    second = await site.post(engine + CHAT, {"messages": messages, "max_tokens": 4})
    known = first["usage"]["total_tokens"] - 1
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == known // 4 * 4


async def test_token_prompts_texts_and_batches_are_completed(site: SimSite) -> None:
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
    site: SimSite, path: str, body: Any, status: int, said: str
) -> None:
    [engine] = await site.engines("--max-model-len", "4096")
    answer = await site.post(engine + path, body)
    assert answer["status"] == status
    assert said in answer["error"]["message"] and set(answer["error"]) == {"message", "type", "param", "code"}


async def test_a_client_that_goes_away_gives_its_blocks_back(site: SimSite) -> None:
    [engine] = await site.engines("--speed-up", "1")
    body = chat("hello", max_tokens=10_000, ignore_eos=True, stream=True)
    async with site.client.post(engine + CHAT, json=body) as response:
        await response.content.readany()
        assert await site.metric(engine, "vllm:num_requests_running") == 1
        response.close()
    await until(lambda: site.metric(engine, "vllm:num_requests_running"), lambda running: running == 0)
    assert await site.metric(engine, "vllm:kv_cache_usage_perc") == 0


async def test_metrics_have_vllms_names(site: SimSite) -> None:
    [engine] = await site.engines("--blocks", "100")
    for _ in range(2):
        await site.post(engine + COMPLETIONS, {"prompt": list(range(64)), "max_tokens": 2})
    names = ("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generation_tokens", "request_success")
    found = [await site.metric(engine, f"vllm:{name}_total") for name in names]
    assert found == [128, 48, 128, 4, 2]
    async with site.client.get(engine + "/metrics") as response:
        assert 'block_size="16",num_gpu_blocks="100"' in await response.text()


async def test_the_router_learns_what_an_engine_caches_and_goes_back_there(routed: SimSite) -> None:
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
async def test_kv_events_are_those_of_vllm_and_can_be_replayed(site: SimSite, form: str, hashes: str) -> None:
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
    site: SimSite, tmp_path: Path, form: str, hashes: str
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


async def test_a_process_of_several_engines_says_where_they_are_and_ends_in_good_order(routed: SimSite) -> None:
    said = await routed.start_process("--count", "3", "--model", "m")
    assert [engine["id"] for engine in said["engines"]] == ["sim-0", "sim-1", "sim-2"]
    await routed.ready(3)
    answer = await routed.post(routed.router + CHAT, chat("hello", model="m"))
    assert answer["status"] == 200
    assert await asyncio.to_thread(routed.processes[-1].end) == 0
    await until(routed.states, lambda states: not states)


async def test_failures_can_be_turned_on_and_off(site: SimSite) -> None:
    [engine] = await site.engines()
    assert (await site.post(engine + "/sim/failures", {"answers": "refuse"}))["answers"] == "refuse"
    assert (await site.post(engine + CHAT, chat("hi")))["status"] == 503
    for wrong in ({"answers": "x"}, {"slow": 0}, {"lies": 2}, {"wire": {"drop": -1}}, {"what": 1}, [1]):
        answer = await site.post(engine + "/sim/failures", wrong)
        assert answer["status"] == 400 and "failures" in answer["error"]["message"], wrong
    assert (await site.get(engine + "/sim/failures"))["answers"] == "refuse"
    await site.post(engine + "/sim/failures", {"answers": "none", "slow": 2.5})
    assert (await site.post(engine + CHAT, chat("hi")))["status"] == 200


async def test_an_engine_that_lies_has_less_than_the_router_believes(routed: SimSite) -> None:
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
