"""All stories of orders, told at random: engines of any cut, a network that repeats and reorders, clocks that drift.

Both ends run the real code below the sockets: `Serving`, `PinBook` and `Exchange` at the source, `Exchange` at the
destination. The model holds what every byte of every block should be, and who may still write it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_llmd.kv_connector.delivery import SourceEndpoint
from vllm_llmd.kv_connector.exchange import Act, Caller, Exchange, Expect, ReadFrom, ToDestination, ToSource
from vllm_llmd.kv_connector.lifecycle import CANCELLED, Drained, OrderSpec, Outcome, Unpin, Wanted
from vllm_llmd.kv_connector.orders import ORDER_KEY
from vllm_llmd.kv_connector.placing import OrderPolicy
from vllm_llmd.kv_connector.room import Room
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.serving import PinBook, Serving, Streaming
from vllm_llmd.kv_connector.steps import PlannedRange, StepPlan
from vllm_llmd.kv_connector.ticket import Ticket
from vllm_llmd.kv_connector.topology import edges, readers_of, sources_of
from vllm_llmd.names import EngineId, Epoch, OrderId, RequestId
from vllm_llmd.testing.clock import FakeClock
from vllm_llmd.testing.pool import FakeBlock, FakePool
from vllm_llmd.wire import Geometry, GroupShape, PeerMessage

LEASE_MS = 1000.0
HEADS, LAYERS, POOL = 2, 2, 24
DESTINATION = EngineId("d")

RARELY = st.sampled_from([False, False, False, False, False, True])

Value = tuple[str, int, int, int] | str
"""What one head of one token of one layer holds: the prompt, the token, the layer and the head, or rubbish."""


class Memory:
    """What the blocks of one engine hold; a missing value has never been written."""

    def __init__(self) -> None:
        self.values: dict[tuple[int, int, int, int], Value] = {}

    def spoil(self, block: int) -> None:
        """Nobody holds the block any more: from now on it may hold anything."""
        for key in self.values:
            if key[0] == block:
                self.values[key] = "reused"


@dataclass
class Request:
    """A request as the source's vLLM holds it."""

    request_id: str
    prompt: str
    num_prompt_tokens: int
    kv_transfer_params: dict[str, Any]
    blocks: list[FakeBlock] = field(default_factory=list)
    num_computed_tokens: int = 0
    lora_request: None = None


