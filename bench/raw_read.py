"""How fast scattered KV blocks can be read, against one read of as many contiguous bytes: two processes, no engine.

`python -m raw_read --layout layers --rounds 15` prints one line of JSON. Set UCX_TLS=tcp for TCP.
The blocks are as SmolLM2 has them: 30 layers, 48 KiB per layer and block. Both reads go between the same two NIXL
agents, one after the other, and end when NIXL says so; making the plan counts.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vllm_llmd.errors import TransferError
from vllm_llmd.kv_connector.bridge import Bridge
from vllm_llmd.kv_connector.layout import CellCopy, LayerView, Memory, TensorView, pack_regions
from vllm_llmd.kv_connector.nixl_transport import NixlTransport
from vllm_llmd.kv_connector.transport import PeerName, ReadPlan, ReadState
from vllm_llmd.wire import Regions

LAYERS = 30
LAYER_BYTES = 48 << 10
BLOCK_BYTES = LAYERS * LAYER_BYTES
READ_BLOCKS = -(-(64 << 20) // BLOCK_BYTES)
READ_BYTES = READ_BLOCKS * BLOCK_BYTES
"""64 MiB, rounded up to whole blocks."""

POOL_BLOCKS = 256
WARM_UP_ROUNDS = 2

Layout = Literal["layers", "blocks"]
"""What is outermost in the cache: all blocks of a layer lie together, or all layers of a block."""

WORDS = LAYER_BYTES // 8


@dataclass(frozen=True)
class Pool:
    """One side's cache, every page of it touched, as 64-bit words. The source's hold their own position."""

    words: npt.NDArray[np.uint64]

    @property
    def address(self) -> int:
        return int(self.words.ctypes.data)

    def by_layer_and_block(self, layout: Layout) -> npt.NDArray[np.uint64]:
        """The words, shape (layers, blocks, words)."""
        if layout == "layers":
            return self.words.reshape(LAYERS, POOL_BLOCKS, WORDS)
        return self.words.reshape(POOL_BLOCKS, LAYERS, WORDS).swapaxes(0, 1)


@dataclass(frozen=True)
class Sides:
    """Where both caches lie, the other side's name, and how our connector gets from there to here."""

    local: int
    remote: int
    peer: PeerName
    bridge: Bridge


def regions(base: int, layout: Layout) -> Regions:
    """A cache at `base` as our connector describes it to itself and to others."""
    between_layers, between_blocks = (
        (POOL_BLOCKS * LAYER_BYTES, LAYER_BYTES) if layout == "layers" else (LAYER_BYTES, BLOCK_BYTES)
    )
    tensors = [
        TensorView(base + layer * between_layers, (POOL_BLOCKS, LAYER_BYTES), (between_blocks, 1), 1)
        for layer in range(LAYERS)
    ]
    layers = [LayerView(number, 0, tensor, "opaque") for number, tensor in enumerate(tensors)]
    return pack_regions(layers, Memory(POOL_BLOCKS, "DRAM", 0))


def fragmented_plan(sides: Sides, pairs: list[tuple[int, int]]) -> ReadPlan:
    """What our connector reads to copy `pairs` of (source's block, destination's block)."""
    work = sides.bridge.plan([CellCopy(0, theirs, 0, ours, 0) for theirs, ours in pairs])
    return ReadPlan(sides.peer, work.local, work.remote, "DRAM", "DRAM")


def timed_fragmented_ms(transport: NixlTransport, make_plan: Callable[[], ReadPlan]) -> float:
    """Milliseconds from wanting to read to having read, by our transport."""
    began = time.perf_counter()
    read = transport.start_read(make_plan())
    while (state := transport.poll(read)) is ReadState.RUNNING:
        pass
    if state is not ReadState.FINISHED:
        raise TransferError("a fragmented read failed")
    return (time.perf_counter() - began) * 1000


