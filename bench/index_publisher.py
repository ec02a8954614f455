"""Engines that publish KV events in vLLM's form over ZeroMQ as fast as they can, in a process of their own."""

import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np
import zmq
from index_fleet import EPOCH, info

from vllm_llmd import wire
from vllm_llmd.kernels.frames_cpu import Bytes, Counts, call
from vllm_llmd.kernels.memory_cpu import compiled
from vllm_llmd.router.zmq_receive import address_of

CHAIN_MESSAGES = 16
"""Messages of one prompt, each block's parent being in the one before."""

SNDMORE = 2
VOCABULARY = 150_000
SUBSCRIBED_WITHIN_MS = 20_000


class Publisher:
    """The other end of the process. What is published is made anew by `prepare`, and sent by every `send`."""

    def __init__(self, engines: int, messages: int, blocks: int, block_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, engines, messages, blocks, block_size), daemon=True)
        self._process.start()

    def prepare(self, seed: int) -> list[list[int]]:
        """Different blocks for each seed. The token ids of each engine's last prompt."""
        return self._ask("prepare", seed)  # type: ignore[no-any-return]

    def bind(self) -> list[str]:
        """Fresh sockets: their endpoints."""
        return self._ask("bind", None)  # type: ignore[no-any-return]

    def link(self, router: str) -> None:
        """Fresh links to a router, with all that is said before the first block."""
        self._ask("link", router)

    def wait_for_subscribers(self) -> None:
        self._ask("wait_for_subscribers", None)

    def send(self) -> None:
        """Begins to publish everything. Returns at once."""
        self._here.send(("send", None))

    def send_linked(self) -> None:
        """The same blocks in our own form, over the links."""
        self._here.send(("send_linked", None))

    def sent(self) -> float:
        """Seconds that it took to hand everything to ZeroMQ."""
        return self._here.recv()  # type: ignore[no-any-return]

    def close(self) -> None:
        self._process.terminate()
        self._process.join()

    def _ask(self, what: str, argument: Any) -> Any:
        self._here.send((what, argument))
        return self._here.recv()


class _Engines:
    def __init__(self, engines: int, messages: int, blocks: int, block_size: int) -> None:
        self._engines = engines
        self._messages = messages
        self._blocks = blocks
        self._block_size = block_size
        self._context = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        self._payloads: list[list[bytes]] = []
        self._changes: list[list[bytes]] = []
        self._send = address_of("zmq_send")
        self.send(None)  # compiles

    def prepare(self, seed: int) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        self._payloads.clear()
        self._changes.clear()
        lasts = []
        for engine in range(self._engines):
            payloads, tokens = [], []
            self._changes.append([self._changed(engine, number, rng) for number in range(self._messages)])
            for event in self._events(rng):
                tokens = tokens * (event["parent_block_hash"] is not None) + event["token_ids"]
                payloads.append(msgspec.msgpack.encode([0.5, [event], 0]))
            self._payloads.append(payloads)
            lasts.append(tokens)
        return lasts

    def _events(self, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        """As vLLM 0.32 writes them."""
        parent = None
        for number in range(self._messages):
            hashes = rng.integers(1, 1 << 64, self._blocks, np.uint64).tolist()
            yield {
                "type": "BlockStored",
                "block_hashes": hashes,
                "parent_block_hash": parent if number % CHAIN_MESSAGES else None,
                "token_ids": rng.integers(0, VOCABULARY, self._blocks * self._block_size).tolist(),
                "block_size": self._block_size,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "extra_keys": [None] * self._blocks,
                "group_idx": 0,
                "kv_cache_spec_kind": "full_attention",
            }
            parent = hashes[-1]

    def _changed(self, engine: int, number: int, rng: np.random.Generator) -> bytes:
        """As many blocks in our own form."""
        names = rng.integers(1, 1 << 64, self._blocks, np.uint64).astype("<u8").tobytes()
        about = info(engine, self._block_size, self._messages * self._blocks)
        return wire.encode(wire.BlocksChanged(about.id, EPOCH, number + 1, False, b"", names))

    def link(self, router: str) -> None:
        self._close()
        for engine in range(self._engines):
            about = info(engine, self._block_size, self._messages * self._blocks)
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.ROUTING_ID, f"{about.id}#{EPOCH}".encode())
            socket.connect(router)
            for message in (wire.Hello(about), wire.Snapshot(about.id, EPOCH, 0, 0, 1, b"")):
                socket.send(wire.encode(message))
            self._sockets.append(socket)

    def _close(self) -> None:
        while self._sockets:
            self._sockets.pop().close(linger=0)

    def bind(self, _: None) -> list[str]:
        self._close()
        self._sockets = [self._context.socket(zmq.XPUB) for _ in range(self._engines)]
        for socket in self._sockets:
            socket.setsockopt(zmq.SNDHWM, 0)
        return [f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}" for socket in self._sockets]

    def wait_for_subscribers(self, _: None) -> None:
        for socket in self._sockets:
            assert socket.poll(SUBSCRIBED_WITHIN_MS), "nobody subscribes"
            socket.recv()

    def send(self, _: None) -> float:
        return self._send_all(self._payloads, numbered=True)

    def send_linked(self, _: None) -> float:
        return self._send_all(self._changes, numbered=False)

    def _send_all(self, messages: list[list[bytes]], *, numbered: bool) -> float:
        """Message by message of every engine in turn, without Python in between: it would be the slowest of all."""
        every = [each for turn in zip(*messages, strict=True) for each in turn]
        data, sizes = np.frombuffer(b"".join(every), np.uint8), np.array([len(each) for each in every], np.int64)
        sockets = np.array([socket.underlying for socket in self._sockets], np.int64)
        began = time.perf_counter()
        _send_all(self._send, sockets, data, sizes, numbered)
        return time.perf_counter() - began


@compiled
def _send_all(send: int, sockets: Counts, data: Bytes, sizes: Counts, numbered: bool) -> None:
    number = np.zeros(8, np.uint8)
    at = data.ctypes.data
    for i in range(len(sizes)):
        socket, sequence = sockets[i % len(sockets)], i // len(sockets)
        for byte in range(8):
            number[7 - byte] = sequence >> 8 * byte & 0xFF
        if numbered:
            call(send, socket, at, 0, SNDMORE)
            call(send, socket, number.ctypes.data, 8, SNDMORE)
        call(send, socket, at, sizes[i], 0)
        at += sizes[i]


def _serve(there: Connection, *shape: int) -> None:
    engines = _Engines(*shape)
    while True:
        what, argument = there.recv()
        there.send(getattr(engines, what)(argument))
