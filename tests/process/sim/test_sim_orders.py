"""Orders of simulated engines, placed and served through a real router process."""

import asyncio
import signal
from collections.abc import Callable
from typing import Any

import pytest

from vllm_llmd.sim.asks import Ask
from vllm_llmd.sim.engine import Stream
from vllm_llmd.testing.sim_site import SimSite
from vllm_llmd.testing.site import COMPLETIONS, until


async def test_a_decode_engine_has_its_prompt_computed_by_the_source_that_the_router_hints(routed: SimSite) -> None:
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


async def computed_itself(site: SimSite, decode: str, answer: Any, whole: Any) -> None:
    """As if there were no sources."""
    assert answer["choices"] == whole["choices"]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert await site.metric(decode, "vllm:llmd_fallbacks_total") == 1


@pytest.mark.parametrize("failure", ["error", "reset"])
async def test_if_its_source_fails_an_engine_computes_the_prompt_itself(routed: SimSite, failure: str) -> None:
    [prefill] = await routed.engines("--id", "p", "--role", "prefill")
    [decode] = await routed.engines("--id", "d", "--role", "decode")
    await routed.ready(2)
    whole = await routed.post(prefill + COMPLETIONS, ALONE)
    await routed.post(prefill + "/sim/failures", {"answers": failure})
    await computed_itself(routed, decode, await routed.post(decode + COMPLETIONS, SOURCED), whole)
    assert await routed.metric(decode, "vllm:llmd_orders_total") == 1


async def test_if_its_source_is_unknown_an_engine_computes_the_prompt_itself(routed: SimSite) -> None:
    [decode] = await routed.engines("--id", "d", "--role", "decode")
    await routed.ready(1)
    whole = await routed.post(decode + COMPLETIONS, ALONE)
    async with routed.client.post(decode + "/reset_prefix_cache") as response:
        assert response.status == 200
    await computed_itself(routed, decode, await routed.post(decode + COMPLETIONS, SOURCED), whole)
    assert await routed.metric(decode, "vllm:llmd_orders_total") == 0


@pytest.mark.parametrize("when", ["before", "midway"])
async def test_if_its_source_is_killed_an_engine_computes_the_prompt_itself(routed_apart: SimSite, when: str) -> None:
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
    routed: SimSite, policy: str, hinted: int | None, served_by: int
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


async def test_an_order_without_the_fleets_secret_is_an_ordinary_request(routed: SimSite) -> None:
    [prefill] = await routed.engines("--id", "p", "--role", "prefill", "--secret", "s")
    [decode] = await routed.engines("--id", "d", "--role", "decode", "--secret", "other")
    await routed.ready(2)
    await routed.post(routed.router + COMPLETIONS, {"prompt": list(range(4000)), "max_tokens": 4})
    served = await routed.get(f"{routed.router}/admin/engines")
    loads = {engine["id"]: engine["load"] for engine in served["engines"]}
    assert loads["p"]["orders_served"] == 0
    assert await routed.metric(decode, "vllm:llmd_orders_total") == 1
    assert await routed.metric(prefill, "vllm:prompt_tokens_total") == 3999
