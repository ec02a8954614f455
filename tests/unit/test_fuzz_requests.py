"""What a client, a router or another engine may write into a request: hints and tickets of any shape.

Whatever it is, the engine core goes on, refusals are counted, and in the end nothing is pinned.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.kv_connector.exchange import Act, Caller, Exchange, ToDestination
from vllm_llmd.kv_connector.hints import MAX_SOURCES, read_hint
from vllm_llmd.kv_connector.lifecycle import Unpin
from vllm_llmd.kv_connector.orders import ORDER_KEY, HttpOrder, OrderResult
from vllm_llmd.kv_connector.placing import OrderPolicy, Outside, Placing
from vllm_llmd.kv_connector.room import Room
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.serving import PinBook, Serving, Streaming
from vllm_llmd.kv_connector.steps import PlannedOrder, Reader, StepPlan
from vllm_llmd.kv_connector.ticket import Ticket, ticket_text
from vllm_llmd.kv_connector.topology import edges, readers_of
from vllm_llmd.names import EngineId, Epoch, OrderId
from vllm_llmd.settings import LEASE_MS_RANGE
from vllm_llmd.testing.clock import FakeClock
from vllm_llmd.testing.pool import FakeBlock, FakePool
from vllm_llmd.wire import (
    Ack,
    Announce,
    Done,
    EngineInfo,
    Geometry,
    GroupShape,
    Renew,
    RequestSeen,
    decode_peer,
    encode,
)

BLOCK, HEADS = 16, 4
ME = EngineId("me")
SEAL = Seal("fleet")

NUMBERS = [0, 1, 2, -1, 15, 16, 17, 64, 99, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400]
WORDS = ["", "o", "me", "d", "s", "same", "\ud800", "é", "a: b\n", "x" * 100_000]
SHAPES: list[Any] = [None, True, False, 0.5, 1e400, float("nan"), [], {}, [[]], {"": None}, [None, 1, "o"]]

numbers, words = st.sampled_from(NUMBERS), st.sampled_from(WORDS) | st.text(max_size=4)
anything = st.sampled_from([*NUMBERS, *WORDS, *SHAPES]) | st.dictionaries(words, st.sampled_from(SHAPES), max_size=2)


def policy(tp: int = 1, seal: Seal = SEAL, groups: Sequence[GroupShape] = (GroupShape(BLOCK, 2),)) -> OrderPolicy:
    geometry = Geometry(tp, HEADS, "cells", list(groups))
    return OrderPolicy(ME, Epoch(1), "same", geometry, (3, 12), BLOCK, True, 1, 1000, seal)


@dataclass
class Request:
    """What the connector reads of a vLLM request."""

    request_id: str
    num_prompt_tokens: int
    kv_transfer_params: Any
    num_computed_tokens: int = 0
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_embeds: None = None
    mm_features: tuple[object, ...] = ()
    lora_request: Any = None
    cache_salt: str | None = None
    priority: int = 0
    trace_headers: None = None
    block_hashes: list[str] = field(default_factory=list)
    blocks: list[list[FakeBlock]] = field(default_factory=list)


# --- tickets ------------------------------------------------------------------------------------------------------


class Source(FakePool):
    """An engine that serves orders: what the scheduler side decides and the ranks' post offices carry on."""

    def __init__(self, tp: int, secret: bool, by_layer: bool) -> None:
        self.clock, self.tp = FakeClock(), tp
        self.seal = SEAL if secret else Seal(None)
        self.pins = PinBook(self)
        groups = (GroupShape(BLOCK, 2), GroupShape(BLOCK, 2, 48))
        self.serving = Serving(policy(tp, self.seal, groups), self, self.pins, Room(1000), self.clock)
        self.serving.streaming = Streaming(by_layer, 4, 1 << 18)
        self.ranks = [Exchange() for _ in range(tp)]
        self.requests: dict[str, Request] = {}
        self.made: list[FakeBlock] = []
        self.told: list[tuple[int, ToDestination]] = []

    def blocks_of(self, request_id: str) -> list[list[FakeBlock]]:
        return self.requests[request_id].blocks

    def arrives(self, request: Request) -> None:
        request.blocks = [[], []]
        self.requests[request.request_id] = request
        before = self.serving.count + sum(self.serving.refused.values())
        self.serving.arrived(request)
        params = request.kv_transfer_params
        is_order = isinstance(params, Mapping) and params.get(ORDER_KEY) is not None
        counted = self.serving.count + sum(self.serving.refused.values()) - before
        assert counted == is_order, "an order is served, or refused and counted"

    def step(self, request: Request, tokens: int) -> None:
        until = min(request.num_computed_tokens + tokens, request.num_prompt_tokens)
        for group in request.blocks:
            while len(group) * BLOCK < until:
                group.append(FakeBlock(len(self.made), 1))
                self.made.append(group[-1])
        scheduled = until - request.num_computed_tokens
        self.fill({request.request_id: scheduled} if scheduled else {})
        request.num_computed_tokens = until

    def fill(self, scheduled: Mapping[str, int]) -> None:
        """A step's plan reaches the ranks."""
        plan = StepPlan()
        self.serving.fill(plan, scheduled, {})
        now = self.clock.now_ms()
        for planned in [*plan.cached, *plan.ranges]:
            for rank, caller in self.readers(planned.reader):
                self.do(rank, self.ranks[rank].ready(caller, planned.message, planned.lease_ms, now))
        for each in plan.withdrawals:
            for rank, caller in self.readers(each.reader):
                self.do(rank, self.ranks[rank].withdrawn(caller, each.order, each.reason))

    def readers(self, reader: Reader) -> list[tuple[int, Caller]]:
        between = edges(self.tp, reader.tp, HEADS)
        return [
            (rank, Caller(reader.engine, reader.epoch, theirs))
            for rank in range(self.tp)
            for theirs in readers_of(rank, between)
        ]

    def do(self, rank: int, acts: list[Act]) -> None:
        for act in acts:
            match act:
                case ToDestination(message=message):
                    assert decode_peer(encode(message)) == message, "what is said can be sent"
                    self.told.append((rank, act))
                case Unpin(order, seqs):
                    self.pins.release(Counter((order, seq) for seq in seqs))

    def preempt(self, request: Request) -> None:
        for group in request.blocks:
            self.unpin(group)
        request.blocks, request.num_computed_tokens = [[], []], 0

    def finish(self, request: Request) -> None:
        self.serving.finished(request)
        self.preempt(request)
        self.fill({})
        del self.requests[request.request_id]

    def hears(self, rank: int, caller: Caller, message: Renew | Ack | Done) -> None:
        self.do(rank, self.ranks[rank].from_destination(caller, message, self.clock.now_ms()))

    def time_passes(self, ms: float) -> None:
        self.clock.advance(ms)
        for rank, exchange in enumerate(self.ranks):
            self.do(rank, exchange.tick(self.clock.now_ms()))


