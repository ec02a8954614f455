"""The index becomes exact again, whatever happens on the way: proved by the command that a user would prove it with.

A real router and real engine processes (simulated ones) over real sockets. While requests change the engines' caches,
messages are dropped, doubled, delayed and reordered, an engine and the router are killed and started again.
"""

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from vllm_llmd.testing.process import ServerProcess
from vllm_llmd.testing.site import DEADLINE_S, Router, open_client

ENGINES: Final = 3
REQUESTS: Final = 120
QUICK: Final = ("--answer-tokens", "8", "--speed-up", "20")
FAULTS: Final = {"drop": 0.1, "duplicate": 0.1, "delay": 0.1, "reorder": 0.1}
NO_FAULTS: Final = dict.fromkeys(FAULTS, 0.0)


class Site:
    """One router and a few engines, all of which come back under their old addresses."""

    def __init__(self, logs: Path, client: aiohttp.ClientSession) -> None:
        self.client = client
        self.router = Router(logs / "router.log", ("--snapshot-retry-ms", "300"))
        self.engines = [
            ServerProcess("vllm_llmd.sim.main", ("--id", f"e{n}", "--seed", str(n)), logs / f"e{n}.log")
            for n in range(ENGINES)
        ]
        self.snapshots: Counter[str] = Counter()

    async def start(self) -> None:
        await self.router.start()
        await asyncio.gather(*(self.start_engine(number, "0") for number in range(ENGINES)))

    async def restart_router(self) -> None:
        await self._count_snapshots()
        self.router.end(signal.SIGKILL)
        await self.router.start()

    async def restart_engine(self, number: int) -> None:
        port = self.url(number).rpartition(":")[2]
        self.engines[number].end(signal.SIGKILL)
        await self.start_engine(number, port)

    async def start_engine(self, number: int, port: str) -> None:
        flags = ("--router", self.router.zmq, "--port", port, "--blocks", "96", "--cpu-blocks", "128", *QUICK)
        await asyncio.to_thread(self.engines[number].start, *flags)

    def url(self, number: int) -> str:
        url: str = self.engines[number].said["engines"][0]["http"]
        return url

    async def get(self, url: str) -> Any:
        async with self.client.get(url) as response:
            return await response.json()

    async def faults(self, wire: dict[str, float]) -> None:
        for number in range(ENGINES):
            async with self.client.post(self.url(number) + "/sim/failures", json={"wire": wire}) as response:
                assert response.status == 200

    async def happened(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for number in range(ENGINES):
            counts.update((await self.get(self.url(number) + "/sim/failures"))["happened"])
        return counts

    async def snapshots_asked(self) -> Counter[str]:
        """By reason, from all lives of the router."""
        await self._count_snapshots()
        return self.snapshots

    async def _count_snapshots(self) -> None:
        async with self.client.get(self.router.http + "/metrics") as response:
            for line in (await response.text()).splitlines():
                if line.startswith("vllm_llmd_snapshots_asked_total{"):
                    self.snapshots[line.split('"')[1]] += int(float(line.split()[-1]))

    async def verify(self) -> tuple[int | None, list[str]]:
        """Exit status and lines of `vllm-llmd index verify`."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "vllm_llmd.cli", "index", "verify", "--router", self.router.http),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        return process.returncode, sorted(said.decode().splitlines())

    async def proved_exact(self) -> list[str]:
        give_up = time.monotonic() + DEADLINE_S
        while True:
            status, lines = await self.verify()
            if status == 0 and len(lines) == ENGINES:
                return lines
            assert time.monotonic() < give_up, lines
            await asyncio.sleep(0.2)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_client() as client:
        site = Site(tmp_path, client)
        try:
            await site.start()
            yield site
        finally:
            for process in (*site.engines, site.router):
                if process.running:
                    assert process.end(signal.SIGTERM) == 0, process.log.read_text()
    for process in (*site.engines, site.router):
        assert "Traceback" not in process.log.read_text()


async def work(site: Site, rng: random.Random, requests: int) -> None:
    """Prompts of a few families of unequal popularity, so that caches hit, fill up and evict. Failures are expected."""
    for _ in range(requests):
        family = min(rng.randrange(12), rng.randrange(12)) * 100_000
        prompt = [*range(family, family + rng.randrange(600)), rng.randrange(1 << 30)]
        where = rng.choice([site.router.http, *map(site.url, range(ENGINES))])
        try:
            if rng.random() < 0.01:
                async with site.client.post(site.url(rng.randrange(ENGINES)) + "/reset_prefix_cache"):
                    pass
            async with site.client.post(where + "/v1/completions", json={"prompt": prompt}) as response:
                await response.read()
        except aiohttp.ClientError:
            await asyncio.sleep(0.05)


async def kill(site: Site, rng: random.Random) -> None:
    """One engine and the router, in an order that the seed decides, both while requests come."""
    await asyncio.sleep(rng.random())
    for victim in rng.sample(["engine", "router"], 2):
        if victim == "engine":
            await site.restart_engine(rng.randrange(ENGINES))
        else:
            await site.restart_router()
        await asyncio.sleep(rng.random())


async def test_after_any_fault_the_index_equals_what_the_engines_hold(site: Site) -> None:
    hit: Counter[str] = Counter()
    for seed in range(3):
        rng = random.Random(seed)
        await site.faults(FAULTS)
        clients = [work(site, random.Random(rng.random()), REQUESTS // 4) for _ in range(4)]
        await asyncio.gather(kill(site, rng), *clients)
        await site.faults(FAULTS)  # the engine that was killed has come back with none
        await work(site, rng, REQUESTS // 4)
        hit += await site.happened()
        await site.faults(NO_FAULTS)
        lines = await site.proved_exact()
        for number in range(ENGINES):
            truth = {tier: set(names) for tier, names in (await site.get(site.url(number) + "/sim/cache")).items()}
            index = await site.get(f"{site.router.http}/admin/index/e{number}")
            believed = {"gpu": index["names"], "cpu": index["offloaded"].get("cpu", ())}
            assert {tier: set(names) for tier, names in believed.items()} == truth, f"seed {seed}"
            assert lines[number] == f"e{number}: {sum(map(len, truth.values()))} blocks, exact"
            assert all(truth.values()), "nothing is cached: the workload is of no use"
    assert all(hit[fault] > 10 for fault in FAULTS), hit
    asked = await site.snapshots_asked()
    assert asked["gap"] > 0 and asked["joined"] > ENGINES, asked
