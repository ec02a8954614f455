"""Simulated engines, in this process and in others, a router process and a client, over real ZeroMQ and HTTP."""

import argparse
import asyncio
from pathlib import Path
from typing import Any

import aiohttp

from vllm_llmd.sim.main import SimFleet
from vllm_llmd.sim.settings import add_arguments, from_args
from vllm_llmd.testing.process import ServerProcess
from vllm_llmd.testing.site import until


class SimSite:
    """Engines in this process, a router and other engines in theirs, and a client for all of them."""

    def __init__(self, logs: Path, client: aiohttp.ClientSession) -> None:
        self._logs = logs
        self.client = client
        self.processes: list[ServerProcess] = []
        self.fleets: list[SimFleet] = []
        self.router = self.link = ""

    async def engines(self, *flags: str) -> list[str]:
        """Base URLs; they join the router, if the site has one."""
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        fleet = SimFleet(from_args(parser.parse_args(["--speed-up", "10", *self.routers, *flags]), {}))
        self.fleets.append(fleet)
        await fleet.start()
        return [address["http"] for address in fleet.addresses()]

    @property
    def routers(self) -> tuple[str, ...]:
        return ("--router", self.link) if self.router else ()

    async def start_process(self, *flags: str) -> Any:
        """What engines in a process of their own say when they listen."""
        log = self._logs / f"sim-{len(self.processes)}.log"
        self.processes.append(ServerProcess("vllm_llmd.sim.main", ("--speed-up", "10", *self.routers, *flags), log))
        return await asyncio.to_thread(self.processes[-1].start)

    async def ready(self, count: int) -> None:
        """The router has so many engines, all ready, and all that are of this process know each other."""
        await until(self.states, lambda states: states == ["ready"] * count)
        await until(self.members, lambda known: known <= {count})

    async def members(self) -> set[int]:
        return {len(engine.members()) for fleet in self.fleets for engine in fleet.engines}

    async def states(self) -> list[str]:
        return [engine["state"] for engine in (await self.get(f"{self.router}/admin/engines"))["engines"]]

    async def get(self, url: str) -> Any:
        async with self.client.get(url) as response:
            return await response.json()

    async def post(self, url: str, body: Any) -> Any:
        async with self.client.post(url, json=body) as response:
            return await response.json() | {"status": response.status}

    async def metric(self, engine: str, name: str) -> float:
        async with self.client.get(engine + "/metrics") as response:
            lines = (await response.text()).splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))