def ticket(**changes: Any) -> Ticket:
    plain = Ticket(OrderId("o"), ME, Epoch(1), EngineId("d"), Epoch(5), 1, "same", 0, 99, 1000)
    return msgspec.structs.replace(plain, **changes)


REASONS = {
    "unusable ticket", "not signed with this fleet's secret", "order came before", "another version",
    "another engine or life", "fingerprint differs", "impossible tokens", "impossible lease", "impossible deadline",
    "adapter differs", "no room",
}  # fmt: skip

plausible = st.fixed_dictionaries(
    {"order": st.sampled_from(["o", "p", "q"])},
    optional={
        "destination_tp": st.sampled_from([1, 2, 4, 16, 5]),
        "destination_epoch": st.sampled_from([5, 6]),
        "first_token": st.sampled_from([0, 1, 16, 33, 98]),
        "end_token": st.sampled_from([1, 16, 17, 64, 99, 100]),
        "lease_ms": st.sampled_from(LEASE_MS_RANGE),
        "deadline_ms": st.sampled_from([0, 1, 1000]),
    },
)
fields = st.sampled_from([field.name for field in msgspec.structs.fields(Ticket)] + ["unknown"])
mostly = st.sampled_from([True, True, True, False])


@st.composite
def tickets(draw: st.DrawFn) -> dict[str, Any]:
    """Tickets that hold, some with a field of any value, and most of them signed."""
    raw: dict[str, Any] = msgspec.to_builtins(ticket(**draw(plausible)))
    if not draw(mostly):
        raw[draw(fields)] = draw(numbers | words | anything)
    return signed(raw) if draw(mostly) else raw


def signed(raw: dict[str, Any]) -> dict[str, Any]:
    try:
        return {**raw, "mac": SEAL.sign(ticket_text(msgspec.convert(raw, Ticket)))}
    except (msgspec.ValidationError, UnicodeEncodeError):
        return raw


params = st.integers(0, 9).flatmap(lambda kind: anything if not kind else st.fixed_dictionaries({ORDER_KEY: tickets()}))
events = st.lists(
    st.tuples(
        st.sampled_from(["step", "step", "step", "preempt", "finish", "greet", "ack", "ack", "done", "renew", "time"]),
        st.integers(0, 3),
        st.integers(1, 100),
    ),
    min_size=4,
    max_size=30,
)


