"""Two worker ranks over real ZeroMQ sockets, with the shipped fake for the bytes."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
import zmq

from vllm_llmd.clock import MonotonicClock
from vllm_llmd.kv_connector.delivery import SourceEndpoint
from vllm_llmd.kv_connector.exchange import Caller, Expect
from vllm_llmd.kv_connector.layout import LayerView, Memory, TensorView, pack_regions
from vllm_llmd.kv_connector.lifecycle import CANCELLED, OrderSpec, Wanted
from vllm_llmd.kv_connector.own_ranks import NUDGE, OwnRanks, RankIntroduction
from vllm_llmd.kv_connector.peer_io import CacheAccess, PeerIo
from vllm_llmd.kv_connector.peer_sockets import PeerSettings
from vllm_llmd.kv_connector.report import WorkerReport
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.staging import HostStaging
from vllm_llmd.kv_connector.steps import Fail, Load, PlannedRange, Reader, Ready, Withdraw
from vllm_llmd.kv_connector.transport import ReadPlan
from vllm_llmd.names import EngineId, Epoch, OrderId, RequestId
from vllm_llmd.testing.transport import FakeTransport
from vllm_llmd.wire import Announce, EngineInfo, Geometry, Members, Refused, Renew, Strip, decode_peer, encode

BLOCKS, BLOCK_BYTES = 8, 64
LONG_MS = 120_000
"""A lease that nobody outlives, however slow the machine."""
SHORT_MS = 400
GRACE_MS = 6000
"""For half of it, a failed order waits for reads that have begun."""

SCRATCH = 64
DEADLINE_S = 60.0


@dataclass
class Rank:
    """A rank with memory of its own; `seen` gathers its reports."""

    name: str
    fingerprint: str = "same"
    secret: str | None = None
    epoch: int = 1
    seen: WorkerReport = field(default_factory=WorkerReport)

    def __post_init__(self) -> None:
        self.memory: npt.NDArray[np.uint8] = np.zeros((BLOCKS, BLOCK_BYTES), dtype=np.uint8)
        tensor = TensorView(self.memory.ctypes.data, self.memory.shape, (BLOCK_BYTES, 1), 1)
        regions = pack_regions([LayerView(0, 0, tensor, "opaque")], Memory(BLOCKS, "DRAM", 0))
        self.transport = FakeTransport(self.name)
        self.caller = Caller(EngineId(self.name), Epoch(self.epoch), 0)
        settings = PeerSettings(self.caller, self.fingerprint, Geometry(), "127.0.0.1", Seal(self.secret))
        self.io = PeerIo(settings, CacheAccess(self.transport, regions, HostStaging, lambda: None), MonotonicClock())
        self.io.start()

    def hold(self, plan_bytes: int) -> threading.Event:
        """Reads of more bytes do not end; the first of them sets the event."""
        held = threading.Event()

        def holds(plan: ReadPlan) -> bool:
            if plan.bytes > plan_bytes:
                held.set()
            return plan.bytes > plan_bytes

        self.transport.hold = holds
        return held

    def until(self, what: Callable[[WorkerReport], bool]) -> WorkerReport:
        deadline = time.monotonic() + DEADLINE_S
        while not what(self.seen):
            assert time.monotonic() < deadline, f"{self.name} saw only {self.seen}"
            self.io.wait(50)
            self.seen = self.seen.merge(self.io.take() or WorkerReport())
        return self.seen


@pytest.fixture
def ranks() -> Iterator[Callable[..., Rank]]:
    made: list[Rank] = []

    def make(*args: object, **kwargs: object) -> Rank:
        made.append(Rank(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for rank in made:
        rank.io.close()


def load(
    source: Rank, order: str = "o", blocks: tuple[int, ...] = (1, 2, 3), epoch: int = 1, lease_ms: int = LONG_MS
) -> Load:
    wanted = Wanted(0, 1, 32, 32, 0, 32 * len(blocks), 0, blocks)
    spec = OrderSpec(OrderId(order), RequestId(f"r-{order}"), (wanted,), lease_ms)
    return Load((Expect(SourceEndpoint(source.io.endpoint), Epoch(epoch), 0, spec),))


def reader(rank: Rank) -> Reader:
    return Reader(rank.caller.engine, rank.caller.epoch, 1)


def ready(
    to: Rank, seq: int, first: int, blocks: list[int], last: bool, order: str = "o", lease_ms: int = LONG_MS
) -> Ready:
    message = Announce(OrderId(order), seq, [Strip(0, first, blocks)], last)
    return Ready((PlannedRange(reader(to), message, lease_ms),), lambda: True)


def wait_until(what: Callable[[], bool]) -> None:
    give_up = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def test_announced_ranges_are_read_and_unpinned(ranks: Callable[..., Rank]) -> None:
    source, destination = ranks("source"), ranks("destination")
    source.memory[:] = np.arange(BLOCKS, dtype=np.uint8)[:, None]
    destination.io.submit([load(source)])
    source.io.submit([ready(destination, 0, 0, [5, 6], last=False)])
    source.io.submit([ready(destination, 1, 2, [7], last=True)])
    (outcome,) = destination.until(lambda seen: bool(seen.outcomes)).outcomes
    assert (outcome.reason, outcome.missing, len(outcome.arrivals)) == (None, (), 2)
    assert destination.memory[1:4, 0].tolist() == [5, 6, 7]
    assert destination.seen.bytes_read == 3 * BLOCK_BYTES
    assert source.until(lambda seen: len(seen.unpinned) == 2).unpinned == {("o", 0): 1, ("o", 1): 1}


def test_an_announcement_that_overtakes_its_load_is_kept(ranks: Callable[..., Rank]) -> None:
    source, destination = ranks("source"), ranks("destination")
    destination.io.submit([load(source, "first", (4,))])
    source.io.submit([ready(destination, 0, 0, [1], last=True, order="first")])
    destination.until(lambda seen: bool(seen.outcomes))
    source.io.submit([ready(destination, 0, 0, [1, 2, 3], last=True)])
    destination.io.submit([load(source)])
    outcomes = destination.until(lambda seen: len(seen.outcomes) == 2).outcomes
    assert [outcome.reason for outcome in outcomes] == [None, None]


def test_a_range_is_announced_only_after_its_step_has_passed(ranks: Callable[..., Rank]) -> None:
    source, destination = ranks("source"), ranks("destination")
    passed, asked = False, 0

    def has_passed() -> bool:
        nonlocal asked
        asked += 1
        return passed

    destination.io.submit([load(source, blocks=(1,))])
    (planned,) = ready(destination, 0, 0, [5], last=True).ranges
    source.io.submit([Ready((planned,), has_passed)])
    wait_until(lambda: asked > 20)
    assert destination.io.take() is None
    source.memory[5] = 9
    passed = True
    destination.until(lambda seen: bool(seen.outcomes))
    assert destination.memory[1, 0] == 9


def test_a_withdrawn_order_fails_with_its_reason(ranks: Callable[..., Rank]) -> None:
    source, destination = ranks("source"), ranks("destination")
    destination.io.submit([load(source)])
    source.io.submit([Withdraw(reader(destination), OrderId("o"), "refused: too late")])
    (outcome,) = destination.until(lambda seen: bool(seen.outcomes)).outcomes
    assert (outcome.reason, outcome.missing) == ("refused: too late", (1, 2, 3))


def test_what_arrived_before_a_failure_is_kept(ranks: Callable[..., Rank]) -> None:
    source, destination = ranks("source"), ranks("destination")
    destination.io.submit([load(source)])
    source.io.submit([ready(destination, 0, 0, [5, 6], last=False)])
    source.until(lambda seen: bool(seen.unpinned))
    destination.io.submit([Fail(OrderId("o"), "source unreachable")])
    (outcome,) = destination.until(lambda seen: bool(seen.outcomes)).outcomes
    assert outcome.missing == (3,)


def test_a_cancelled_order_lets_its_source_unpin(ranks: Callable[..., Rank]) -> None:
    source, destination = ranks("source"), ranks("destination")
    held = destination.hold(BLOCK_BYTES)
    destination.io.submit([load(source)])
    source.io.submit([ready(destination, 0, 0, [5, 6], last=False)])
    assert held.wait(DEADLINE_S)
    destination.io.submit([Fail(OrderId("o"), CANCELLED)])
    destination.transport.hold = lambda plan: False
    (outcome,) = destination.until(lambda seen: bool(seen.outcomes)).outcomes
    assert outcome.reason == CANCELLED
    source.until(lambda seen: bool(seen.unpinned))


def test_a_read_that_never_ends_quarantines_its_blocks_until_it_does(ranks: Callable[..., Rank]) -> None:
    source, destination = ranks("source"), ranks("destination")
    held = destination.hold(SCRATCH)
    destination.io.submit([load(source, lease_ms=GRACE_MS)])
    source.io.submit([ready(destination, 0, 0, [5, 6], last=False)])
    assert held.wait(DEADLINE_S)
    destination.io.submit([Fail(OrderId("o"), "source stalled")])
    (outcome,) = destination.until(lambda seen: bool(seen.outcomes)).outcomes
    assert outcome.quarantined == (1, 2)
    assert outcome.missing == (1, 2, 3)
    destination.transport.hold = lambda plan: False
    (drained,) = destination.until(lambda seen: bool(seen.drained)).drained
    assert drained.blocks == (1, 2)


def test_a_failed_read_fails_the_order_and_keeps_the_rest(ranks: Callable[..., Rank]) -> None:
    source, destination = ranks("source"), ranks("destination")
    destination.transport.fail = lambda plan: plan.bytes == 2 * BLOCK_BYTES
    destination.io.submit([load(source, blocks=(1, 2, 3, 4))])
    source.io.submit([ready(destination, 0, 0, [5], last=False)])
    source.until(lambda seen: bool(seen.unpinned))
    source.io.submit([ready(destination, 1, 1, [6, 7], last=False)])
    (outcome,) = destination.until(lambda seen: bool(seen.outcomes)).outcomes
    assert (outcome.reason, outcome.missing) == ("read failed", (2, 3, 4))


def test_a_silent_source_stalls_the_order(ranks: Callable[..., Rank]) -> None:
    source, destination = ranks("source"), ranks("destination")
    command = load(source, lease_ms=SHORT_MS)
    source.io.close()
    destination.io.submit([command])
    (outcome,) = destination.until(lambda seen: bool(seen.outcomes)).outcomes
    assert outcome.reason == "source stalled"


def test_pins_of_a_vanished_destination_are_released(ranks: Callable[..., Rank]) -> None:
    source, destination = ranks("source"), ranks("destination")
    held = destination.hold(SCRATCH)
    destination.io.submit([load(source)])
    source.io.submit([ready(destination, 0, 0, [5, 6], last=False, lease_ms=SHORT_MS)])
    assert held.wait(DEADLINE_S)
    destination.io.close()
    source.until(lambda seen: seen.unpinned == {("o", 0): 1})


def test_a_restarted_destination_frees_what_its_former_life_ordered(ranks: Callable[..., Rank]) -> None:
    source, former = ranks("source"), ranks("destination")
    held = former.hold(SCRATCH)
    former.io.submit([load(source)])
    source.io.submit([ready(former, 0, 0, [5, 6], last=False)])
    assert held.wait(DEADLINE_S)
    later = ranks("destination", epoch=2)
    later.io.submit([load(source, "another")])
    source.until(lambda seen: seen.unpinned == {("o", 0): 1})


def test_an_order_for_a_former_life_of_the_source_fails(ranks: Callable[..., Rank]) -> None:
    source, destination = ranks("source", epoch=2), ranks("destination")
    destination.io.submit([load(source, "warm", (1,), epoch=2)])
    source.io.submit([ready(destination, 0, 0, [5], last=True, order="warm")])
    destination.until(lambda seen: bool(seen.outcomes))
    destination.io.submit([load(source, epoch=1)])
    outcomes = destination.until(lambda seen: len(seen.outcomes) == 2).outcomes
    assert outcomes[-1].reason == "source restarted"


@pytest.mark.parametrize(
    ("theirs", "words"), [({"fingerprint": "other"}, "another kind"), ({"secret": "wrong"}, "secret")]
)
def test_a_stranger_is_refused(ranks: Callable[..., Rank], theirs: dict[str, str], words: str) -> None:
    source, destination = ranks("source", secret="right"), ranks("destination", **{"secret": "right", **theirs})
    destination.io.submit([load(source)])
    (outcome,) = destination.until(lambda seen: bool(seen.outcomes)).outcomes
    assert outcome.reason is not None
    assert words in outcome.reason


def test_a_message_before_any_greeting_and_one_of_another_version_are_refused(ranks: Callable[..., Rank]) -> None:
    source = ranks("source")
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(source.io.endpoint)
        for frame, words in ((encode(Renew(OrderId("o"), 1)), "greet first"), (b"\x09\x00\x90", "protocol 9.0")):
            socket.send(frame)
            assert socket.poll(DEADLINE_S * 1000)
            answer = decode_peer(socket.recv())
            assert isinstance(answer, Refused)
            assert words in answer.reason


def test_the_membership_makes_a_rank_connect_before_the_first_order(ranks: Callable[..., Rank]) -> None:
    source, destination = ranks("source"), ranks("destination")
    warmed: list[int] = []
    destination.transport.hold = lambda plan: bool(warmed.append(plan.bytes))
    info = EngineInfo(EngineId("source"), Epoch(1), "both", "", [], 1, 1, 1, "same", [source.io.endpoint])
    own = OwnRanks([RankIntroduction(destination.io.endpoint, Epoch(1), destination.io.own_key)])
    own.members_changed({info.id: info})
    wait_until(lambda: bool(warmed))
    own.close()
    assert warmed == [SCRATCH]


@pytest.mark.parametrize("identity", [b"link", b"0" * 32])
def test_nobody_else_can_pass_a_membership_on_or_nudge(ranks: Callable[..., Rank], identity: bytes) -> None:
    rank = ranks("rank")
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.setsockopt(zmq.IDENTITY, identity)
        socket.connect(rank.io.endpoint)
        for frame in (encode(Members([])), NUDGE):
            socket.send(frame)
            assert socket.poll(DEADLINE_S * 1000)
            assert isinstance(decode_peer(socket.recv()), Refused)
    assert not rank.io.take_nudge()


def test_a_nudge_is_nothing_to_report(ranks: Callable[..., Rank]) -> None:
    rank = ranks("rank")
    own = OwnRanks([RankIntroduction(rank.io.endpoint, Epoch(1), rank.io.own_key)])
    own.nudge()
    rank.io.wait(DEADLINE_S * 1000)
    own.close()
    assert (rank.io.take(), rank.io.take_nudge(), rank.io.take_nudge()) == (None, True, False)
