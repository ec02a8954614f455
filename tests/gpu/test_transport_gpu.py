"""Blocks from VRAM to VRAM, between two processes on one GPU, over NIXL: values, and the order of streams.

Needs torch with CUDA, NIXL and Triton, and nothing of vLLM. Without a GPU, values go between host memories.
"""

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
pytest.importorskip("nixl")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

LAYERS, BLOCKS, HEADS, CHANNELS, LEASE_MS = 3, 16, 4, 64, 5000
DEADLINE_S = 60.0


def make_rank(name: str, tokens: int, fill: bool) -> tuple[Any, Any]:
    """A rank's I/O with a cache of (layers, blocks, heads, tokens, channels) on the GPU; and that cache."""
    from vllm_llmd.clock import MonotonicClock
    from vllm_llmd.kv_connector import device_memory
    from vllm_llmd.kv_connector.exchange import Caller
    from vllm_llmd.kv_connector.layout import LayerView, Memory, pack_regions
    from vllm_llmd.kv_connector.nixl_transport import NixlTransport
    from vllm_llmd.kv_connector.peer_io import CacheAccess, PeerIo
    from vllm_llmd.kv_connector.peer_sockets import PeerSettings
    from vllm_llmd.kv_connector.seal import Seal
    from vllm_llmd.names import EngineId, Epoch
    from vllm_llmd.wire import Geometry, GroupShape

    shape = (LAYERS, BLOCKS, HEADS, tokens, CHANNELS)
    cache = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
    if fill:
        cache.copy_(values(shape))
    if ON_GPU:
        torch.cuda.synchronize()
    layers = list(cache)
    views = [LayerView(n, 0, device_memory.tensor_view(layer), "cells") for n, layer in enumerate(layers)]
    kind, device_id = device_memory.device_of(cache)
    regions = pack_regions(views, Memory(BLOCKS, kind, device_id))
    transport = NixlTransport(f"{name}-{time.monotonic_ns()}")
    transport.register(regions, device_memory.storage_spans(layers))
    geometry = Geometry(1, HEADS, f"{DEVICE} cells", [GroupShape(tokens, LAYERS)])
    settings = PeerSettings(Caller(EngineId(name), Epoch(1), 0), "same", geometry, "127.0.0.1", Seal(None))
    new_staging, prepare = device_memory.staging_for(layers)
    io = PeerIo(settings, CacheAccess(transport, regions, new_staging, prepare), MonotonicClock())
    io.start()
    return io, cache


def values(shape: tuple[int, ...]) -> Any:
    """A value per item that tells where it belongs, exact in bfloat16 below 256."""
    count = 1
    for size in shape:
        count *= size
    return (torch.arange(count, device=DEVICE) % 251).reshape(shape).to(torch.bfloat16)


def serve(pipe: Connection, tokens: int, late: bool) -> None:
    """The source's process. With `late`, the values are written by a kernel that waits behind a long one."""
    from vllm_llmd.kv_connector import device_memory
    from vllm_llmd.kv_connector.steps import PlannedRange, Reader, Ready
    from vllm_llmd.names import EngineId, Epoch, OrderId
    from vllm_llmd.wire import Announce, Strip

    io, cache = make_rank("source", tokens, fill=not late)
    pipe.send(io.endpoint)
    blocks: list[int] = pipe.recv()
    mark = device_memory.step_marker("VRAM" if ON_GPU else "DRAM")
    if late:
        busy = torch.randn(4096, 4096, device=DEVICE)
        for _ in range(200):
            busy = busy @ busy
            busy /= busy.norm()
        cache.copy_(values(tuple(cache.shape)))
    message = Announce(OrderId("o"), 0, [Strip(0, 0, blocks)], last=True)
    io.submit([Ready((PlannedRange(Reader(EngineId("destination"), Epoch(1), 1), message, LEASE_MS),), mark())])
    with suppress(EOFError):
        pipe.recv()
    io.close()


@contextmanager
def source(tokens: int, late: bool = False) -> Iterator[Connection]:
    """This file as a process of its own; it ends when its end of the pipe says so."""
    here, there = multiprocessing.Pipe()
    argv = [sys.executable, "-P", __file__, str(there.fileno()), str(tokens), str(int(late))]
    with subprocess.Popen(argv, pass_fds=[there.fileno()]) as process:
        there.close()
        try:
            yield here
        finally:
            here.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def fetch(pipe: Connection, theirs: int, ours: int, remote: list[int], local: tuple[int, ...]) -> Any:
    """The destination's cache after an order for blocks `remote` into blocks `local`."""
    from vllm_llmd.kv_connector.delivery import SourceEndpoint
    from vllm_llmd.kv_connector.exchange import Expect
    from vllm_llmd.kv_connector.lifecycle import OrderSpec, Wanted
    from vllm_llmd.kv_connector.steps import Load
    from vllm_llmd.names import Epoch, OrderId, RequestId

    io, cache = make_rank("destination", ours, fill=False)
    wanted = Wanted(0, (1 << LAYERS) - 1, ours, theirs, 0, len(local) * ours, 0, local)
    spec = OrderSpec(OrderId("o"), RequestId("r"), (wanted,), LEASE_MS)
    io.submit([Load((Expect(SourceEndpoint(pipe.recv()), Epoch(1), 0, spec),))])
    pipe.send(remote)
    deadline = time.monotonic() + DEADLINE_S
    try:
        while time.monotonic() < deadline:
            io.wait(50)
            io.check()
            report = io.take()
            if report is not None and report.outcomes:
                (outcome,) = report.outcomes
                assert (outcome.reason, outcome.missing) == (None, ())
                return cache
        raise AssertionError("the order did not end")
    finally:
        io.close()


def test_blocks_move_between_processes() -> None:
    with source(16) as pipe:
        cache = fetch(pipe, 16, 16, [5, 3, 4, 9], (1, 2, 3, 7))
    expected = values((LAYERS, BLOCKS, HEADS, 16, CHANNELS))
    assert torch.equal(cache[:, [1, 2, 3, 7]], expected[:, [5, 3, 4, 9]])
    assert not cache[:, [0, 4, 5, 6, 8]].any()


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU: a step has passed when it returns")
def test_a_range_is_announced_only_after_the_stream_that_wrote_it_has_passed() -> None:
    with source(16, late=True) as pipe:
        cache = fetch(pipe, 16, 16, [5, 3], (1, 2))
    expected = values((LAYERS, BLOCKS, HEADS, 16, CHANNELS))
    assert torch.equal(cache[:, [1, 2]], expected[:, [5, 3]])


@pytest.mark.parametrize(("theirs", "ours"), [(4, 16), (16, 4)])
def test_blocks_of_another_size_are_put_in_place_by_the_kernel(theirs: int, ours: int) -> None:
    """Four tokens of a head are 512 bytes: too short to be read one by one, so that they are staged."""
    remote = [5, 3, 4, 9, 0, 7, 1, 2] if theirs < ours else [5, 3]
    local = (1, 2) if theirs < ours else (1, 2, 3, 7, 8, 4, 6, 9)
    with source(theirs) as pipe:
        cache = fetch(pipe, theirs, ours, remote, local)
    sent = values((LAYERS, BLOCKS, HEADS, theirs, CHANNELS))[:, remote]
    got = cache[:, list(local)]
    prompt = [x.transpose(1, 2).reshape(LAYERS, HEADS, -1, CHANNELS) for x in (sent, got)]
    assert torch.equal(*prompt)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]), late=sys.argv[3] == "1")
