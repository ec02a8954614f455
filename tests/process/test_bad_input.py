"""What clients may get wrong, sent to a real router: each a clear error, and the next request is served."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from vllm_llmd.testing.site import CHAT, COMPLETIONS, Site, chat, until

BEGINNING = b'{"model": "fake", '

BAD_HEADERS = [
    *(("x-llmd-slo-ttft-ms", value) for value in ("0", "-1", "NaN", "inf", "1e400", "1e3", "", "9" * 400, "\u0663")),
    *(("x-llmd-slo-tpot-ms", value) for value in ("0", "-0.5", "nan", "0x10", "1,5")),
    *(("x-llmd-priority", value) for value in ("urgent", "1.5", "1001", "-99999999999999999999", "NaN", "1e400")),
    *(("x-llmd-ttl-ms", value) for value in ("0", "-1", "3600001", "1e400", "10s")),
    *(("x-llm-d-inference-ttl", value) for value in ("5", "-1s", "1e400s", "9" * 300 + "h")),
    *(("x-llmd-tenant", value) for value in ("t" * 257, "a\tb")),
    *(("x-llmd-engine-labels", value) for value in ("a=", "=b", "a in", "a" * 2000, "a=b,,c=d", "a>b")),
    ("x-llmd-explain", "perhaps"),
]


async def served(site: Site) -> None:
    async with site.post(chat("still here")) as response:
        assert response.status == 200


async def test_every_malformed_header_is_400_and_named(site: Site) -> None:
    await site.ready(await site.engine("a"))
    for name, value in BAD_HEADERS:
        async with site.post(chat("hello"), headers={name: value}) as response:
            if (name, value) == ("x-llmd-engine-labels", "a="):  # an empty value is one
                assert response.status == 503
                continue
            error = (await response.json())["error"]
            assert (response.status, error["param"]) == (400, name), (name, value)
    await served(site)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_tokens": -5},
        {"max_tokens": 10**30},
        {"max_tokens": "many"},
        {"max_tokens": True},
        {"max_completion_tokens": 1.5},
        {"max_completion_tokens": [1]},
        {"temperature": "hot", "stream": "yes", "n": -1},
        {"stream_options": 7, "stream": True},
        {"truncate_prompt_tokens": {"a": 1}},
        {"cache_salt": 5},
    ],
)
async def test_what_only_an_engine_can_judge_is_left_to_it(site: Site, limits: dict[str, Any]) -> None:
    engine = await site.engine("a")
    await site.ready(engine)
    for path, body in ((CHAT, chat("hello", **limits)), (COMPLETIONS, {"model": "fake", "prompt": [1, 2], **limits})):
        async with site.post(body, path) as response:
            await response.read()
        sent = engine.requests.pop().body
        assert {name: sent[name] for name in limits} == limits


@pytest.mark.parametrize(
    "prompt", [[-1], [2**40], [[1, "a"]], [[]], [], {}, None, 5, [None], [1.5], "\ud800", [[1], "two", [3]]]
)
async def test_a_prompt_of_any_shape_is_answered(site: Site, prompt: Any) -> None:
    """By the engine, or by the router as one that no engine could take."""
    engine = await site.engine("a")
    await site.ready(engine)
    async with site.post({"model": "fake", "prompt": prompt}, COMPLETIONS) as response:
        await response.read()
        assert response.status == 400 or engine.requests.pop().body["prompt"] == prompt
    await served(site)


@pytest.mark.parametrize("model", ["", "x" * 100_000, "../../etc", "\u0000", 7, None, ["fake"], {"fake": 1}])
async def test_a_model_that_nobody_has_is_404_or_400(site: Site, model: Any) -> None:
    await site.ready(await site.engine("a"))
    async with site.post({"model": model, "messages": []}) as response:
        assert response.status == (200 if model is None else 404 if isinstance(model, str) else 400)
        await response.read()


async def test_a_body_of_fifty_megabytes_is_served_and_a_larger_one_is_413_with_the_limit(site: Site) -> None:
    await site.ready(await site.engine("a"))
    fits = io.BytesIO(json.dumps(chat("hello", note="x" * (50 << 20))).encode())
    async with site.client.post(site.router.http + CHAT, data=fits) as response:
        assert response.status == 200
    large = json.dumps(chat("hello", note="x" * (64 << 20))).encode()

    async def chunked() -> AsyncIterator[bytes]:
        for first in range(0, len(large), 1 << 20):
            yield large[first : first + (1 << 20)]

    for data in (io.BytesIO(large), chunked()):
        async with site.client.post(site.router.http + CHAT, data=data) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (413, "request_too_large")
            assert str(64 << 20) in error["message"]
    await served(site)


async def test_bodies_that_never_end_hold_nobody_up(site: Site) -> None:
    await site.ready(await site.engine("a"))

    async def endless() -> AsyncIterator[bytes]:
        yield BEGINNING
        await asyncio.sleep(1000)

    async def held(size_bytes: int) -> None:
        await until(lambda: site.metric("vllm_llmd_body_bytes"), lambda found: found == size_bytes)

    stuck = [asyncio.ensure_future(site.client.post(site.router.http + CHAT, data=endless())) for _ in range(20)]
    await held(20 * len(BEGINNING))
    await served(site)
    for each in stuck:
        each.cancel()
    await asyncio.gather(*stuck, return_exceptions=True)
    await held(0)
    await served(site)
