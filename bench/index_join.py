"""How long a joining router takes to know exactly what 64 engines of 50,000 blocks each hold.

The router's fleet and its link run here, the engines' links in another process. Time runs from binding the socket that
the engines are waiting for until every engine is ready and the index has its blocks and digest.
"""

import asyncio
import socket
import time
from collections.abc import Mapping

from index_engines import Holding, engines_apart
from index_values import Found, Settings, shown

from vllm_llmd.clock import MonotonicClock
from vllm_llmd.kernels import hash_chain_cpu, prefix_table_cpu
from vllm_llmd.kernels.prefix_table import Contents
from vllm_llmd.launch_process import reserve_port
from vllm_llmd.names import EngineId
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.ingest import Ingest
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.settings import RouterSettings

ENGINES = 64
BLOCKS = 50_000
JOINS = 5
EXACT_WITHIN_S = 60.0
LOOK_EVERY_S = 0.01


def endpoint(port: socket.socket) -> str:
    host, number = port.getsockname()
    return f"tcp://{host}:{number}"


def exact(fleet: Fleet, held: Mapping[EngineId, Contents]) -> bool:
    """Whether all are ready and the index has what they hold."""
    ready = {engine.info.id for engine in fleet.membership.ready()}
    return ready == set(held) and all(fleet.index.contents(engine) == contents for engine, contents in held.items())


async def join(bind: str, held: Mapping[EngineId, Contents]) -> float:
    """Seconds that a router of no past takes."""
    fleet = Fleet(RouterSettings(), MonotonicClock(), f"bench-{time.monotonic_ns()}")
    metrics = Metrics(fleet)
    began = time.perf_counter()
    ingest = Ingest(fleet, metrics, bind)
    receiving = asyncio.create_task(ingest.run())
    while not exact(fleet, held):
        assert time.perf_counter() - began < EXACT_WITHIN_S and not receiving.done(), "the index does not get exact"
        await asyncio.sleep(LOOK_EVERY_S)
    took_s = time.perf_counter() - began
    receiving.cancel()
    await asyncio.gather(receiving, return_exceptions=True)
    ingest.close()
    return took_s


def measure(_: Settings) -> Found:
    hash_chain_cpu.compile_ahead()
    prefix_table_cpu.compile_ahead()
    with reserve_port() as port, engines_apart(Holding(ENGINES, BLOCKS, bind := endpoint(port))) as held:
        seconds = [asyncio.run(join(bind, held)) for _ in range(JOINS)]
    worst = max(seconds)
    line = f"{'join of 64 engines, 50,000 blocks':34s} {shown(seconds):>30s} s, the slowest {worst:.3g}"
    return Found({"join_exact_s": worst}, lines=[line], details={"join_s": seconds})