def timed_contiguous_ms(agent: Any, sides: Sides, offset: int) -> float:
    """Milliseconds that NIXL itself takes for one run of READ_BYTES at the same offset on both sides."""
    began = time.perf_counter()
    local, remote = (
        agent.get_xfer_descs(np.array([[base + offset, READ_BYTES, 0]], dtype=np.uint64), "DRAM")
        for base in (sides.local, sides.remote)
    )
    handle = agent.initialize_xfer("READ", local, remote, sides.peer)
    state = agent.transfer(handle)
    while state == "PROC":
        state = agent.check_xfer_state(handle)
    agent.release_xfer_handle(handle)
    if state != "DONE":
        raise TransferError(f"a contiguous read ended as {state}")
    return (time.perf_counter() - began) * 1000


def source(channel: Connection) -> None:
    """The other process: shows its cache, then helps reads along until the channel closes."""
    transport, pool = _open("source")
    pool.words[:] = np.arange(len(pool.words), dtype=np.uint64)
    channel.send((transport.metadata(), pool.address))
    checked = time.monotonic()
    while True:
        transport.progress()
        if time.monotonic() - checked > 0.1:
            checked = time.monotonic()
            if channel.poll():
                return


def measure(layout: Layout, rounds: int) -> list[tuple[float, float]]:
    """Milliseconds of a fragmented and a contiguous read, round by round. Raises TransferError."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=source, args=(theirs,), daemon=True)
    process.start()
    try:
        transport, pool = _open("destination")
        metadata, remote = ours.recv()
        bridge = Bridge(regions(pool.address, layout), regions(remote, layout), None)
        sides = Sides(pool.address, remote, transport.connect(metadata), bridge)
        _check(transport, sides, pool, layout)
        timed = [_round(transport, sides, number) for number in range(WARM_UP_ROUNDS + rounds)]
        return timed[WARM_UP_ROUNDS:]
    finally:
        ours.send("enough")
        process.join(10)
        process.kill()


def _open(name: str) -> tuple[NixlTransport, Pool]:
    transport = NixlTransport(f"{name}-{os.getpid()}")
    pool = Pool(np.full(POOL_BLOCKS * BLOCK_BYTES // 8, 2**64 - 1, dtype=np.uint64))
    transport.register(regions(pool.address, "layers"), [(pool.address, pool.words.nbytes)])
    return transport, pool


def _check(transport: NixlTransport, sides: Sides, pool: Pool, layout: Layout) -> None:
    """One fragmented read brings every piece from where it should. Raises TransferError."""
    pairs = [(theirs, POOL_BLOCKS - 1 - theirs) for theirs in range(0, POOL_BLOCKS, 5)]
    timed_fragmented_ms(transport, lambda: fragmented_plan(sides, pairs))
    here = pool.by_layer_and_block(layout)
    there = Pool(np.arange(len(pool.words), dtype=np.uint64)).by_layer_and_block(layout)
    if not all(np.array_equal(here[:, ours], there[:, theirs]) for theirs, ours in pairs):
        raise TransferError(f"a fragmented read with {layout} outermost brought other bytes than it should")


def _round(transport: NixlTransport, sides: Sides, number: int) -> tuple[float, float]:
    """Both reads; the order alternates."""
    chance = random.Random(number)
    theirs, ours = (chance.sample(range(POOL_BLOCKS), READ_BLOCKS) for _ in range(2))
    pairs = list(zip(theirs, ours, strict=True))
    offset = chance.randrange(POOL_BLOCKS - READ_BLOCKS) * BLOCK_BYTES
    took = {}
    for kind in ("fragmented", "contiguous") if number % 2 else ("contiguous", "fragmented"):
        if kind == "fragmented":
            took[kind] = timed_fragmented_ms(transport, lambda: fragmented_plan(sides, pairs))
        else:
            took[kind] = timed_contiguous_ms(transport._agent, sides, offset)
    return took["fragmented"], took["contiguous"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m raw_read", description="scattered blocks against one run")
    parser.add_argument("--layout", choices=("layers", "blocks"), required=True, help="what is outermost in the cache")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    args = parser.parse_args()
    sys.stdout.write(json.dumps({"bytes": READ_BYTES, "ms": measure(args.layout, args.rounds)}) + "\n")


if __name__ == "__main__":
    main()
