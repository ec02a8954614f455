"""What every Transport promises, of the shipped fake and of NIXL alike."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from vllm_llmd.errors import TransferError
from vllm_llmd.kv_connector.bridge import Bridge, one_run
from vllm_llmd.kv_connector.layout import CellCopy, LayerView, Memory, Runs, TensorView, pack_regions
from vllm_llmd.kv_connector.transport import SCRATCH_BYTES, PeerName, ReadPlan, ReadState, Transport
from vllm_llmd.testing.transport import FakeTransport
from vllm_llmd.wire import Regions

BLOCK_BYTES = 512
BLOCKS = 16


def nixl(name: str) -> Transport:
    pytest.importorskip("nixl")
    from vllm_llmd.kv_connector.nixl_transport import NixlTransport

    return NixlTransport(name)


@dataclass
class End:
    """A transport with registered memory of its own."""

    transport: Transport
    memory: npt.NDArray[np.uint8]
    regions: Regions


def make_end(transport: Transport) -> End:
    memory = np.zeros((BLOCKS, BLOCK_BYTES), dtype=np.uint8)
    tensor = TensorView(memory.ctypes.data, memory.shape, (BLOCK_BYTES, 1), 1)
    regions = pack_regions([LayerView(0, 0, tensor, "opaque")], Memory(BLOCKS, "DRAM", 0))
    transport.register(regions, [(memory.ctypes.data, memory.nbytes)])
    return End(transport, memory, regions)


@pytest.fixture(params=[FakeTransport, nixl], ids=["fake", "nixl"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[End, End]]:
    """Source and destination; a thread lets the source's reads go on, as its I/O thread would."""
    make: Callable[[str], Transport] = request.param
    unique = f"{request.node.name}-{time.monotonic_ns()}"
    source, destination = make_end(make(f"source-{unique}")), make_end(make(f"destination-{unique}"))
    stop = threading.Event()

    def help_along() -> None:
        while not stop.wait(0.001):
            source.transport.progress()

    thread = threading.Thread(target=help_along)
    thread.start()
    yield source, destination
    stop.set()
    thread.join()
    destination.transport.close()
    source.transport.close()


def runs(ends: tuple[End, End], *pairs: tuple[int, int]) -> tuple[Runs, Runs]:
    """The runs, here and there, that copy blocks (source's, destination's)."""
    source, destination = ends
    cells = [CellCopy(0, remote, 0, local, 0) for remote, local in pairs]
    work = Bridge(destination.regions, source.regions, None).plan(cells)
    return work.local, work.remote


def finish(transport: Transport, plan: ReadPlan) -> ReadState:
    read = transport.start_read(plan)
    for _ in range(20_000):
        state = transport.poll(read)
        if state is not ReadState.RUNNING:
            return state
        time.sleep(0.0005)
    raise AssertionError("the read did not end")


def test_a_read_copies_the_blocks_asked_for_and_no_others(ends: tuple[End, End]) -> None:
    source, destination = ends
    source.memory[:] = np.arange(BLOCKS, dtype=np.uint8)[:, None]
    peer = destination.transport.connect(source.transport.metadata())
    local, remote = runs(ends, (3, 1), (4, 2), (9, 15))
    assert finish(destination.transport, ReadPlan(peer, local, remote, "DRAM", "DRAM")) is ReadState.FINISHED
    expected = np.zeros((BLOCKS, BLOCK_BYTES), dtype=np.uint8)
    expected[1], expected[2], expected[15] = 3, 4, 9
    assert (destination.memory == expected).all()


def test_reads_of_one_peer_run_side_by_side(ends: tuple[End, End]) -> None:
    source, destination = ends
    source.memory[:] = 7
    peer = destination.transport.connect(source.transport.metadata())
    for block in range(BLOCKS):
        local, remote = runs(ends, (block, block))
        assert finish(destination.transport, ReadPlan(peer, local, remote, "DRAM", "DRAM")) is ReadState.FINISHED
    assert (destination.memory == 7).all()


def test_the_scratch_of_a_peer_can_be_read(ends: tuple[End, End]) -> None:
    source, destination = ends
    peer = destination.transport.connect(source.transport.metadata())
    local = one_run(destination.transport.scratch(), SCRATCH_BYTES)
    remote = one_run(source.transport.scratch(), SCRATCH_BYTES)
    assert finish(destination.transport, ReadPlan(peer, local, remote, "DRAM", "DRAM")) is ReadState.FINISHED


def test_a_peer_can_be_forgotten_and_learnt_again(ends: tuple[End, End]) -> None:
    source, destination = ends
    source.memory[:] = 5
    for _ in range(2):
        peer = destination.transport.connect(source.transport.metadata())
        local, remote = runs(ends, (0, 0))
        assert finish(destination.transport, ReadPlan(peer, local, remote, "DRAM", "DRAM")) is ReadState.FINISHED
        destination.transport.disconnect(peer)


def test_a_read_from_a_stranger_cannot_start(ends: tuple[End, End]) -> None:
    _source, destination = ends
    local, remote = runs(ends, (0, 0))
    with pytest.raises(TransferError):
        destination.transport.start_read(ReadPlan(PeerName("stranger"), local, remote, "DRAM", "DRAM"))


@pytest.mark.parametrize("metadata", [b"", b"\xff\xfe", b"\xff" * 4096])
def test_metadata_that_is_none_is_refused(ends: tuple[End, End], metadata: bytes) -> None:
    with pytest.raises(TransferError):
        ends[1].transport.connect(metadata)
