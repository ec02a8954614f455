"""Runs simulated engines in one process. `vllm-llmd sim-engine`, or `python -m vllm_llmd.sim.main`.

When all of them listen, one line of JSON on stdout says where: {"engines": [{"id": …, "http": …}, …]}. Those that
publish KV events say "kv_events" and "kv_events_replay" too.
"""

import argparse
import asyncio
import json
import logging
import signal
import sys
from dataclasses import dataclass

import uvloop
import zmq
import zmq.asyncio
from aiohttp import web

from vllm_llmd import program
from vllm_llmd.errors import ConfigError
from vllm_llmd.kernels import hash_chain_cpu
from vllm_llmd.names import EngineId
from vllm_llmd.sim.engine import SimEngine
from vllm_llmd.sim.kv_events import EventPublisher
from vllm_llmd.sim.server import SimServer
from vllm_llmd.sim.settings import SimSettings, add_arguments, from_args

log = logging.getLogger(__name__)

MAX_SOCKETS = 16_000
DRAIN_POLL_MS = 20


def run(settings: SimSettings) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status. Raises ConfigError if it cannot listen."""
    program.log_to_stderr()
    return uvloop.run(serve(settings))


async def serve(settings: SimSettings) -> int:
    """Runs all engines in the current event loop."""
    hash_chain_cpu.compile_ahead()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    fleet = SimFleet(settings)
    try:
        await fleet.start()
        sys.stdout.write(json.dumps({"engines": fleet.addresses()}) + "\n")
        sys.stdout.flush()
        log.info("%d simulated engines", settings.count)
        await told.wait()
        await fleet.drain()
    finally:
        await fleet.stop()
    return 0


@dataclass
class _Running:
    engine: SimEngine
    server: SimServer
    runner: web.AppRunner
    replaying: asyncio.Task[None] | None


class SimFleet:
    """`settings.count` engines in the current event loop; their sockets share one context."""

    def __init__(self, settings: SimSettings) -> None:
        self._settings = settings
        self._sockets: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self._running: list[_Running] = []

    @property
    def engines(self) -> list[SimEngine]:
        return [each.engine for each in self._running]

    @property
    def servers(self) -> list[SimServer]:
        return [each.server for each in self._running]

    async def start(self) -> None:
        """Raises ConfigError if a port is taken; `stop` is due even then."""
        for number in range(self._settings.count):
            self._running.append(await self._start(number))

    async def drain(self) -> None:
        """Takes no more requests; returns when there are none left, or after `drain_ms`."""
        for engine in self.engines:
            engine.drain()
        for _ in range(0, self._settings.drain_ms, DRAIN_POLL_MS):
            if not any(engine.busy for engine in self.engines):
                return
            await asyncio.sleep(DRAIN_POLL_MS / 1000)

    async def stop(self) -> None:
        """Every engine says goodbye."""
        await asyncio.gather(*(each.engine.stop() for each in self._running))
        await asyncio.gather(*(each.runner.cleanup() for each in self._running))
        for each in self._running:
            if each.replaying is not None:
                each.replaying.cancel()
                await asyncio.gather(each.replaying, return_exceptions=True)
            if each.engine.events is not None:
                each.engine.events.close()
        self._sockets.term()

    def addresses(self) -> list[dict[str, str]]:
        said = []
        for engine in self.engines:
            address = {"id": str(engine.id), "http": engine.info.http}
            if engine.events is not None:
                address |= {"kv_events": engine.events.endpoint, "kv_events_replay": engine.events.replay_endpoint}
            said.append(address)
        return said

    async def _start(self, number: int) -> _Running:
        settings = self._settings
        name = settings.id if settings.count == 1 else f"{settings.id}-{number}"
        engine = SimEngine(settings, EngineId(name), self._sockets)
        server = SimServer(engine)
        runner = web.AppRunner(
            server.application(),
            handler_cancellation=True,  # a client that goes away gives the engine's blocks back
            shutdown_timeout=0.1,
            access_log=None,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, settings.host, settings.port + number if settings.port else 0).start()
            events = self._publisher(number)
        except OSError as error:
            await runner.cleanup()
            raise ConfigError(f"host and port must be free to listen on: {error}") from None
        except ConfigError:
            await runner.cleanup()
            raise
        engine.start(program.http_url(runner.addresses[0][:2]), events)
        replaying = None if events is None else asyncio.create_task(events.replay())
        return _Running(engine, server, runner, replaying)

    def _publisher(self, number: int) -> EventPublisher | None:
        first = self._settings.kv_events_port
        if first is None:
            return None
        context: zmq.asyncio.Context = zmq.asyncio.Context(shadow=self._sockets)
        return EventPublisher(context, self._settings.host, first + 2 * number if first else 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="vllm-llmd sim-engine", description="engines without a model or a GPU")
    add_arguments(parser)
    return program.main(parser, lambda args: run(from_args(args)))


if __name__ == "__main__":
    sys.exit(main())