@settings(max_examples=300)
@given(
    prompts=st.lists(st.tuples(params, st.sampled_from([100, 100, 99, 64, 1])), min_size=1, max_size=4),
    tp=st.sampled_from([1, 2]),
    secret=st.booleans(),
    by_layer=st.booleans(),
    story=events,
    well_behaved=st.booleans(),
)
def test_no_ticket_stops_the_engine_and_nothing_stays_pinned(
    prompts: list[tuple[Any, int]],
    tp: int,
    secret: bool,
    by_layer: bool,
    story: list[tuple[str, int, int]],
    well_behaved: bool,
) -> None:
    source = Source(tp, secret, by_layer)
    for number, (raw, tokens) in enumerate(prompts):
        source.arrives(Request(f"r{number}", tokens, raw))
    for what, which, amount in story:
        tell(source, what, which, amount)
    if well_behaved:
        let_go(source)
    ends_in_order(source)


def ends_in_order(source: Source) -> None:
    """Every request runs to its end and every lease runs out: then nothing is held, and little was said."""
    for request in list(source.requests.values()):
        source.step(request, 200)
        source.finish(request)
    source.time_passes(LEASE_MS_RANGE[1] + 1)
    assert not source.pins
    assert source.pins.blocks == 0
    assert not any(block.refs for block in source.made)
    assert not any(exchange.busy for exchange in source.ranks)
    assert set(source.serving.refused) <= REASONS, "reasons are labels of a metric"


@pytest.mark.parametrize("secret", [True, False])
def test_no_value_of_any_field_of_a_ticket_stops_the_engine(secret: bool) -> None:
    plain = msgspec.to_builtins(ticket())
    for name, value in product(plain, [*NUMBERS, *WORDS, *SHAPES]):
        for sealed in (signed, dict) if secret else (dict,):
            source = Source(2, secret, by_layer=False)
            source.arrives(Request("r", 100, {ORDER_KEY: sealed({**plain, name: value})}))
            ends_in_order(source)


