"""A real router process and engines without our plugin, over real ZeroMQ and HTTP."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vllm_llmd.testing.fake_stock_engine import FakeStockEngine
from vllm_llmd.testing.site import COMPLETIONS, Router, Site, open_client, until
from vllm_llmd.wire import Load

FAST = ("--heartbeat-ms", "50")
PROMPT = list(range(100, 140))
OTHER = list(range(200, 220))


@pytest.fixture
async def engine() -> AsyncIterator[FakeStockEngine]:
    engine = await FakeStockEngine().start()
    yield engine
    await engine.stop()


@pytest.fixture
async def stock(engine: FakeStockEngine, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    """A router that is told of the engine."""
    flags = (*FAST, *getattr(request, "param", ()))
    router = Router(tmp_path / "router.log", (*flags, "--stock-engine", engine.flag))
    await router.start()
    async with open_client() as client:
        site = Site(router, client)
        yield site
        await asyncio.gather(*(each.stop() for each in site.engines))
        assert router.end(signal.SIGTERM) == 0, router.log.read_text()
    assert "Traceback" not in router.log.read_text()


async def state(site: Site, engine: FakeStockEngine) -> str | None:
    return next((each["state"] for each in await site.admin_engines() if each["id"] == engine.id), None)


async def ready(site: Site, engine: FakeStockEngine) -> None:
    await until(lambda: state(site, engine), lambda found: found == "ready")


async def indexed(site: Site, engine: FakeStockEngine) -> set[int]:
    index = await site.get_json(f"/admin/index/{engine.id}")
    return {int(name) for name in index.get("names", ["-1"])}


async def index_equals_truth(site: Site, engine: FakeStockEngine) -> None:
    await until(lambda: indexed(site, engine), lambda names: names == engine.held)


async def test_an_engine_joins_with_what_it_has_cached_before(stock: Site, engine: FakeStockEngine) -> None:
    await engine.publish(engine.stored(PROMPT))
    await ready(stock, engine)
    await index_equals_truth(stock, engine)
    [shown] = await stock.admin_engines()
    assert shown["models"] == ["stock"]
    assert shown["stock"] is True
    assert (shown["load"]["running"], shown["load"]["waiting"], shown["load"]["free_blocks"]) == (3, 2, 300)
    assert await stock.metric(f'vllm_llmd_index_blocks{{engine="{engine.id}",tier="gpu"}}') == len(engine.held)


async def test_blocks_come_and_go_as_the_events_say(stock: Site, engine: FakeStockEngine) -> None:
    await ready(stock, engine)
    await engine.publish(engine.stored(PROMPT), engine.stored(OTHER))
    await index_equals_truth(stock, engine)
    await engine.publish(engine.removed(OTHER))
    await index_equals_truth(stock, engine)
    assert engine.held


async def test_a_lost_message_is_fetched_from_the_replay(stock: Site, engine: FakeStockEngine) -> None:
    await ready(stock, engine)
    await engine.publish(engine.stored(PROMPT))
    await index_equals_truth(stock, engine)
    engine.lose(engine.stored(OTHER))
    await engine.publish()
    await index_equals_truth(stock, engine)
    assert await stock.metric(f'vllm_llmd_stock_gaps_total{{end="closed",engine="{engine.id}"}}') == 1


async def test_a_gap_that_no_replay_closes_empties_the_index(stock: Site, engine: FakeStockEngine) -> None:
    await ready(stock, engine)
    await engine.publish(engine.stored(PROMPT))
    await index_equals_truth(stock, engine)
    engine.lose(engine.removed(PROMPT))
    engine._history.clear()
    await engine.publish(engine.stored(OTHER))
    await index_equals_truth(stock, engine)
    assert await stock.metric(f'vllm_llmd_stock_gaps_total{{end="cleared",engine="{engine.id}"}}') == 1


async def test_a_new_life_of_the_engine_starts_empty(stock: Site, engine: FakeStockEngine) -> None:
    await ready(stock, engine)
    await engine.publish(engine.stored(PROMPT))
    await index_equals_truth(stock, engine)
    engine.restart()
    await engine.publish(engine.stored(OTHER))
    await index_equals_truth(stock, engine)


async def test_what_cannot_be_read_costs_only_itself(stock: Site, engine: FakeStockEngine) -> None:
    await ready(stock, engine)
    await engine.publish(engine.stored(OTHER))
    await index_equals_truth(stock, engine)
    await engine.publish(["BlockTouched", [1]])
    await engine._publisher.send_multipart([b"", engine._number.to_bytes(8, "big"), b"\xc1"])
    engine._number += 1
    await engine._publisher.send_multipart([b"one frame"])
    await engine.publish(engine.stored(PROMPT))
    await index_equals_truth(stock, engine)
    of_engine = f'engine="{engine.id}"'
    assert await stock.metric(f'vllm_llmd_stock_unused_total{{{of_engine},what="malformed message"}}') == 2
    assert await stock.metric(f'vllm_llmd_stock_unused_total{{{of_engine},what="unknown event"}}') == 1


async def test_an_engine_with_hung_metrics_still_serves(stock: Site, engine: FakeStockEngine) -> None:
    engine.hangs.add("/metrics")
    await ready(stock, engine)
    await until(
        lambda: stock.metric(f'vllm_llmd_stock_polls_failed_total{{http="{engine.http}",what="metrics"}}'), bool
    )
    async with stock.post({"model": "stock", "prompt": PROMPT}, COMPLETIONS) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("stock", "becomes"),
    [
        (("--stale-after-ms", "1000"), "stale"),
        (("--stale-after-ms", "1000", "--gone-after-ms", "2000"), None),
    ],
    indirect=["stock"],
)
async def test_an_engine_that_hangs_goes_stale_then_gone_and_comes_back(
    stock: Site, engine: FakeStockEngine, becomes: str | None
) -> None:
    await ready(stock, engine)
    await engine.publish(engine.stored(PROMPT))
    await index_equals_truth(stock, engine)
    engine.hangs.update(("/health", "/metrics", "/v1/models"))
    await until(lambda: state(stock, engine), lambda found: found == becomes)
    engine.hangs.clear()
    await ready(stock, engine)
    await index_equals_truth(stock, engine)


async def test_a_stock_engine_gets_no_hint_and_is_never_a_source(stock: Site, engine: FakeStockEngine) -> None:
    prefill = await stock.engine("p", role="prefill", models=("stock",))
    await stock.ready(prefill)
    await ready(stock, engine)
    body = {"model": "stock", "prompt": list(range(400)), "kv_transfer_params": {"llmd": {"source": "evil"}}}
    async with stock.post(body, COMPLETIONS) as response:
        assert response.status == 200
    assert engine.requests[0].body == {"model": "stock", "prompt": list(range(400))}
    assert set(prefill.link.members()) <= {"p"}


async def test_a_prompt_of_token_ids_goes_to_the_engine_that_has_it(stock: Site, engine: FakeStockEngine) -> None:
    linked = await stock.engine("a", models=("stock",), block_size=4)
    await stock.ready(linked)
    linked.load = Load(waiting=100)  # more than the stock engine says of itself
    await until(stock.admin_engines, lambda engines: 100 in [each["load"]["waiting"] for each in engines])
    await ready(stock, engine)
    await engine.publish(engine.stored(PROMPT))
    await index_equals_truth(stock, engine)
    for _ in range(3):
        async with stock.post({"model": "stock", "prompt": PROMPT}, COMPLETIONS) as response:
            assert response.status == 200
    assert len(engine.requests) == 3
    assert linked.requests == []


async def test_verify_says_that_a_stock_engine_cannot_be_verified(stock: Site, engine: FakeStockEngine) -> None:
    await ready(stock, engine)
    verify = [sys.executable, "-m", "vllm_llmd.cli", "index", "verify", "--router", stock.router.http]
    process = await asyncio.create_subprocess_exec(*verify, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    assert f"{engine.id}: not verified: A stock engine" in output.decode()
