"""A flood of low priority and a few requests of high priority, on two simulated engines, with and without a queue.

    python bench/flow_fleet.py

The engines run 16 requests at a time, in real time. One line of JSON per run.
"""

import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import aiohttp

from vllm_llmd.testing.process import ServerProcess

ROUNDS = 2
FLOOD, URGENT = 300, 20
ENGINES = ("--count", "2", "--max-sequences", "16", "--chunk-tokens", "8")
POLICY = ("--policy", "least_requests")
NOBODY_WAITS = ("--engine-queue", "1000000", "--engine-prefill-tokens", "1000000000")


@dataclass(frozen=True)
class Asked:
    name: str
    priority: int
    after_s: float


async def ask(client: aiohttp.ClientSession, url: str, asked: Asked) -> float:
    """Seconds to the first bytes of the answer."""
    await asyncio.sleep(asked.after_s)
    body = {"model": "sim", "prompt": f"{asked.name} " * 400, "max_tokens": 64, "stream": True, "ignore_eos": True}
    began_s = time.monotonic()
    async with client.post(url, json=body, headers={"x-llmd-priority": str(asked.priority)}) as response:
        response.raise_for_status()
        await response.content.readany()
        ttft_s = time.monotonic() - began_s
        await response.read()
    return ttft_s


async def until_ready(client: aiohttp.ClientSession, http: str) -> None:
    while True:
        async with client.get(http + "/admin/engines") as response:
            states = [engine["state"] for engine in (await response.json())["engines"]]
        if states == ["ready", "ready"]:
            return
        await asyncio.sleep(0.1)


def shown(ttfts_s: Sequence[float]) -> dict[str, float]:
    p90 = sorted(ttfts_s)[int(0.9 * len(ttfts_s))]
    return {"mean_s": round(mean(ttfts_s), 2), "p50_s": round(median(ttfts_s), 2), "p90_s": round(p90, 2)}


async def play(http: str) -> dict[str, Any]:
    timeout, connector = aiohttp.ClientTimeout(total=300), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as client:
        await until_ready(client, http)
        flood = [Asked(f"low {number}", -1, 0.0) for number in range(FLOOD)]
        urgent = [Asked(f"high {number}", 5, 0.5 + number / 10) for number in range(URGENT)]
        began_s = time.monotonic()
        took_s = await asyncio.gather(*(ask(client, http + "/v1/completions", each) for each in (*urgent, *flood)))
        all_s = time.monotonic() - began_s
    return {"all_s": round(all_s, 2), "high_ttft": shown(took_s[:URGENT]), "low_ttft": shown(took_s[URGENT:])}


async def run(flags: tuple[str, ...], logs: Path) -> dict[str, Any]:
    router = ServerProcess("vllm_llmd.router.main", ("--port", "0", "--bind", "tcp://127.0.0.1:0", *flags), logs / "r")
    said = await asyncio.to_thread(router.start)
    engines = ServerProcess("vllm_llmd.sim.main", (*ENGINES, "--router", said["router"]), logs / "e")
    try:
        await asyncio.to_thread(engines.start)
        return await play(said["http"])
    finally:
        await asyncio.to_thread(engines.end, signal.SIGTERM)
        await asyncio.to_thread(router.end, signal.SIGTERM)


def main() -> None:
    with tempfile.TemporaryDirectory() as logs:
        for _ in range(ROUNDS):
            for queue, flags in (("off", (*POLICY, *NOBODY_WAITS)), ("on", POLICY)):
                measured = asyncio.run(run(flags, Path(logs)))
                sys.stdout.write(json.dumps({"queue": queue} | measured) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
