"""What a real router process says of how many engines it takes."""

import asyncio

import pytest

from vllm_llmd.testing.site import Site, chat, statuses, until

BOTH = 'model="fake",role="both"'


async def answered(site: Site, count: int) -> None:
    for number in range(count):
        async with site.post(chat(f"question {number}")) as answer:
            assert answer.status == 200


async def test_demand_and_desired_replicas_are_metrics(site: Site) -> None:
    await site.ready(await site.engine("a"), await site.engine("b"))
    await answered(site, 3)
    assert await site.metric(f"vllm_llmd_pool_engines{{{BOTH}}}") == 2
    assert await site.metric(f"vllm_llmd_demand_requests_per_second{{{BOTH}}}") > 0
    assert await site.metric(f"vllm_llmd_demand_prefill_tokens_per_second{{{BOTH}}}") > 0
    assert await site.metric(f"vllm_llmd_desired_replicas{{{BOTH}}}") == 2
    assert await site.metric(f'vllm_llmd_desired_replicas_bound{{bound="unknown",{BOTH}}}') == 1


async def test_the_same_is_told_as_json(site: Site) -> None:
    await site.ready(await site.engine("p", role="prefill"), await site.engine("d", role="decode"))
    await answered(site, 1)
    pools = (await site.get_json("/admin/scaling"))["pools"]
    assert {(pool["model"], pool["role"], pool["engines"]) for pool in pools} == {
        ("fake", "prefill", 1),
        ("fake", "decode", 1),
    }
    assert all(pool["desired"] >= 1 for pool in pools)


@pytest.mark.parametrize("site", [("--scaling-window-ms", "1200", "--min-replicas", "0")], indirect=True)
async def test_nobody_is_wanted_without_demand_and_somebody_while_requests_wait(site: Site) -> None:
    engine = await site.engine("a", max_sequences=1)
    engine.turnstile = asyncio.Semaphore(0)
    await site.ready(engine)
    await until(lambda: site.metric(f"vllm_llmd_desired_replicas{{{BOTH}}}"), lambda wanted: wanted == 0)
    waiting = [asyncio.ensure_future(site.post(chat(f"question {number}"))) for number in range(40)]
    await until(lambda: site.metric('vllm_llmd_queued_requests{band="normal"}'), lambda queued: queued > 20)
    assert await site.metric(f"vllm_llmd_desired_replicas{{{BOTH}}}") >= 1
    for _ in waiting:
        engine.turnstile.release()
    assert set(await statuses(waiting)) == {200}
