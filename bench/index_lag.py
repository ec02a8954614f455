"""From an engine's sending of a block change to the change in the router's index, under load.

The router's fleet and its link run here in the router's own event loop, and answer lookups all the while; the engines'
sockets are in another process. Both read the machine's monotonic clock.
"""

import asyncio
import gc
import random
import statistics
import time
from array import array
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import uvloop
from index_fleet import MODEL
from index_join import endpoint
from index_storm import Raging, Storm, storm_apart
from index_values import Found, Settings

from vllm_llmd import wire
from vllm_llmd.clock import MonotonicClock
from vllm_llmd.kernels import hash_chain_cpu, prefix_table_cpu
from vllm_llmd.launch_process import reserve_port
from vllm_llmd.names import EngineId
from vllm_llmd.router import policies
from vllm_llmd.router.decide import decide
from vllm_llmd.router.fleet import Fleet, Reply, Sender
from vllm_llmd.router.ingest import Ingest
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.request import Facts
from vllm_llmd.router.settings import RouterSettings

ENGINES = 64
EVENTS_PER_MESSAGE = 32
EVENTS_PER_S = 200_000
SECONDS = 12.0
WARM_UP_S = 2.0
LOOKUPS_PER_S = 100
PROMPT_TOKENS = 8192
PATIENCE_S = 20.0
LOOK_EVERY_S = 0.05

Seen = list[tuple[EngineId, int, int]]
"""Engine, sequence number, when the index had it in ns."""


class WatchedFleet(Fleet):
    """Notes when the index has taken each change in."""

    def __init__(self) -> None:
        super().__init__(RouterSettings(), MonotonicClock(), "bench")
        self.seen: Seen = []

    def on_message(self, sender: Sender, message: wire.LinkMessage) -> list[Reply]:
        replies = super().on_message(sender, message)
        if isinstance(message, wire.BlocksChanged):
            self.seen.append((message.engine, message.seq, time.monotonic_ns()))
        return replies


async def look_up(fleet: Fleet, took_ms: list[float]) -> None:
    """A choice for one prompt or another, again and again."""
    policy, rng = (
        policies.make(RouterSettings().policy, PolicySettings(256, random.Random(0))),
        np.random.default_rng(0),
    )
    while True:
        began = time.perf_counter()
        tokens = array("I", rng.integers(0, 150_000, PROMPT_TOKENS, np.uint32).tobytes())
        facts = Facts(MODEL, tokens, b"", tokens.tobytes(), len(tokens), None)
        decide(facts, fleet.candidates(facts, fleet.cut(facts)), policy)
        took_ms.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(1 / LOOKUPS_PER_S)


async def until(done: Callable[[], bool]) -> None:
    """Waits, but not for ever. Raises AssertionError."""
    for _ in range(int(PATIENCE_S / LOOK_EVERY_S)):
        if done():
            return
        await asyncio.sleep(LOOK_EVERY_S)
    raise AssertionError("engines do not join, or changes do not arrive")


async def weather(
    fleet: WatchedFleet, storm: Storm, raging: Raging, ingest: Ingest
) -> tuple[list[float], Mapping[EngineId, list[int]]]:
    """Runs the router through a storm. How long lookups took, and what was sent when."""
    took_ms: list[float] = []
    receiving = asyncio.create_task(ingest.run())
    await until(lambda: len(fleet.membership.ready()) == storm.engines)
    looking = asyncio.create_task(look_up(fleet, took_ms))
    raging.start()
    sent = await asyncio.to_thread(raging.sent)
    await until(lambda: len(fleet.seen) == storm.messages * storm.engines)
    for task in (looking, receiving):
        task.cancel()
    await asyncio.gather(looking, receiving, return_exceptions=True)
    return took_ms, sent


def lags_ms(seen: Seen, sent: Mapping[EngineId, Sequence[int]], warm_up_s: float) -> list[float]:
    """Of every change sent after the warm-up, in the order in which the index took them in."""
    first_ns = min(times[0] for times in sent.values())
    counted_from_ns = first_ns + warm_up_s * 1e9
    return [
        (at_ns - sent[engine][seq - 1]) / 1e6 for engine, seq, at_ns in seen if sent[engine][seq - 1] >= counted_from_ns
    ]


def rate(seen: Seen, events_per_message: int) -> float:
    """Block events per second that the index took in, from the first to the last."""
    return (len(seen) - 1) * events_per_message / ((seen[-1][2] - seen[0][2]) / 1e9)


def percentile(values: Sequence[float]) -> float:
    """The 99th."""
    return float(np.percentile(values, 99))


async def run(port_endpoint: str, settings: Settings) -> Found:
    fleet = WatchedFleet()
    resident = settings.resident // ENGINES
    storm = Storm(port_endpoint, ENGINES, resident, EVENTS_PER_MESSAGE, EVENTS_PER_S, SECONDS)
    ingest = Ingest(fleet, Metrics(fleet), storm.router)
    try:
        with storm_apart(storm) as raging:
            took_ms, sent = await weather(fleet, storm, raging, ingest)
    finally:
        ingest.close()
    lags = lags_ms(fleet.seen, sent, WARM_UP_S)
    p50, p99 = statistics.median(lags), percentile(lags)
    events_per_s = rate(fleet.seen, EVENTS_PER_MESSAGE)
    lines = [
        f"lag p50 {p50:.3g} ms, p99 {p99:.3g} ms, longest {max(lags):.3g} ms at {events_per_s:,.0f} block events/s",
        f"{len(took_ms)} lookups meanwhile: p50 {statistics.median(took_ms):.3g} ms, p99 {percentile(took_ms):.3g} ms",
    ]
    details = {"lag_p50_ms": p50, "lag_max_ms": max(lags), "events_per_s": events_per_s, "lookups_ms": took_ms}
    return Found({"lag_p99_ms": p99}, lines=lines, details=details)


def measure(settings: Settings) -> Found:
    hash_chain_cpu.compile_ahead()
    prefix_table_cpu.compile_ahead()
    gc.freeze()  # as the router does when it starts
    with reserve_port() as port:
        return uvloop.run(run(endpoint(port), settings))
