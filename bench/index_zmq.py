"""From ZeroMQ messages in vLLM's wire form to the index, against Dynamo's `SelectionService`.

Engines in another process publish messages of 32 blocks of 16 tokens, each block new. The sides take turns, each with
fresh sockets and an empty index. Time runs from the order to send until the side knows every block: ours by its count,
Dynamo's by what it says of the last prompt of every engine.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import uvloop
from index_dynamo import Selector
from index_publisher import Publisher
from index_values import Arms, Found, Settings, in_turn

from vllm_llmd.clock import MonotonicClock
from vllm_llmd.kernels import hash_chain_cpu, kv_events_cpu, prefix_table_cpu
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.ingest import Ingest
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.stock.fleet import StockFleet
from vllm_llmd.router.stock.poll import Report
from vllm_llmd.router.stock.report import Models, read_metrics
from vllm_llmd.router.stock.settings import StockEngine

ENGINES = 8
MESSAGES = 4_000
BLOCKS = 32
BLOCK_SIZE = 16
ALL_BLOCKS = ENGINES * MESSAGES * BLOCKS
METRICS = f'vllm:cache_config_info{{block_size="{BLOCK_SIZE}",num_gpu_blocks="{MESSAGES * BLOCKS}"}} 1.0'
LOOK_EVERY_S = 0.002
GIVE_UP_AFTER_S = 120.0


@dataclass
class Run:
    """One side's turn. `sent_s` is how long the publisher needed, which bounds what anyone can do."""

    publisher: Publisher
    lasts: list[list[int]]
    sent_s: list[float] = field(default_factory=list)

    async def ours(self) -> float:
        engines = tuple(
            StockEngine(http=f"http://127.0.0.1:{number + 1}", events=endpoint)
            for number, endpoint in enumerate(self.publisher.bind())
        )
        settings, clock = RouterSettings(stock_engine=engines, index_blocks=2 * ALL_BLOCKS), MonotonicClock()
        fleet = Fleet(settings, clock, "bench")
        stock = StockFleet(settings, fleet, clock)
        for engine in engines:
            stock.heard(engine, Report(Models(("m",), (), 131_072), read_metrics(METRICS)))
        await asyncio.to_thread(self.publisher.wait_for_subscribers)
        began = time.perf_counter()
        self.publisher.send()
        await self._until(lambda: has_all(fleet))
        took_s = time.perf_counter() - began
        self.sent_s.append(self.publisher.sent())
        stock.close()
        return took_s

    async def _until(self, what: Callable[[], bool]) -> None:
        give_up = time.perf_counter() + GIVE_UP_AFTER_S
        while not what():
            assert time.perf_counter() < give_up, "our index does not come to hold every block"
            await asyncio.sleep(LOOK_EVERY_S)

    async def linked(self) -> float:
        """Ours again, from as many blocks in our own form."""
        settings = RouterSettings(index_blocks=2 * ALL_BLOCKS)
        fleet = Fleet(settings, MonotonicClock(), "bench")
        ingest = Ingest(fleet, Metrics(fleet), "tcp://127.0.0.1:0")
        running = asyncio.create_task(ingest.run())
        await asyncio.to_thread(self.publisher.link, ingest.endpoint)
        await self._until(lambda: len(fleet.membership.ready()) == ENGINES)
        began = time.perf_counter()
        self.publisher.send_linked()
        await self._until(lambda: has_all(fleet))
        took_s = time.perf_counter() - began
        self.publisher.sent()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        ingest.close()
        return took_s

    async def dynamo(self) -> float:
        selector = Selector(BLOCK_SIZE)
        for number, endpoint in enumerate(self.publisher.bind()):
            await selector.listen(number, endpoint, 2 * MESSAGES * BLOCKS)
        await asyncio.to_thread(self.publisher.wait_for_subscribers)
        began = time.perf_counter()
        self.publisher.send()
        await selector.settled(self.lasts, LOOK_EVERY_S)
        took_s = time.perf_counter() - began
        self.publisher.sent()
        selector.close()
        return took_s


def has_all(fleet: Fleet) -> bool:
    return sum(fleet.index.contents(engine.info.id).blocks for engine in fleet.membership.all()) == ALL_BLOCKS


def measure(settings: Settings) -> Found:
    for kernels in (hash_chain_cpu, prefix_table_cpu, kv_events_cpu):
        kernels.compile_ahead()
    arms = Arms("from vLLM's ZeroMQ messages", "blocks/s", more_is_better=True)
    own = Arms("from our own messages", "blocks/s", more_is_better=True)
    publisher = Publisher(ENGINES, MESSAGES, BLOCKS, BLOCK_SIZE)
    sent_s: list[float] = []
    try:
        for number in range(settings.rounds):
            run = Run(publisher, publisher.prepare(number), sent_s)
            for values, side in in_turn((arms.ours, run.ours), (arms.dynamo, run.dynamo), (own.ours, run.linked)):
                values.append(ALL_BLOCKS / uvloop.run(side()))
        own.dynamo = arms.dynamo
    finally:
        publisher.close()
    sending = ALL_BLOCKS / min(sent_s)
    return Found(
        {"zmq_vs_dynamo": arms.speed_up},
        [arms, own],
        [f"the publisher hands ZeroMQ up to {sending:.4g} blocks/s"],
    )
