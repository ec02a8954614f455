"""Dynamo's `SelectionService` in this process, fed as it is in use: block events in vLLM's form over ZeroMQ."""

import asyncio
import os
import struct
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

os.environ.setdefault("DYN_LOG", "error")

from dynamo._core import SelectionService

MODEL = "m"
SUBSCRIBED_WITHIN_MS = 10_000
EVENTS_APPLIED_WITHIN_S = 120.0


class Selector:
    """A service and the publishing sockets of its engines, which are numbered from 0."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._service = SelectionService()
        self._context = zmq.Context()
        self._publishers: list[zmq.Socket[bytes]] = []
        self._sent: list[int] = []
        self._encoder = msgspec.msgpack.Encoder()

    async def join(self, engines: int, blocks: int) -> None:
        """Adds engines with room for so many blocks each, and waits until the service listens to them."""
        for engine in range(engines):
            publisher = self._context.socket(zmq.XPUB)
            publisher.setsockopt(zmq.SNDHWM, 0)
            publisher.setsockopt(zmq.LINGER, 0)
            port = publisher.bind_to_random_port("tcp://127.0.0.1")
            self._publishers.append(publisher)
            self._sent.append(0)
            await self.listen(engine, f"tcp://127.0.0.1:{port}", blocks)
        for publisher in self._publishers:
            assert await asyncio.to_thread(publisher.poll, SUBSCRIBED_WITHIN_MS), "nobody subscribes"
            publisher.recv()

    async def listen(self, engine: int, endpoint: str, blocks: int) -> None:
        """Adds an engine that publishes there."""
        await self._service.upsert_worker(
            {
                "worker_id": engine,
                "model_name": MODEL,
                "block_size": self._block_size,
                "endpoint": f"http://127.0.0.1:{engine + 1}",
                "kv_events_endpoint": endpoint,
                "total_kv_blocks": blocks,
                "max_num_batched_tokens": 8192,
            }
        )

    def store(self, engine: int, names: Sequence[int], parent: int | None, tokens: Sequence[int]) -> None:
        """The engine has stored these blocks after the block `parent`."""
        event = ["BlockStored", names, parent, tokens, self._block_size, None, "GPU"]
        payload = self._encoder.encode([time.time(), [event], 0])
        self._publishers[engine].send_multipart([b"", struct.pack(">Q", self._sent[engine]), payload])
        self._sent[engine] += 1

    async def settled(self, lasts: Sequence[Sequence[int]], look_every_s: float = 0.02) -> None:
        """Waits until each engine is known to hold the whole of its prompt, which has been told of last."""
        deadline = time.monotonic() + EVENTS_APPLIED_WITHIN_S
        for engine, tokens in enumerate(lasts):
            while await self._held(engine, tokens) < len(tokens) // self._block_size:
                assert time.monotonic() < deadline, f"Dynamo has not taken in what engine {engine} holds"
                await asyncio.sleep(look_every_s)

    async def _held(self, engine: int, tokens: Sequence[int]) -> int:
        found = await self._service.overlap_scores({"model_name": MODEL, "token_ids": list(tokens)})
        return max(worker["device_blocks"] for worker in found["workers"] if worker["worker_id"] == engine)

    async def select(self, tokens: Sequence[int]) -> Any:
        """Its choice for a prompt."""
        return await self._service.select({"model_name": MODEL, "token_ids": tokens})

    def close(self) -> None:
        self._service.shutdown()
        self._context.destroy(linger=0)