class SourceEngine(FakePool):
    """One source, in one life: its requests, its pool, and a post office per rank."""

    def __init__(self, name: str, epoch: int, tp: int, block_size: int, by_layer: bool, clock: FakeClock) -> None:
        self.name, self.epoch, self.tp, self.block_size, self.clock = name, Epoch(epoch), tp, block_size, clock
        self.memory = Memory()
        self.pool = [FakeBlock(i) for i in range(POOL)]
        self.requests: dict[str, Request] = {}
        geometry = Geometry(tp, HEADS, "cells", [GroupShape(block_size, LAYERS)])
        policy = OrderPolicy(
            EngineId(name), self.epoch, "same", geometry, (3,), block_size, True, 1, int(LEASE_MS), Seal(None)
        )
        self.pins = PinBook(self)
        self.serving = Serving(policy, self, self.pins, Room(POOL), clock)
        self.serving.streaming = Streaming(by_layer, LAYERS, 1 << 20)
        self.ranks = [Exchange() for _ in range(tp)]

    def blocks_of(self, request_id: str) -> tuple[list[FakeBlock], ...]:
        return (self.requests[request_id].blocks,)

    def freed(self, block: FakeBlock) -> None:
        self.memory.spoil(block.block_id)

    def allocate(self, request: Request, tokens: int) -> bool:
        """Blocks for so many tokens in all."""
        missing = -(-tokens // self.block_size) - len(request.blocks)
        free = [block for block in self.pool if not block.refs]
        if missing > len(free):
            return False
        for block in free[: max(missing, 0)]:
            self.pin([block])
            request.blocks.append(block)
        return True

    def release(self, request: Request) -> None:
        self.unpin(request.blocks)
        request.blocks.clear()

    def write(self, request: Request, tokens: range) -> None:
        for token in tokens:
            block = request.blocks[token // self.block_size].block_id
            for layer in range(LAYERS):
                for head in range(HEADS):
                    value = (request.prompt, token, layer, head)
                    self.memory.values[block, token % self.block_size, layer, head] = value


@dataclass
class Part:
    """One order of a load."""

    order: OrderId
    source: SourceEngine
    first: int
    end: int
    arrived: bool = False


@dataclass
class Load:
    """What the model knows of one request at the destination."""

    request: RequestId
    tokens: int
    blocks: tuple[int, ...]
    parts: list[Part]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    quarantined: Counter[tuple[int, int]] = field(default_factory=Counter)


class EnginesThatOrder(RuleBasedStateMachine):
    """A destination, two sources, and a network between them that repeats, delays and reorders."""

    @initialize(
        drift=st.sampled_from([0.93, 1.0, 1.07]),
        source_tp=st.sampled_from([1, 2]),
        destination_tp=st.sampled_from([1, 2]),
        sizes=st.sampled_from([(2, 2), (2, 4), (4, 2)]),
        by_layer=st.booleans(),
    )
    def start(self, drift: float, source_tp: int, destination_tp: int, sizes: tuple[int, int], by_layer: bool) -> None:
        self.now, self.drift = 0.0, drift
        self.tp, self.epoch = destination_tp, 1
        self.source_size, self.size = sizes
        self.edges = edges(source_tp, destination_tp, HEADS)
        self.clocks = [FakeClock(5000.0), FakeClock(9000.0)]
        self.sources = [SourceEngine(f"s{i}", 1, source_tp, sizes[0], by_layer, self.clocks[i]) for i in range(2)]
        self.dead: list[SourceEngine] = []
        self.loads: dict[RequestId, Load] = {}
        self.next_block = 0
        self.count = 0
        self.begin_life()

    def begin_life(self) -> None:
        """The destination is new: nothing is on its way to it, and the sources hear it greet."""
        self.ranks = [Exchange() for _ in range(self.tp)]
        self.memory: list[dict[tuple[int, int, int, int], Value]] = [{} for _ in range(self.tp)]
        self.to_source: list[tuple[SourceEngine, int, int, PeerMessage]] = []
        self.to_destination: list[tuple[SourceEngine, int, int, PeerMessage]] = []
        self.reads: list[tuple[int, ReadFrom]] = []
        for source in self.sources:
            self.greet(source)

    def greet(self, source: SourceEngine) -> None:
        for edge in self.edges:
            self.at_source(source, edge.source, source.ranks[edge.source].greeted(self.caller(edge.destination)))

    def caller(self, rank: int) -> Caller:
        return Caller(DESTINATION, Epoch(self.epoch), rank)

    # --- carrying out what either side decides ------------------------------------------------------------------

    def at_source(self, source: SourceEngine, rank: int, acts: list[Act]) -> None:
        for act in acts:
            match act:
                case ToDestination(caller, message) if caller.epoch == self.epoch:
                    self.to_destination.append((source, rank, caller.rank, message))
                case Unpin(order, seqs):
                    source.pins.release(Counter({(order, seq): 1 for seq in seqs}))

    def at_destination(self, rank: int, acts: list[Act]) -> None:
        for act in acts:
            match act:
                case ToSource(endpoint, message):
                    found = self.source_at(endpoint)
                    if found is not None:
                        self.to_source.append((*found, rank, message))
                case ReadFrom():
                    self.reads.append((rank, act))
                case Outcome():
                    self.check_outcome(rank, act)
                case Drained(order, blocks):
                    load = next(load for load in self.loads.values() if order in [p.order for p in load.parts])
                    load.quarantined -= Counter({(rank, block): 1 for block in blocks})

    def endpoint(self, source: SourceEngine, rank: int) -> SourceEndpoint:
        return SourceEndpoint(f"{source.name}/{source.epoch}/{rank}")

    def source_at(self, endpoint: SourceEndpoint) -> tuple[SourceEngine, int] | None:
        """The living source at an endpoint; nobody answers for one whose life is over."""
        name, epoch, rank = endpoint.split("/")
        return next(
            ((source, int(rank)) for source in self.sources if (source.name, str(source.epoch)) == (name, epoch)), None
        )

    def check_outcome(self, rank: int, outcome: Outcome) -> None:
        load = self.loads[outcome.request]
        assert rank not in load.outcomes, "an outcome is reported once"
        load.outcomes[rank] = outcome
        load.quarantined += Counter((rank, block) for block in outcome.quarantined)
        assert set(outcome.quarantined) <= set(outcome.missing)
        assert (outcome.reason is None) == (not outcome.missing)
        for token in range(load.tokens):
            block = load.blocks[token // self.size]
            if block in outcome.missing:
                continue
            for layer in range(LAYERS):
                for head in self.heads(rank, self.tp):
                    held = self.memory[rank].get((block, token % self.size, layer, head))
                    assert held == (load.request, token, layer, head), "an accepted block holds what it should"
        assert self.in_flight(rank, load) <= {block for r, block in load.quarantined if r == rank}

    def in_flight(self, rank: int, load: Load) -> set[int]:
        orders = {part.order for part in load.parts}
        return {
            copy.local for r, act in self.reads if r == rank and act.read.order in orders for copy in act.read.cells
        }

    def heads(self, rank: int, tp: int) -> range:
        return range(rank * HEADS // tp, (rank + 1) * HEADS // tp)

    # --- what the destination does ------------------------------------------------------------------------------

    @precondition(lambda self: len(self.loads) < 3)
    @rule(tokens=st.integers(1, 12), cut=st.integers(0, 12))
    def place(self, tokens: int, cut: int) -> None:
        """Order a prompt: from one source, or the front from one and the rest from the other."""
        self.count += 1
        request = RequestId(f"r{self.count}")
        count = -(-tokens // self.size)
        blocks = tuple(range(self.next_block, self.next_block + count))
        self.next_block += count
        unit = max(self.size, self.source_size)
        cut = cut // unit * unit
        bounds = [0, cut, tokens] if 0 < cut < tokens else [0, tokens]
        parts = [
            Part(OrderId(f"{request}.{i}"), self.sources[(self.count + i) % 2], bounds[i], bounds[i + 1])
            for i in range(len(bounds) - 1)
        ]
        load = self.loads[request] = Load(request, tokens, blocks, parts)
        for rank in range(self.tp):
            self.at_destination(rank, self.ranks[rank].load(list(self.expected(load, rank)), self.now))

    def expected(self, load: Load, rank: int) -> Iterator[Expect]:
        for number, part in enumerate(load.parts):
            first = part.first // self.size
            blocks = load.blocks[first : -(-part.end // self.size)]
            wanted = Wanted(0, 3, self.size, self.source_size, part.first, part.end, first, blocks)
            for edge in sources_of(rank, self.edges):
                spec = OrderSpec(part.order, load.request, (wanted,), LEASE_MS, edge.heads)
                yield Expect(self.endpoint(part.source, edge.source), part.source.epoch, number, spec)

    @precondition(lambda self: any(not part.arrived for part in self.parts()))
    @rule(data=st.data())
    def order_arrives(self, data: st.DataObject) -> None:
        self.arrive(
            *data.draw(st.sampled_from([(x, p) for x in self.loads.values() for p in x.parts if not p.arrived]))
        )

    def arrive(self, load: Load, part: Part) -> None:
        part.arrived = True
        if part.source not in self.sources:
            self.fail(part.order, "source unreachable")
            return
        me = EngineId(part.source.name)
        ticket = Ticket(
            part.order, me, part.source.epoch, DESTINATION, Epoch(self.epoch), self.tp, "same", part.first, part.end,
            int(LEASE_MS),
        )  # fmt: skip
        params = {ORDER_KEY: msgspec.to_builtins(ticket)}
        request = Request(part.order, load.request, part.end, params)
        part.source.requests[part.order] = request
        part.source.serving.arrived(request)

    def under_way(self) -> list[tuple[Load, Part]]:
        """Orders that their sources have not heard of."""
        return [(load, part) for load in self.loads.values() for part in load.parts if not part.arrived]

    def parts(self) -> list[Part]:
        return [part for load in getattr(self, "loads", {}).values() for part in load.parts]

    @rule()
    def all_goes_well(self) -> None:
        """Orders arrive, requests go on by some tokens, and all messages come through: the stories begin after that."""
        for load, part in self.under_way():
            self.arrive(load, part)
        for source, request in self.running():
            self.step(source, request, 5)
        while self.to_source:
            self.hear_at_source(*self.to_source.pop(0))
        while self.to_destination:
            self.hear_at_destination(*self.to_destination.pop(0))

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), kind=st.sampled_from(["fail", "cancel", "preempt", "give up", "restart", "restart source"]))
    def mishap(self, data: st.DataObject, kind: str) -> None:
        """One that ends much is drawn less often."""
        if kind in ("fail", "cancel"):
            part = data.draw(st.sampled_from(self.parts()))
            self.fail(part.order, CANCELLED if kind == "cancel" else "source unreachable")
        elif kind in ("preempt", "give up") and self.running():
            source, request = data.draw(st.sampled_from(self.running()))
            if kind == "give up":
                self.end_request(source, request)
            else:
                source.release(request)
                request.num_computed_tokens = 0
        elif kind == "restart" and data.draw(RARELY):
            self.epoch += 1
            self.loads.clear()
            self.begin_life()
        elif kind == "restart source" and data.draw(RARELY):
            self.source_restarts(data.draw(st.integers(0, 1)), noticed=data.draw(st.booleans()))

    def fail(self, order: OrderId, reason: str) -> None:
        for rank in range(self.tp):
            self.at_destination(rank, self.ranks[rank].failed(order, reason, self.now))

    @precondition(lambda self: self.reads)
    @rule(data=st.data(), ok=RARELY.map(lambda rare: not rare))
    def read_ends(self, data: st.DataObject, ok: bool) -> None:
        index = data.draw(st.integers(0, len(self.reads) - 1))
        self.end_read(*self.reads.pop(index), ok)

    def end_read(self, rank: int, act: ReadFrom, ok: bool) -> None:
        found = self.source_at(act.endpoint)
        ok = ok and found is not None
        cell = min(self.size, self.source_size)
        edge = next(e for e in sources_of(rank, self.edges) if act.endpoint.endswith(f"/{e.source}"))
        theirs, mine = self.heads(edge.source, self.source_tp), self.heads(rank, self.tp)
        first, last = (act.read.first_layer, act.read.end_layer) if act.read.end_layer else (0, LAYERS)
        part = act.read.heads
        count = len(mine) if part is None else part.count
        for copy in act.read.cells:
            for token in range(cell):
                for layer in range(first, last):
                    for head in range(count):
                        there = theirs[head if part is None else part.source_first + head]
                        here = mine[head if part is None else part.destination_first + head]
                        assert there == here
                        at = (copy.remote, copy.remote_part * cell + token, layer, there)
                        value = found[0].memory.values.get(at, "unwritten") if ok and found else "torn"
                        self.memory[rank][copy.local, copy.local_part * cell + token, layer, here] = value
        self.at_destination(rank, self.ranks[rank].read_finished(act.strand, act.read.seq, 1, ok, self.now))

    @property
    def source_tp(self) -> int:
        return self.sources[0].tp

    # --- what a source does -------------------------------------------------------------------------------------

    @precondition(lambda self: self.running())
    @rule(data=st.data(), tokens=st.integers(1, 12))
    def source_steps(self, data: st.DataObject, tokens: int) -> None:
        self.step(*data.draw(st.sampled_from(self.running())), tokens)

    def step(self, source: SourceEngine, request: Request, tokens: int) -> None:
        before = request.num_computed_tokens
        until = min(before + tokens, request.num_prompt_tokens)
        if until <= before or not source.allocate(request, until):
            return
        plan = StepPlan()
        source.serving.fill(plan, {request.request_id: until - before}, {request.request_id: request})
        self.announce(source, plan.cached)
        source.write(request, range(before, until))
        self.announce(source, plan.ranges)
        self.withdraw(source, plan)
        request.num_computed_tokens = until
        if until == request.num_prompt_tokens:
            self.end_request(source, request)

    def running(self) -> list[tuple[SourceEngine, Request]]:
        return [(source, r) for source in getattr(self, "sources", ()) for r in source.requests.values()]

    def announce(self, source: SourceEngine, ranges: list[PlannedRange]) -> None:
        for planned in ranges:
            reader = planned.reader
            for rank, exchange in enumerate(source.ranks):
                for theirs in readers_of(rank, self.edges):
                    caller = Caller(reader.engine, reader.epoch, theirs)
                    acts = exchange.ready(caller, planned.message, planned.lease_ms, source.clock.now_ms())
                    self.at_source(source, rank, acts)

    def withdraw(self, source: SourceEngine, plan: StepPlan) -> None:
        for each in plan.withdrawals:
            for rank, exchange in enumerate(source.ranks):
                for theirs in readers_of(rank, self.edges):
                    caller = Caller(each.reader.engine, each.reader.epoch, theirs)
                    self.at_source(source, rank, exchange.withdrawn(caller, each.order, each.reason))

    def end_request(self, source: SourceEngine, request: Request) -> None:
        source.serving.finished(request)
        plan = StepPlan()
        source.serving.fill(plan, {}, {})
        self.withdraw(source, plan)
        source.release(request)
        del source.requests[request.request_id]
        for rank in range(self.tp):
            self.at_destination(rank, self.ranks[rank].source_finished(OrderId(request.request_id), self.now))

    def source_restarts(self, which: int, noticed: bool) -> None:
        """All of a source's life is gone; the destination may or may not notice that the connection broke."""
        old = self.sources[which]
        new = SourceEngine(
            old.name, old.epoch + 1, old.tp, old.block_size, old.serving.streaming.by_layer, self.clocks[which]
        )
        self.sources[which] = new
        self.to_source = [each for each in self.to_source if each[0] is not old]
        self.to_destination = [each for each in self.to_destination if each[0] is not old]
        self.greet(new)
        for rank in range(self.tp if noticed else 0):
            for edge in sources_of(rank, self.edges):
                lost = self.ranks[rank].source_lost(self.endpoint(old, edge.source), "source restarted", self.now)
                self.at_destination(rank, lost)

    # --- the network and time -----------------------------------------------------------------------------------

    @precondition(lambda self: self.to_source)
    @rule(data=st.data(), again=st.booleans())
    def source_hears(self, data: st.DataObject, again: bool) -> None:
        self.hear_at_source(*self.pick(data, self.to_source, again))

    def hear_at_source(self, source: SourceEngine, rank: int, theirs: int, message: PeerMessage) -> None:
        acts = source.ranks[rank].from_destination(self.caller(theirs), message, source.clock.now_ms())
        self.at_source(source, rank, acts)

    @precondition(lambda self: self.to_destination)
    @rule(data=st.data(), again=st.booleans())
    def destination_hears(self, data: st.DataObject, again: bool) -> None:
        self.hear_at_destination(*self.pick(data, self.to_destination, again))

    def hear_at_destination(self, source: SourceEngine, rank: int, mine: int, message: PeerMessage) -> None:
        acts = self.ranks[mine].from_source(self.endpoint(source, rank), message, self.now)
        self.at_destination(mine, acts)

    def pick(self, data: st.DataObject, queue: list[Any], again: bool) -> Any:
        index = data.draw(st.integers(0, len(queue) - 1))
        return queue[index] if again else queue.pop(index)

    @rule(
        ms=st.sampled_from([1.0, 300.0, 600.0, 1500.0]), who=st.sampled_from(["both", "sources", "destination", "none"])
    )
    def time_passes(self, ms: float, who: str) -> None:
        """Either side may be too busy to notice."""
        self.now += ms
        for clock in self.clocks:
            clock.advance(ms * self.drift)
        for source in self.sources if who in ("both", "sources") else ():
            for rank, exchange in enumerate(source.ranks):
                self.at_source(source, rank, exchange.tick(source.clock.now_ms()))
        for rank in range(self.tp if who in ("both", "destination") else 0):
            self.at_destination(rank, self.ranks[rank].tick(self.now))

    # --- what must hold -----------------------------------------------------------------------------------------

    @invariant()
    def a_delivery_that_is_over_never_brings_back_its_blocks(self) -> None:
        for load in getattr(self, "loads", {}).values():
            for rank in load.outcomes:
                assert self.in_flight(rank, load) <= {block for r, block in load.quarantined if r == rank}

    @invariant()
    def a_source_helps_whoever_may_be_reading(self) -> None:
        """Over some wires a read ends only if its source takes part."""
        for _, act in getattr(self, "reads", ()):
            found = self.source_at(act.endpoint)
            if found is not None:
                exchange = found[0].ranks[found[1]]
                assert exchange.being_read or exchange.lingering

    def teardown(self) -> None:
        """Let everything run out: then every request has ended, nothing is pinned and nothing is in quarantine."""
        if not hasattr(self, "loads"):
            return
        for source, request in self.running():
            self.end_request(source, request)
        for part in self.parts():
            if not part.arrived:
                self.fail(part.order, "source unreachable")
        for _ in range(12):
            self.time_passes(LEASE_MS / 2, "both")
            while self.to_source:
                self.hear_at_source(*self.to_source.pop(0))
            while self.to_destination:
                self.hear_at_destination(*self.to_destination.pop(0))
            while self.reads:
                self.end_read(*self.reads.pop(0), ok=False)
        for load in self.loads.values():
            assert len(load.outcomes) == self.tp, "every request ends, at every rank"
            assert not +load.quarantined
        for source in self.sources:
            assert not source.pins
            assert not any(block.refs for block in source.pool), "no block is leaked"
            assert not any(exchange.busy or exchange.lingering for exchange in source.ranks)
        assert not any(exchange.busy for exchange in self.ranks)


TestEnginesThatOrder = EnginesThatOrder.TestCase
TestEnginesThatOrder.settings = settings(max_examples=400, stateful_step_count=50)
