"""What a broken or hostile rank may say to one that reads from it: only ordered blocks are written, all orders end.

The copies of a range are carried out as far as they are believed, so that a byte written elsewhere shows.
"""

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.clock import MonotonicClock
from vllm_llmd.errors import ConfigError, TransferError
from vllm_llmd.kv_connector.bridge import Bridge, ReadWork
from vllm_llmd.kv_connector.delivery import SourceEndpoint
from vllm_llmd.kv_connector.exchange import Act, Caller, Exchange, Expect, ReadFrom
from vllm_llmd.kv_connector.layout import CellCopy, LayerView, Memory, TensorView, check_regions, pack_regions
from vllm_llmd.kv_connector.lifecycle import Drained, OrderSpec, Outcome, Wanted
from vllm_llmd.kv_connector.peer_io import CacheAccess, PeerIo
from vllm_llmd.kv_connector.peer_sockets import PeerSettings
from vllm_llmd.kv_connector.reads import batches
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.staging import SLOT_BYTES, HostStaging
from vllm_llmd.kv_connector.steps import Load
from vllm_llmd.kv_connector.topology import HeadSlice
from vllm_llmd.names import EngineId, Epoch, OrderId, RequestId
from vllm_llmd.testing.transport import FakeTransport
from vllm_llmd.wire import (
    Ack,
    Announce,
    Component,
    Done,
    Dropped,
    Geometry,
    Greeting,
    Interior,
    PeerMessage,
    Refused,
    Regions,
    Renewed,
    Strip,
    decode_peer,
    encode,
)  # fmt: skip

BLOCKS, HEADS, LAYERS, CHANNELS, LEASE_MS = 8, 4, 3, 8, 1000
ENDPOINTS = (SourceEndpoint("tcp://s:1"), SourceEndpoint("tcp://s:2"))

numbers = st.sampled_from([0, 1, 2, 3, 7, 8, 15, 16, 17, 64, -1, 2**31, 2**62, 2**63 - 1, 2**64 - 1, -(2**63)])
small = st.integers(-1, 9)


@dataclass
class Cache:
    """A rank's cache of float32, (layers, blocks, heads, tokens, channels), and its regions."""

    tokens: int
    heads: int = HEADS

    def __post_init__(self) -> None:
        self.memory = np.zeros((LAYERS, BLOCKS, self.heads, self.tokens, CHANNELS), dtype=np.float32)
        strides = tuple(stride // 4 for stride in self.memory[0].strides)
        views = [
            LayerView(n, 0, TensorView(one.ctypes.data, one.shape, strides, 4), "cells")
            for n, one in enumerate(self.memory)
        ]
        self.regions = pack_regions(views, Memory(BLOCKS, "DRAM", 0))

    def written(self) -> set[int]:
        """The blocks in which anything has been written."""
        return {int(block) for block in np.flatnonzero(self.memory.any(axis=(0, 2, 3, 4)))}


# --- regions ------------------------------------------------------------------------------------------------------


def with_other_values(draw: st.DrawFn, regions: Regions) -> Regions:
    """Regions of which some are other than they were: a value, a column's length, what stands in a block."""
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(regions.__struct_fields__))
        value: Any = getattr(regions, name)
        if name == "interiors":
            value = [other_interior(draw, each) for each in value] * draw(st.sampled_from([1, 1, 0, 2]))
        elif isinstance(value, list):
            value = list(value)
            value[draw(st.integers(0, len(value) - 1))] = draw(numbers)
            value = value[: draw(st.sampled_from([len(value), len(value), 1]))]
        elif isinstance(value, int):
            value = draw(numbers)
        regions = msgspec.structs.replace(regions, **{name: value})
    return regions


def other_interior(draw: st.DrawFn, interior: Interior) -> Interior:
    changes = draw(st.dictionaries(st.sampled_from(["heads", "tokens", "head_bytes"]), numbers, max_size=2))
    components = [
        msgspec.structs.replace(
            each, **draw(st.dictionaries(st.sampled_from(Component.__struct_fields__), numbers, max_size=2))
        )
        for each in interior.components
    ] * draw(st.sampled_from([1, 1, 1, 0, 2]))
    return msgspec.structs.replace(interior, **changes, components=components)