def tell(source: Source, what: str, which: int, amount: int) -> None:
    """One event of a story; what makes no sense is left out."""
    requests = list(source.requests.values())
    rank, caller = amount % source.tp, Caller(EngineId("d"), Epoch(5 + (amount % 9 == 0)), amount // 2 % 2)
    if what in ("step", "preempt", "finish") and requests:
        request = requests[which % len(requests)]
        source.step(request, amount) if what == "step" else getattr(source, what)(request)
    elif what == "greet":
        source.do(rank, source.ranks[rank].greeted(caller))
    elif what == "time":
        source.time_passes(amount * 20)
    elif what in ("ack", "done", "renew"):
        order = OrderId("opqq"[which])
        messages = {"ack": Ack(order, [amount % 2, 0, 0, 1, 1, -1]), "done": Done(order), "renew": Renew(order, amount)}
        source.hears(rank, caller, messages[what])


def let_go(source: Source) -> None:
    """Every request ends; every destination rank acknowledges what it was told of, and is done with it."""
    for request in list(source.requests.values()):
        source.step(request, 200)
        source.finish(request)
    for rank, exchange in enumerate(source.ranks):
        for caller in {caller for _, caller in exchange._sources}:
            source.do(rank, exchange.greeted(caller))
    for rank, act in list(source.told):
        if isinstance(act.message, Announce):
            source.hears(rank, act.caller, Ack(act.message.order, [act.message.seq]))
            source.hears(rank, act.caller, Done(act.message.order))
    assert not source.pins


# --- hints --------------------------------------------------------------------------------------------------------


@dataclass
class Client:
    """Records orders in place of sending them."""

    placed: list[HttpOrder] = field(default_factory=list)

    def place(self, order: HttpOrder) -> None:
        self.placed.append(order)

    def cancel(self, order: OrderId) -> None:
        """Nothing was sent."""

    def results(self) -> list[OrderResult]:
        return []


def member(name: str, **changes: Any) -> EngineInfo:
    geometry = changes.pop("geometry", Geometry(1, HEADS, "cells", [GroupShape(BLOCK, 2)]))
    info = EngineInfo(EngineId(name), Epoch(9), "both", "http://h", ["m"], BLOCK, 9, 99, "same", ["tcp://h:1"])
    return msgspec.structs.replace(info, geometry=geometry, **changes)


def cut(block_size: int, tp: int = 1, layers: int = 2, kv_heads: int = HEADS) -> Geometry:
    return Geometry(tp, kv_heads, "cells", [GroupShape(block_size, layers)])


MEMBERS = [
    member("s"),
    member("o"),
    member("big", geometry=cut(4 * BLOCK)),
    member("ranks", geometry=cut(BLOCK, 2), workers=["tcp://h:1", "tcp://h:2"]),
    member("no blocks", geometry=cut(0)),
    member("less than none", geometry=cut(-BLOCK)),
    member("no ranks", geometry=cut(BLOCK, 0), workers=[]),
    member("minus a rank", geometry=cut(BLOCK, -1)),
    member("too many ranks", geometry=cut(BLOCK, 4096), workers=["tcp://h:1"] * 4096),
    member("no groups", geometry=Geometry(1, HEADS, "cells", [])),
    member("no heads", geometry=cut(BLOCK, 2, kv_heads=-1), workers=["tcp://h:1"] * 2),
    member("huge", geometry=cut(2**63), epoch=Epoch(2**63 - 1)),
    member("me"),
]
names = st.sampled_from([info.id for info in MEMBERS] + ["nobody"])
untils = st.sampled_from([16, 17, 50, 64, 98, 1000]) | numbers
sources = st.lists(
    st.fixed_dictionaries({"engine": names}, optional={"until": untils, "least": untils, "else": anything}) | anything,
    max_size=5,
)
hints = st.fixed_dictionaries(
    {"sources": sources},
    optional={"source": names | anything, "request": words, "deadline_ms": numbers, "trace": words, "more": anything},
)


def blocks(tokens: int) -> list[list[Any]]:
    return [[SimpleNamespace(block_id=100 + i, is_null=False) for i in range(-(-tokens // BLOCK))]]


def check_hinted(raw: Any, tokens: int, computed: int, tp: int = 1) -> None:
    """Go through what vLLM does for a request with this hint; nothing but a well-formed order may come of it."""
    client, clock = Client(), FakeClock()
    members = {info.id: info for info in MEMBERS}
    outside = Outside(client, lambda: members, Room(1000), lambda request: False, clock)  # type: ignore[arg-type]
    placing = Placing(policy(tp), outside)
    request = Request("r", tokens, raw, prompt_token_ids=list(range(tokens)))
    assert len(read_hint(raw).sources) <= MAX_SOURCES
    name = read_hint(raw).request
    if name is not None:
        encode(RequestSeen(ME, Epoch(1), name, tokens, b""))
    placing.arrived(request)
    loaded = placing.tokens_to_load(request, computed)
    assert loaded is not None
    assert 0 <= loaded <= max(tokens - 1 - computed, 0)
    placing.allocated(request, loaded, blocks(computed + loaded))
    plan = StepPlan()
    placing.fill(plan)
    end = computed
    ordered = [planned for load in plan.loads for planned in load]
    into = [block for planned in ordered for wanted in planned.spec.wanted for block in wanted.blocks]
    assert len(into) == len(set(into)), "a block comes from one source"
    for order, planned in zip(client.placed, ordered, strict=True):
        assert order.ticket.first_token == end, "parts follow each other"
        end = order.ticket.end_token
        check_order(order, planned, tokens)
    assert end == computed + loaded
    clock.advance(2000)
    placing.fill(StepPlan())
    placing.finished(request)
    assert all(len(reason) < 64 for reason in placing.take_fallbacks())


def check_order(order: HttpOrder, planned: PlannedOrder, tokens: int) -> None:
    ticket = order.ticket
    assert 0 <= ticket.first_token < ticket.end_token <= len(order.body["prompt"]) <= tokens
    assert msgspec.json.decode(msgspec.json.encode(ticket), type=Ticket) == ticket, "whoever gets it can read it"
    assert all(value.isprintable() for value in order.headers.values())
    (wanted,) = planned.spec.wanted
    assert len(planned.endpoints) in (1, 2)
    assert (wanted.first_token, wanted.end_token) == (ticket.first_token, ticket.end_token)
    assert {wanted.local(cell)[0] for cell in wanted.cells} == set(wanted.blocks)


@settings(max_examples=300)
@given(
    raw=st.fixed_dictionaries({"llmd": hints}) | st.fixed_dictionaries({"llmd": anything}) | anything,
    tokens=st.sampled_from([100, 97, 64, 1]),
    computed=st.sampled_from([0, 0, 16, 64, 96]),
    tp=st.sampled_from([1, 2]),
)
def test_whatever_is_hinted_only_well_formed_orders_are_placed(raw: Any, tokens: int, computed: int, tp: int) -> None:
    check_hinted(raw, tokens, min(computed, tokens // BLOCK * BLOCK), tp)


@pytest.mark.parametrize("name", ["sources", "source", "request", "deadline_ms", "trace", "engine", "until", "least"])
def test_no_value_of_any_field_of_a_hint_stops_the_engine(name: str) -> None:
    for value in [*NUMBERS, *WORDS, *SHAPES]:
        hinted = {"engine": "s", "until": 64, "least": 20}
        hint = {"source": "s", "sources": [hinted, {"engine": "o"}], "request": "r"}
        (hinted if name in hinted else hint)[name] = value
        check_hinted({"llmd": hint}, 100, 0)


def test_a_hint_of_every_engine_there_is_is_taken_in_turn() -> None:
    for info in MEMBERS:
        check_hinted({"llmd": {"source": info.id}}, 100, 0)
    check_hinted({"llmd": {"sources": [{"engine": f"e{i}"} for i in range(100_000)]}}, 100, 0)
