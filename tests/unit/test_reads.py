"""Reads straight into place, and reads through the staging area, with the shipped fake for the bytes."""

import numpy as np
import pytest

from vllm_llmd.errors import TransferError
from vllm_llmd.kernels.block_copy import Grid, Strides
from vllm_llmd.kv_connector.bridge import ReadWork, Staged
from vllm_llmd.kv_connector.delivery import SourceEndpoint
from vllm_llmd.kv_connector.exchange import ReadFrom
from vllm_llmd.kv_connector.lifecycle import StartRead
from vllm_llmd.kv_connector.reads import SLOTS_PER_PEER, Reads, batches
from vllm_llmd.kv_connector.staging import SLOT_BYTES, HostStaging
from vllm_llmd.kv_connector.transport import PeerName
from vllm_llmd.names import OrderId
from vllm_llmd.testing.transport import FakeTransport
from vllm_llmd.wire import Regions

REGIONS = Regions([], [], [], [], [], [], [], 0, 0, "DRAM")
PIECE = 1 << 20
"""Bytes of a piece that is staged; a slot holds eight."""

BYTES = Strides(0, 4, 1)
GRID = Grid(1, PIECE // 4, 4, 1, BYTES, BYTES)


class Bench:
    """Reads between two memories of one process."""

    def __init__(self, pieces: int) -> None:
        self.transport = FakeTransport("here")
        self.peers = {name: self.transport.connect(name.encode()) for name in ("a", "b")}
        self.source = np.random.default_rng(1).integers(0, 255, pieces * PIECE, dtype=np.uint8)
        self.target = np.zeros(pieces * PIECE, dtype=np.uint8)
        self.reads = Reads(self.transport, REGIONS, HostStaging)

    def at(self, memory: "np.ndarray[tuple[int], np.dtype[np.uint8]]", pieces: range) -> "np.ndarray":  # type: ignore[type-arg]
        return np.array([memory.ctypes.data + piece * PIECE for piece in pieces], dtype=np.uint64)

    def start(self, staged: range, direct: range = range(0), seq: int = 0, peer: str = "a") -> None:
        def runs(memory: "np.ndarray") -> "np.ndarray":  # type: ignore[type-arg]
            rows = [[address, PIECE, 0] for address in self.at(memory, direct)]
            return np.array(rows, dtype=np.uint64).reshape(-1, 3)

        pieces = (Staged(self.at(self.source, staged), 0, self.at(self.target, staged), PIECE, GRID),) if staged else ()
        act = ReadFrom(SourceEndpoint(peer), StartRead(OrderId("o"), seq, ()))
        self.reads.start(act, PeerName(peer), "DRAM", ReadWork(runs(self.target), runs(self.source), pieces), 1.0)

    def copied(self, pieces: range) -> bool:
        part = slice(pieces.start * PIECE, pieces.stop * PIECE)
        return bool((self.target[part] == self.source[part]).all())


def test_a_range_ends_when_all_of_it_is_in_place() -> None:
    bench = Bench(20)
    bench.start(range(4, 20), range(4))
    (ended,) = [ended for now in range(2, 9) for ended in bench.reads.poll(now)]
    assert (ended.ok, ended.bytes) == (True, 20 * PIECE)
    assert bench.copied(range(20))
    assert not bench.reads.active
    assert bench.reads.peers == set()


def test_a_range_of_many_slots_goes_through_few() -> None:
    bench = Bench(64)
    running: list[int] = []
    bench.transport.hold = lambda plan: bool(running.append(plan.bytes))
    bench.start(range(64))
    bench.reads.poll(2)
    assert len(running) == SLOTS_PER_PEER
    ended = [ended for now in range(3, 30) for ended in bench.reads.poll(now)]
    assert [each.ok for each in ended] == [True]
    assert bench.copied(range(64))


def test_a_peer_that_stalls_leaves_slots_to_others() -> None:
    bench = Bench(48)
    bench.transport.hold = lambda plan: plan.peer == "a"
    bench.start(range(32), peer="a")
    bench.start(range(32, 48), seq=1, peer="b")
    ended = [ended.act.read.seq for now in range(2, 30) for ended in bench.reads.poll(now)]
    assert ended == [1]
    assert bench.reads.peers == {"a"}


def test_a_read_that_fails_fails_its_range_once_and_gives_its_slots_back() -> None:
    bench = Bench(24)
    bench.transport.fail = lambda plan: True
    bench.start(range(24))
    ended = [ended for now in range(2, 30) for ended in bench.reads.poll(now)]
    assert [each.ok for each in ended] == [False]
    bench.transport.fail = lambda plan: False
    bench.start(range(24), seq=1)
    assert [ended.ok for now in range(30, 60) for ended in bench.reads.poll(now)] == [True]


def test_a_read_that_cannot_start_fails_its_range() -> None:
    bench = Bench(8)
    bench.start(range(8), peer="stranger")
    assert [ended.ok for ended in bench.reads.poll(2)] == [False]
    assert not bench.reads.active


def test_nothing_to_read_is_an_error() -> None:
    with pytest.raises(TransferError, match="nothing that range 0 could go to"):
        Bench(1).start(range(0))


def test_pieces_are_dealt_out_to_as_few_slots_as_can_be() -> None:
    bench = Bench(20)
    odd = Grid(1, 25, 4, 1, BYTES, BYTES)
    first = Staged(bench.at(bench.source, range(20)), 0, bench.at(bench.target, range(20)), 100, odd)
    second = Staged(bench.at(bench.source, range(9)), 0, bench.at(bench.target, range(9)), PIECE, GRID)
    dealt = batches([first, second])
    assert len(dealt) == 2
    assert [len(batch.remote) for batch in dealt] == [20 + 7, 2]
    for batch in dealt:
        ends = batch.offsets + batch.remote[:, 1]
        assert (batch.offsets % 64 == 0).all()
        assert ends.max() <= SLOT_BYTES
        assert (np.sort(batch.offsets)[1:] >= np.sort(ends)[:-1]).all()


def test_a_piece_that_fits_into_no_slot_is_refused() -> None:
    huge = Staged(np.array([0], np.uint64), 0, np.array([0], np.uint64), SLOT_BYTES + 1, GRID)
    with pytest.raises(TransferError, match="do not fit"):
        batches([huge])
