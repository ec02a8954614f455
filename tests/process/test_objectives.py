"""Objectives that clients name, in a real router process: where their requests go, and whether they are kept."""

from typing import Any

from vllm_llmd.testing.site import COMPLETIONS, Site, chat, until
from vllm_llmd.wire import Load

QUEUED = Load(waiting=1, prefill_tokens=20_000, free_blocks=1000)
CROWDED = Load(running=6, free_blocks=1000)
"""Its first token comes sooner than in the queue, but six others stand still for it."""
REPORTED = {(0, "queue"), (6, "crowd")}


async def explained(site: Site, token: int, **headers: str) -> tuple[str, dict[str, Any]]:
    """Where a request goes whose prompt is this token again and again, and what that was expected to cost."""
    body = {"model": "fake", "prompt": [token] * 4000, "max_tokens": 100}
    named = {"x-llmd-" + name.replace("_", "-"): value for name, value in headers.items()}
    async with site.post(body, COMPLETIONS, headers={"x-llmd-explain": "1", **named}) as response:
        assert response.status == 200 and await response.read()
        engine, name = response.headers["X-Fake-Engine"], response.headers["x-llmd-decision"]
    return engine, await site.get_json(f"/admin/decisions/{name}")


async def test_a_tight_objective_takes_a_request_elsewhere(site: Site) -> None:
    for name, load in ("queue", QUEUED), ("crowd", CROWDED):
        engine = await site.engine(name, max_model_len=10_000)
        engine.load = load
        await site.ready(engine)
    await until(site.admin_engines, lambda told: {(each["load"]["running"], each["id"]) for each in told} == REPORTED)
    chosen, decision = await explained(site, 1)
    assert chosen == "queue" and decision["terms"]["slo_ms"] == 0
    chosen, decision = await explained(site, 2, slo_ttft_ms="1000")
    assert chosen == "crowd" and decision["terms"]["slo_ms"] > 0
    prices = {each["engine"]: each["prices"]["slo_ms"] for each in decision["candidates"]}
    assert prices["queue"] > prices["crowd"] > 0
    chosen, _ = await explained(site, 3, slo_ttft_ms="100000")
    assert chosen == "queue", "it has the time"


async def test_objectives_that_were_kept_and_missed_are_counted(site: Site) -> None:
    await site.ready(await site.engine("a"))
    for headers in {"x-llmd-slo-ttft-ms": "3600000"}, {"x-llmd-slo-ttft-ms": "1"}, {}:
        async with site.post(chat("hello", stream=True), headers=headers) as response:
            assert response.status == 200 and await response.read()

    async def counts() -> list[float]:
        line = 'vllm_llmd_objectives_total{kept="%s",objective="ttft"}'
        return [await site.metric(line % kept) for kept in ("yes", "no")]

    assert sum(await until(counts, lambda found: sum(found) == 2)) == 2
    assert (await counts())[0] >= 1