slices = st.none() | st.builds(HeadSlice, st.integers(0, 3), st.integers(0, 2), st.integers(1, 2))
cells = st.lists(
    st.builds(CellCopy, st.integers(-1, 1), numbers | small, st.integers(0, 4), st.integers(0, 3), st.integers(0, 4)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=600)
@given(data=st.data(), ours=st.sampled_from([16, 32]), theirs=st.sampled_from([16, 32]), heads=slices, wanted=cells)
def test_whatever_a_rank_says_of_its_cache_only_the_blocks_asked_for_are_written(
    data: st.DataObject, ours: int, theirs: int, heads: HeadSlice | None, wanted: list[CellCopy]
) -> None:
    here = Cache(ours)
    said = data.draw(st.composite(with_other_values)(Cache(theirs).regions))
    try:
        check_regions(said)
        work = Bridge(here.regions, said, heads).plan(wanted, *data.draw(st.tuples(small, small)))
    except ConfigError:
        return
    pretend(work)
    assert here.written() <= {cell.local for cell in wanted}


def pretend(work: ReadWork) -> None:
    """Write ones wherever the read would write; the source's addresses are not looked at."""
    for (to, length, _), (_, remote_length, _) in zip(work.local.tolist(), work.remote.tolist(), strict=True):
        assert length == remote_length
        ctypes.memset(to, 1, length)
    try:
        dealt = batches(work.staged)
    except TransferError:
        return
    staging = HostStaging()
    ctypes.memset(staging.address, 1, SLOT_BYTES)
    for batch in dealt:
        assert all(0 <= offset < SLOT_BYTES for offset in batch.offsets.tolist())
        assert int(batch.offsets[-1]) + int(batch.remote[-1, 1]) <= SLOT_BYTES
        staging.place(0, batch.placements)


def test_the_regions_of_real_caches_are_believed() -> None:
    for tokens in (16, 32):
        check_regions(Cache(tokens).regions)


# --- messages -----------------------------------------------------------------------------------------------------

strips = st.lists(st.builds(Strip, small | numbers, small | numbers, st.lists(small | numbers, max_size=5)), max_size=3)
orders = st.sampled_from([OrderId("o"), OrderId("other")])
said = st.one_of(
    st.builds(Announce, orders, small | numbers, strips, st.booleans(), small, small),
    st.builds(Announce, orders, st.integers(0, 3), strips, st.booleans()),
    st.builds(Renewed, orders, small | numbers, st.booleans()),
    st.builds(Renewed, orders, st.integers(1, 2), st.just(value=True)),
    st.builds(Dropped, orders, st.text(max_size=3)),
    st.builds(Done, orders),
    st.builds(Ack, orders, st.lists(small, max_size=2)),
)
story = st.lists(
    st.tuples(st.sampled_from(["say", "say", "say", "read", "fail", "time", "cancel"]), st.integers(0, 1), said),
    max_size=30,
)


@dataclass
class Reading:
    """A rank that reads one order along two strands, one half of the heads each."""

    sizes: tuple[int, int]
    exchange: Exchange = field(default_factory=Exchange)
    now_ms: float = 0.0
    running: list[ReadFrom] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    drained: list[Drained] = field(default_factory=list)
    read: list[ReadFrom] = field(default_factory=list)

    def do(self, acts: Sequence[Act]) -> None:
        for act in acts:
            match act:
                case ReadFrom():
                    self.running.append(act)
                    self.read.append(act)
                case Outcome():
                    self.outcomes.append(act)
                case Drained():
                    self.drained.append(act)

    def end_read(self, which: int, ok: bool) -> None:
        if self.running:
            act = self.running.pop(which % len(self.running))
            self.do(self.exchange.read_finished(act.strand, act.read.seq, 64, ok, self.now_ms))

    def happens(self, what: str, which: int, message: PeerMessage) -> None:
        match what:
            case "say":
                self.do(self.exchange.from_source(ENDPOINTS[which], message, self.now_ms))
            case "read" | "fail":
                self.end_read(which, what == "read")
            case "time":
                self.pass_time(LEASE_MS / 5)
            case "cancel":
                self.do(self.exchange.failed(OrderId("other"), "cancelled", self.now_ms))

    def pass_time(self, ms: float) -> None:
        self.now_ms += ms
        self.do(self.exchange.tick(self.now_ms))


@settings(max_examples=400)
@given(sizes=st.sampled_from([(16, 16), (32, 16), (16, 32)]), early=st.integers(0, 3), events=story)
def test_whatever_is_announced_an_order_ends_once_and_reads_only_what_it_asked_for(
    sizes: tuple[int, int], early: int, events: list[tuple[str, int, PeerMessage]]
) -> None:
    reading, (ours, theirs) = Reading(sizes), sizes
    blocks = (2, 3, 5)
    wanted = Wanted(0, 0b111, ours, theirs, 0, ours * 3 - 1, 0, blocks)
    halves = [HeadSlice(0, 0, 2), HeadSlice(0, 2, 2)]
    expected = [
        Expect(endpoint, Epoch(1), 0, OrderSpec(OrderId("o"), RequestId("r"), (wanted,), LEASE_MS, half))
        for endpoint, half in zip(ENDPOINTS, halves, strict=True)
    ]
    for event in events[:early]:
        reading.happens(*event)
    reading.do(reading.exchange.load(expected, reading.now_ms))
    for event in events[early:]:
        reading.happens(*event)
        bound_to(reading, blocks, ours // min(sizes), theirs // min(sizes))
    for _ in range(10):
        reading.pass_time(LEASE_MS / 3)
    (outcome,) = reading.outcomes
    assert set(outcome.missing) <= set(blocks) == set(outcome.blocks)
    still_read = {cell.local for act in reading.running for cell in act.read.cells}
    assert still_read <= set(outcome.quarantined)
    while reading.running:
        reading.end_read(0, ok=True)
    drained = [block for each in reading.drained for block in each.blocks]
    assert sorted(drained) == sorted(outcome.quarantined), "what is quarantined comes free, each as often as listed"
    assert not reading.exchange.busy


def bound_to(reading: Reading, blocks: tuple[int, ...], our_parts: int, their_parts: int) -> None:
    for strand in ENDPOINTS:
        reads = [act.read for act in reading.read if act.endpoint == strand]
        into = [
            (layer, cell.local, cell.local_part)
            for read in reads
            for cell in read.cells
            for layer in range(LAYERS)
            if read.first_layer <= layer and (layer < read.end_layer or not read.end_layer)
        ]
        assert len(set(into)) == len(into), "nothing is read twice"
        assert all(cell.local in blocks for read in reads for cell in read.cells)
        assert all(0 <= cell.local_part < our_parts for read in reads for cell in read.cells)
        assert all(0 <= cell.remote_part < their_parts for read in reads for cell in read.cells)


# --- a whole rank, over sockets -----------------------------------------------------------------------------------


@contextmanager
def rank() -> Iterator[tuple[PeerIo, Cache]]:
    cache, transport = Cache(16), FakeTransport("destination")
    settings_ = PeerSettings(Caller(EngineId("d"), Epoch(1), 0), "same", Geometry(), "127.0.0.1", Seal(None))
    io = PeerIo(settings_, CacheAccess(transport, cache.regions, HostStaging, lambda: None), MonotonicClock())
    io.start()
    try:
        yield io, cache
    finally:
        io.close()


@contextmanager
def liar() -> Iterator[tuple[SourceEndpoint, Callable[[Sequence[bytes]], None]]]:
    """A rank that answers whoever dials it with frames of our choice."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        port = socket.bind_to_random_port("tcp://127.0.0.1")

        def answer(frames: Sequence[bytes]) -> None:
            assert socket.poll(60_000)
            identity, _ = socket.recv_multipart()
            for frame in frames:
                socket.send_multipart([identity, frame])

        yield SourceEndpoint(f"tcp://127.0.0.1:{port}"), answer


REMOTE = Cache(16)
"""What is truly there."""


def greeting(**changes: Any) -> bytes:
    plain = Greeting(EngineId("s"), Epoch(1), "same", b"agent", REMOTE.regions, REMOTE.memory.ctypes.data)
    return encode(msgspec.structs.replace(plain, **changes))


def regions(**changes: Any) -> Regions:
    return msgspec.structs.replace(REMOTE.regions, **changes)


ANNOUNCE = encode(Announce(OrderId("o"), 0, [Strip(0, 0, [1])], last=True))
LIES: dict[str, list[bytes]] = {
    "nothing of ours": [b"", b"\x00", bytes(100)],
    "another protocol": [bytes((99, 0)) + b"\x90"],
    "a refusal": [encode(Refused("go away"))],
    "no greeting": [ANNOUNCE],
    "no agent": [greeting(agent=b""), ANNOUNCE],
    "an agent that is no text": [greeting(agent=b"\xff\xfe"), ANNOUNCE],
    "an address below all": [greeting(scratch=-1), ANNOUNCE],
    "an address above all": [greeting(scratch=2**64 - 1), ANNOUNCE],
    "uneven regions": [greeting(regions=regions(bases=[1])), ANNOUNCE],
    "no regions": [greeting(regions=Regions([], [], [], [], [], [], [], 0, 0, "DRAM")), ANNOUNCE],
    "a kind that is not there": [greeting(regions=regions(kinds=[7] * LAYERS)), ANNOUNCE],
    "blocks without end": [greeting(regions=regions(num_blocks=2**63)), ANNOUNCE],
    "another life": [greeting(epoch=9), ANNOUNCE],
    "a block that is not there": [greeting(), encode(Announce(OrderId("o"), 0, [Strip(0, 0, [BLOCKS])], last=True))],
    "a block of a negative number": [greeting(), encode(Announce(OrderId("o"), 0, [Strip(0, 0, [-1])], last=True))],
}


@pytest.mark.parametrize("frames", LIES.values(), ids=LIES)
def test_a_rank_that_lies_fails_its_own_orders_and_nothing_else(frames: list[bytes]) -> None:
    with rank() as (io, cache), liar() as (endpoint, answer):
        wanted = Wanted(0, (1 << LAYERS) - 1, 16, 16, 0, 16, 0, (3,))
        spec = OrderSpec(OrderId("o"), RequestId("r"), (wanted,), 300)
        io.submit([Load((Expect(endpoint, Epoch(1), 0, spec),))])
        answer(frames)
        outcome = None
        deadline = time.monotonic() + 60
        while outcome is None:
            assert time.monotonic() < deadline
            io.wait(50)
            io.check()
            report = io.take()
            outcome = next(iter(report.outcomes), None) if report else None
        assert outcome.reason is not None
        assert outcome.missing == (3,)
        assert not cache.written()
        io.check()


def test_a_caller_that_lies_is_refused_and_the_rank_goes_on() -> None:
    with rank() as (io, _), zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(io.endpoint)
        for frame in (b"", b"\x01", bytes(64), ANNOUNCE, greeting()):
            socket.send(frame)
            assert socket.poll(60_000)
            assert isinstance(decode_peer(socket.recv()), Refused)
        io.check()
