"""A real router process in front of fake engines: what becomes of texts."""

import asyncio
import json
import signal
from pathlib import Path

import pytest

from vllm_llmd import wire
from vllm_llmd.testing.site import Router, Site, chat, until

LONG = "You are a helpful assistant who knows everything about the cache of every engine in the fleet. " * 20


async def test_each_turn_of_a_chat_finds_what_the_turns_before_it_left(site: Site) -> None:
    one, two = await site.engine("a"), await site.engine("b")
    await site.ready(one, two)
    messages, home, predicted, last = [{"role": "system", "content": LONG}], None, 0.0, 0
    known = 0.0
    for turn in range(4):
        messages += [{"role": "user", "content": f"question {turn} " * 40}]
        async with site.post({"model": "fake", "messages": messages}) as response:
            home = home or response.headers["X-Fake-Engine"]
            assert response.headers["X-Fake-Engine"] == home
        cached, before = one if home == "a" else two, predicted
        await site.index_equals_truth(cached)
        known = await until(lambda: site.metric("vllm_llmd_text_chunks"), lambda count, known=known: count > known)
        predicted = await site.metric("vllm_llmd_predicted_cached_tokens_total")
        if turn:
            assert predicted - before > last - 600, "all of the turn before, but for its end"
        last = sum(len(each["content"]) for each in messages)
        messages += [{"role": "assistant", "content": "answer " * 30}]


def byte_tokenizer(directory: Path) -> Path:
    """The model directory of a fake engine's model: a text's tokens are its bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    vocabulary = {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return directory


async def test_a_router_that_tokenizes_matches_a_text_that_it_has_never_seen(site: Site, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    router = Router(tmp_path / "exact.log", ("--tokenizer", str(byte_tokenizer(tmp_path))))
    await router.start()
    exact = Site(router, site.client)
    try:
        one, two = await exact.engine("a"), await exact.engine("b")
        two.publish(stored=two.names("<user>" + LONG))
        two.load = wire.Load(prefill_tokens=100)
        await exact.ready(one, two)
        await exact.index_equals_truth(two)
        async with exact.post(chat(LONG)) as response:
            assert response.headers["X-Fake-Engine"] == "b"
        agreed = 'vllm_llmd_exact_names_total{result="agree"}'
        await until(lambda: exact.metric(agreed), lambda count: count == 1)
        assert await exact.metric('vllm_llmd_exact_prompts_total{result="tokenized"}') == 1
    finally:
        await asyncio.gather(*(engine.stop() for engine in exact.engines))
        assert router.end(signal.SIGTERM) == 0, router.log.read_text()
