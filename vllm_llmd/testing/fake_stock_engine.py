"""An engine without our plugin, as a router sees it: vLLM's HTTP, and its KV events over real ZeroMQ.

What the model or the scheduler would do is left out. `held` is the truth that a router's index must come to equal.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from aiohttp import web

from vllm_llmd.kernels.hash_chain import chain_names
from vllm_llmd.names import BlockName
from vllm_llmd.testing.fake_engine import Received

METRICS = """# HELP vllm:num_requests_running Number of requests
vllm:num_requests_running{{engine="0",model_name="m"}} {running}
vllm:num_requests_waiting{{engine="0",model_name="m"}} 2.0
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} 0.25
vllm:cache_config_info{{block_size="{block_size}",engine="0",num_gpu_blocks="400"}} 1.0
process_start_time_seconds {started}
"""


@dataclass
class FakeStockEngine:
    """`hangs` and `fails` name paths that do so."""

    models: tuple[str, ...] = ("stock",)
    block_size: int = 4
    remembers: int = 10_000
    replays: bool = True
    port: int = 0
    held: set[BlockName] = field(default_factory=set)
    requests: list[Received] = field(default_factory=list)
    hangs: set[str] = field(default_factory=set)
    fails: set[str] = field(default_factory=set)
    running: float = 3.0
    aborted: int = 0
    """Requests whose client closed the connection before they were answered."""

    async def start(self) -> "FakeStockEngine":
        self._context = zmq.asyncio.Context()
        self._publisher = self._context.socket(zmq.PUB)
        self._replay = self._context.socket(zmq.ROUTER)
        for socket in (self._publisher, self._replay):
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind("tcp://127.0.0.1:*")
        self._begin_life()
        app = web.Application()
        app.router.add_get("/health", self._get)
        app.router.add_get("/v1/models", self._get)
        app.router.add_get("/metrics", self._get)
        app.router.add_post("/v1/completions", self._complete)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self._serving = asyncio.create_task(self._serve_replays())
        return self

    async def stop(self) -> None:
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        await self._runner.cleanup()
        self._publisher.close(linger=0)
        self._replay.close(linger=0)
        self._context.term()

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    @property
    def flag(self) -> str:
        """What a router is told of it."""
        events, replay = (each.getsockopt_string(zmq.LAST_ENDPOINT) for each in (self._publisher, self._replay))
        return f"http={self.http},events={events}" + (f",replay={replay}" if self.replays else "")

    @property
    def id(self) -> str:
        return self.http.removeprefix("http://")

    def restart(self) -> None:
        """Another life, on the same ports: an empty cache, and numbers from 0."""
        self.held.clear()
        self._begin_life()

    def _begin_life(self) -> None:
        self._number = 0
        self._started = time.time()
        self._history: deque[tuple[int, bytes]] = deque(maxlen=self.remembers)

    def stored(self, tokens: Sequence[int]) -> Any:
        """The event of a prompt's full blocks; a block's hash is its own name, upside down."""
        names = chain_names(tokens, self.block_size)
        self.held.update(names)
        full = list(tokens[: len(names) * self.block_size])
        return ["BlockStored", [~name & (1 << 64) - 1 for name in names], None, full, self.block_size, None, "GPU"]

    def removed(self, tokens: Sequence[int]) -> Any:
        """The event that takes a prompt's full blocks away."""
        names = chain_names(tokens, self.block_size)
        self.held.difference_update(names)
        return ["BlockRemoved", [~name & (1 << 64) - 1 for name in names], "GPU"]

    async def publish(self, *events: Any) -> None:
        await self._publisher.send_multipart([b"", self._number.to_bytes(8, "big"), self._remember(*events)])
        self._number += 1

    def lose(self, *events: Any) -> None:
        """A message that no subscriber hears live."""
        self._remember(*events)
        self._number += 1

    def _remember(self, *events: Any) -> bytes:
        payload = msgspec.msgpack.encode([time.time(), list(events), 0])
        self._history.append((self._number, payload))
        return payload

    async def _serve_replays(self) -> None:
        while True:
            client, _, start = await self._replay.recv_multipart()
            for number, payload in list(self._history):
                if number >= int.from_bytes(start, "big"):
                    await self._replay.send_multipart([client, b"", b"", number.to_bytes(8, "big"), payload])
            await self._replay.send_multipart([client, b"", b"", (-1).to_bytes(8, "big", signed=True), b""])

    async def _get(self, request: web.Request) -> web.Response:
        if request.path in self.hangs:
            await asyncio.Event().wait()
        if request.path in self.fails:
            return web.Response(status=500)
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": each, "max_model_len": 512} for each in self.models]})
        if request.path == "/metrics":
            values = {"running": self.running, "block_size": self.block_size, "started": self._started}
            return web.Response(text=METRICS.format(**values))
        return web.Response()

    async def _complete(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append(Received(request.path, headers, await request.read()))
        if request.path in self.hangs:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.aborted += 1
                raise
        return web.json_response({"choices": [{"text": "stock"}]})
