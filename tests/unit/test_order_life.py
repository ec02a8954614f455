"""Both ends of orders, driven through random interleavings: never a wrong block, nothing leaked, every order ends.

The model is the harshest world the protocol allows: messages are delayed, repeated and reordered; the two clocks run
at different speeds; whatever the source unpins is overwritten at once; a read returns what lies there when it ends.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_llmd.kv_connector.exchange import Act, Caller, Exchange, ReadFrom, SourceEndpoint, ToDestination, ToSource
from vllm_llmd.kv_connector.lifecycle import Drained, OrderSpec, Outcome, Unpin
from vllm_llmd.names import EngineId, Epoch, OrderId, RequestId
from vllm_llmd.wire import Announce, PeerMessage

LEASE_MS = 1000.0
SOURCE = SourceEndpoint("tcp://source")
CALLER = Caller(EngineId("destination"), Epoch(1), 0)


RARELY = st.sampled_from([False, False, False, False, False, True])


@dataclass
class Order:
    """What the model knows of one order. Block `i` of the prompt rightly holds `(order, i)`."""

    id: OrderId
    blocks: int
    local: tuple[int, ...]
    ready: int = 0
    seqs: int = 0
    withdrawn: bool = False
    outcome: Outcome | None = None
    quarantined: set[int] = field(default_factory=set)


class TwoEnds(RuleBasedStateMachine):
    """A destination and a source with a lossy-ordered network between them."""

    @initialize(drift=st.sampled_from([0.93, 1.0, 1.07]))
    def start(self, drift: float) -> None:
        self.destination, self.source = Exchange(), Exchange()
        self.now, self.drift = 0.0, drift
        self.orders: dict[OrderId, Order] = {}
        self.to_source: list[PeerMessage] = []
        self.to_destination: list[PeerMessage] = []
        self.reads: list[ReadFrom] = []
        self.source_memory: dict[int, object] = {}
        self.local_memory: dict[int, object] = {}
        self.pinned: dict[tuple[OrderId, int], tuple[int, ...]] = {}
        self.next_block = 0
        self.obey(self.source.greeted(CALLER))

    # --- clocks: the destination's is the true one, the source's runs at another speed -----------------------

    @property
    def source_now(self) -> float:
        return 5000 + self.now * self.drift

    def new_blocks(self, count: int) -> tuple[int, ...]:
        self.next_block += count
        return tuple(range(self.next_block - count, self.next_block))

    def obey(self, acts: list[Act]) -> None:
        for act in acts:
            match act:
                case ToSource(_, message):
                    self.to_source.append(message)
                case ToDestination(_, message):
                    self.to_destination.append(message)
                case ReadFrom():
                    self.reads.append(act)
                case Unpin(order, seqs):
                    for seq in seqs:
                        for block in self.pinned.pop((order, seq)):
                            self.source_memory[block] = "overwritten"
                case Outcome():
                    self.check_outcome(act)
                case Drained(order, blocks):
                    self.orders[order].quarantined -= set(blocks)

    def check_outcome(self, outcome: Outcome) -> None:
        order = self.orders[outcome.order]
        assert order.outcome is None, "an outcome is reported once"
        order.outcome = outcome
        order.quarantined = set(outcome.quarantined)
        assert order.quarantined <= set(outcome.missing)
        assert (outcome.reason is None) == (not outcome.missing)
        for index, block in enumerate(order.local):
            if block not in outcome.missing:
                assert self.local_memory[block] == (order.id, index), "an accepted block holds what it should"
        in_flight = {pair.local for read in self.reads for pair in read.read.pairs if read.read.order == order.id}
        assert in_flight <= order.quarantined, "a block that may still change is quarantined"

    # --- what can happen --------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.orders) < 3)
    @rule(blocks=st.integers(1, 6))
    def place(self, blocks: int) -> None:
        order = Order(OrderId(f"o{len(self.orders)}"), blocks, self.new_blocks(blocks))
        self.orders[order.id] = order
        spec = OrderSpec(order.id, RequestId(order.id), 0, order.local, LEASE_MS)
        self.obey(self.destination.load(SOURCE, spec, self.now))

    @precondition(lambda self: any(o.ready < o.blocks and not o.withdrawn for o in self.orders.values()))
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        order = data.draw(st.sampled_from([o for o in self.orders.values() if o.ready < o.blocks and not o.withdrawn]))
        count = data.draw(st.integers(1, order.blocks - order.ready))
        blocks = self.new_blocks(count)
        for i, block in enumerate(blocks):
            self.source_memory[block] = (order.id, order.ready + i)
        self.pinned[order.id, order.seqs] = blocks
        last = order.ready + count == order.blocks
        announce = Announce(order.id, order.seqs, order.ready, list(blocks), last)
        order.ready += count
        order.seqs += 1
        self.obey(self.source.ready(CALLER, announce, LEASE_MS, self.source_now))

    @precondition(lambda self: any(o.ready < o.blocks and not o.withdrawn for o in self.orders.values()))
    @rule(data=st.data(), sure=RARELY)
    def source_gives_up(self, data: st.DataObject, sure: bool) -> None:
        if not sure:
            return
        order = data.draw(st.sampled_from([o for o in self.orders.values() if o.ready < o.blocks and not o.withdrawn]))
        order.withdrawn = True
        self.obey(self.source.withdrawn(CALLER, order.id, "aborted"))

    @precondition(lambda self: self.orders)
    @rule(data=st.data(), reason=st.sampled_from(["cancelled", "source unreachable"]), sure=RARELY)
    def destination_gives_up(self, data: st.DataObject, reason: str, sure: bool) -> None:
        if sure:
            self.obey(self.destination.failed(data.draw(st.sampled_from(sorted(self.orders))), reason, self.now))

    @precondition(lambda self: self.to_source)
    @rule(data=st.data(), again=st.booleans())
    def source_hears(self, data: st.DataObject, again: bool) -> None:
        message = self.pick(data, self.to_source, again)
        self.obey(self.source.from_destination(CALLER, message, self.source_now))

    @precondition(lambda self: self.to_destination)
    @rule(data=st.data(), again=st.booleans())
    def destination_hears(self, data: st.DataObject, again: bool) -> None:
        message = self.pick(data, self.to_destination, again)
        self.obey(self.destination.from_source(SOURCE, message, self.now))

    def pick(self, data: st.DataObject, queue: list[PeerMessage], again: bool) -> PeerMessage:
        index = data.draw(st.integers(0, len(queue) - 1))
        return queue[index] if again else queue.pop(index)

    @precondition(lambda self: self.reads)
    @rule(data=st.data(), ok=RARELY.map(lambda rare: not rare))
    def read_ends(self, data: st.DataObject, ok: bool) -> None:
        act = self.reads.pop(data.draw(st.integers(0, len(self.reads) - 1)))
        for pair in act.read.pairs:
            self.local_memory[pair.local] = self.source_memory[pair.remote] if ok else "torn"
        self.obey(self.destination.read_finished(act.read.order, act.read.seq, ok, self.now))

    @rule(
        ms=st.sampled_from([1.0, 300.0, 600.0, 1500.0]), who=st.sampled_from(["both", "source", "destination", "none"])
    )
    def time_passes(self, ms: float, who: str) -> None:
        """Either side may be too busy to notice."""
        self.now += ms
        if who in ("both", "source"):
            self.obey(self.source.tick(self.source_now))
        if who in ("both", "destination"):
            self.obey(self.destination.tick(self.now))

    # --- what must hold ---------------------------------------------------------------------------------------

    @invariant()
    def an_order_that_is_over_never_brings_back_its_blocks(self) -> None:
        for order in getattr(self, "orders", {}).values():
            if order.outcome is not None:
                in_flight = {p.local for read in self.reads for p in read.read.pairs if read.read.order == order.id}
                assert in_flight <= order.quarantined

    @invariant()
    def a_source_helps_whoever_may_be_reading(self) -> None:
        """Over some wires a read ends only if its source takes part."""
        if getattr(self, "reads", None):
            assert self.source.being_read or self.source.lingering

    def teardown(self) -> None:
        """Let everything run out: then every order has ended, nothing is pinned and nothing is in quarantine."""
        if not hasattr(self, "orders"):
            return
        for _ in range(12):
            self.time_passes(LEASE_MS / 2, "both")
            while self.to_source:
                self.obey(self.source.from_destination(CALLER, self.to_source.pop(0), self.source_now))
            while self.to_destination:
                self.obey(self.destination.from_source(SOURCE, self.to_destination.pop(0), self.now))
            for act in self.reads[:]:
                self.reads.remove(act)
                self.obey(self.destination.read_finished(act.read.order, act.read.seq, False, self.now))
        for order in self.orders.values():
            assert order.outcome is not None or (order.ready < order.blocks and not order.withdrawn)
            assert not order.quarantined
        for order in self.orders.values():
            self.obey(self.destination.failed(order.id, "cancelled", self.now))
        self.time_passes(2 * LEASE_MS, "both")
        while self.to_source:
            self.obey(self.source.from_destination(CALLER, self.to_source.pop(0), self.source_now))
        assert all(order.outcome is not None for order in self.orders.values())
        assert not self.pinned
        assert not self.destination.busy
        assert not self.source.busy
        assert not self.source.lingering


TestTwoEnds = TwoEnds.TestCase
TestTwoEnds.settings = settings(max_examples=600, stateful_step_count=50, deadline=None)
