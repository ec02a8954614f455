"""What the scheduler side decides: whom to order from, what to pin and announce, what to release."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from vllm_llmd.kv_connector.lifecycle import CANCELLED
from vllm_llmd.kv_connector.orders import ORDER_KEY, HttpOrder, OrderResult
from vllm_llmd.kv_connector.placing import OrderPolicy, Placing, hint_of, ticket_text
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.serving import PinBook, Serving
from vllm_llmd.kv_connector.steps import Fail, Finish, StepPlan
from vllm_llmd.names import EngineId, Epoch, OrderId
from vllm_llmd.wire import EngineInfo, Ticket

BLOCK = 32


@dataclass
class Block:
    block_id: int
    pins: int = 0


@dataclass
class Pool:
    """A block pool that counts pins; every request has blocks 100, 101, ..."""

    blocks: dict[int, Block] = field(default_factory=dict)

    def blocks_of(self, request_id: str) -> list[Block]:
        return [self.blocks.setdefault(i, Block(i)) for i in range(100, 120)]

    def pin(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.pins += 1

    def unpin(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            assert block.pins, "unpinned more often than pinned"
            block.pins -= 1

    def pinned(self) -> list[int]:
        return sorted(block.block_id for block in self.blocks.values() if block.pins)


@dataclass
class Request:
    """What the connector reads of a vLLM request."""

    num_prompt_tokens: int
    kv_transfer_params: dict[str, Any] | None = None
    request_id: str = "r"
    num_computed_tokens: int = 0
    prompt_token_ids: list[int] | None = None
    prompt_embeds: object = None
    mm_features: tuple[object, ...] = ()
    lora_request: object = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        self.prompt_token_ids = list(range(self.num_prompt_tokens))


@dataclass
class Client:
    """Records orders in place of sending them."""

    placed: list[HttpOrder] = field(default_factory=list)
    cancelled: list[OrderId] = field(default_factory=list)
    answers: list[OrderResult] = field(default_factory=list)

    def place(self, order: HttpOrder) -> None:
        self.placed.append(order)

    def cancel(self, order: OrderId) -> None:
        self.cancelled.append(order)

    def results(self) -> list[OrderResult]:
        answers, self.answers = self.answers, []
        return answers


def policy(**changes: Any) -> OrderPolicy:
    facts: dict[str, Any] = {
        "me": EngineId("me"),
        "epoch": Epoch(1),
        "fingerprint": "same",
        "tp_size": 1,
        "block_size": BLOCK,
        "min_order_tokens": 1,
        "lease_ms": 1000,
        "seal": Seal(None),
    }
    return OrderPolicy(**{**facts, **changes})


def peer(**changes: Any) -> EngineInfo:
    info = EngineInfo(EngineId("s"), Epoch(9), "prefill", "http://s", ["m"], BLOCK, 99, 999, "same", ["tcp://s:1"])
    return msgspec.structs.replace(info, **changes)


HINT = {"llmd": {"source": "s", "request": "name"}}


def placing(peers: Sequence[EngineInfo] = (), **changes: Any) -> tuple[Placing, Client]:
    client = Client()
    members = {info.id: info for info in (peers or [peer()])}
    return Placing(policy(**changes), client, lambda: members), client  # type: ignore[arg-type]


# --- placing ------------------------------------------------------------------------------------------------------


def test_all_but_the_last_token_of_a_hinted_prompt_is_ordered() -> None:
    place, client = placing()
    request = Request(100, HINT)
    assert place.tokens_to_load(request, 32) == 67
    place.allocated(request, 67, [7, 8, 9, 10])
    plan = StepPlan()
    place.fill(plan)
    (load,) = plan.loads
    assert (load.spec.first_block, load.spec.local_blocks) == (1, (8, 9, 10))
    (order,) = client.placed
    assert order.body["prompt"] == list(range(99))
    assert (order.url, order.ticket.first_block, order.ticket.source_epoch) == ("http://s", 1, 9)


def test_asking_twice_before_allocation_changes_nothing() -> None:
    place, client = placing()
    request = Request(100, HINT)
    assert [place.tokens_to_load(request, 0) for _ in range(2)] == [99, 99]
    assert not client.placed


def test_a_request_is_ordered_once_only() -> None:
    place, _ = placing()
    request = Request(100, HINT)
    place.tokens_to_load(request, 0)
    place.allocated(request, 99, [1, 2, 3, 4])
    place.ended(request.request_id, "source stalled")
    assert place.tokens_to_load(request, 0) == 0


@pytest.mark.parametrize("params", [None, {}, {"llmd": 5}, {"llmd": {"source": ["s"]}}, {"llmd": {"request": "x"}}])
def test_without_a_usable_hint_nothing_is_ordered(params: dict[str, Any] | None) -> None:
    place, _ = placing()
    assert place.tokens_to_load(Request(100, params), 0) == 0
    assert place.take_fallbacks() == {}


def test_too_few_missing_tokens_are_computed_here() -> None:
    place, _ = placing(min_order_tokens=50)
    assert place.tokens_to_load(Request(100, HINT), 50) == 0
    assert place.tokens_to_load(Request(100, HINT), 49) == 50


@pytest.mark.parametrize(
    ("request_changes", "peer_changes", "reason"),
    [
        ({"mm_features": (1,)}, {}, "prompt is not text alone"),
        ({"prompt_embeds": 1}, {}, "prompt is not text alone"),
        ({"lora_request": 1}, {}, "adapter"),
        ({}, {"id": EngineId("other")}, "unknown engine"),
        ({}, {"fingerprint": "other"}, "fingerprint differs"),
        ({}, {"workers": ["tcp://s:1", "tcp://s:2"]}, "fingerprint differs"),
        ({}, {"models": []}, "serves no model"),
    ],
)
def test_what_cannot_be_ordered_is_counted_by_reason(
    request_changes: dict[str, Any], peer_changes: dict[str, Any], reason: str
) -> None:
    place, _ = placing([peer(**peer_changes)])
    request = Request(100, HINT)
    for name, value in request_changes.items():
        setattr(request, name, value)
    assert place.tokens_to_load(request, 0) == 0
    assert place.take_fallbacks() == {reason: 1}


def test_an_engine_does_not_order_from_itself() -> None:
    place, _ = placing([peer(id=EngineId("me"))])
    assert place.tokens_to_load(Request(100, {"llmd": {"source": "me"}}), 0) == 0


def test_a_source_that_leaves_between_question_and_order_is_still_ordered_from() -> None:
    members = {EngineId("s"): peer()}
    client = Client()
    place = Placing(policy(), client, lambda: members)  # type: ignore[arg-type]
    request = Request(100, HINT)
    place.tokens_to_load(request, 0)
    members.clear()
    place.allocated(request, 99, [1, 2, 3, 4])
    assert len(client.placed) == 1


def test_a_finished_request_that_still_waits_hangs_up_and_fails_its_order() -> None:
    place, client = placing()
    request = Request(100, HINT)
    place.tokens_to_load(request, 0)
    place.allocated(request, 99, [1, 2, 3, 4])
    place.finished(request)
    plan = StepPlan()
    place.fill(plan)
    assert plan.failures == [Fail(client.placed[0].ticket.order, CANCELLED)]
    assert client.cancelled == [client.placed[0].ticket.order]


def test_results_of_orders_reach_the_workers() -> None:
    place, client = placing()
    client.answers = [OrderResult(OrderId("a"), None), OrderResult(OrderId("b"), "source answered 500")]
    plan = StepPlan()
    place.fill(plan)
    assert plan.finishes == [Finish(OrderId("a"))]
    assert plan.failures == [Fail(OrderId("b"), "source answered 500")]


def test_the_salt_travels_with_the_order() -> None:
    place, client = placing()
    request = Request(100, HINT, cache_salt="tenant")
    place.tokens_to_load(request, 0)
    place.allocated(request, 99, [1, 2, 3, 4])
    assert client.placed[0].body["cache_salt"] == "tenant"


def test_a_hint_of_the_wrong_shape_says_nothing() -> None:
    hint = hint_of(Request(1, {"llmd": {"source": 1, "request": {}}}))
    assert (hint.source, hint.request) == (None, None)


# --- serving ------------------------------------------------------------------------------------------------------


def ticket(seal: Seal | None = None, **changes: Any) -> dict[str, Any]:
    me = EngineId("me")
    plain = Ticket(OrderId("o"), me, Epoch(1), EngineId("d"), Epoch(5), "same", 0, 1000)
    changed = msgspec.structs.replace(plain, **changes)
    if seal is not None:
        changed = msgspec.structs.replace(changed, mac=seal.sign(ticket_text(changed)))
    return {ORDER_KEY: msgspec.to_builtins(changed)}


def serving(**changes: Any) -> tuple[Serving, Pool, PinBook]:
    pool = Pool()
    pins = PinBook(pool, ranks=changes.get("tp_size", 1))
    return Serving(policy(**changes), pool, pins), pool, pins


def step(serve: Serving, request: Request, tokens: int) -> StepPlan:
    plan = StepPlan()
    serve.fill(plan, {request.request_id: tokens})
    request.num_computed_tokens += tokens
    return plan


def test_each_step_announces_the_blocks_that_it_completes() -> None:
    serve, pool, _ = serving()
    request = Request(100, ticket())
    serve.arrived(request)
    announced = [step(serve, request, tokens).ranges for tokens in (20, 40, 40)]
    assert announced[0] == []
    first, last = announced[1][0].message, announced[2][0].message
    assert (first.seq, first.first_block, first.blocks, first.last) == (0, 0, [100], False)
    assert (last.seq, last.first_block, last.blocks, last.last) == (1, 1, [101, 102, 103], True)
    assert pool.pinned() == [100, 101, 102, 103]


def test_blocks_that_the_destination_has_are_not_announced() -> None:
    serve, _, _ = serving()
    request = Request(100, ticket(first_block=2))
    serve.arrived(request)
    (planned,) = step(serve, request, 100).ranges
    assert (planned.message.first_block, planned.message.blocks) == (2, [102, 103])


def test_a_preempted_source_request_announces_nothing_twice() -> None:
    serve, pool, _ = serving()
    request = Request(100, ticket())
    serve.arrived(request)
    step(serve, request, 64)
    request.num_computed_tokens = 0
    assert step(serve, request, 64).ranges == []
    (planned,) = step(serve, request, 36).ranges
    assert planned.message.first_block == 2
    assert max(block.pins for block in pool.blocks.values()) == 1


def test_a_range_is_unpinned_when_every_rank_has_let_go() -> None:
    serve, pool, pins = serving(tp_size=2)
    request = Request(64, ticket())
    serve.arrived(request)
    step(serve, request, 64)
    pins.release({(OrderId("o"), 0): 1})
    assert pool.pinned() == [100, 101]
    pins.release({(OrderId("o"), 0): 1})
    assert pool.pinned() == []
    assert (len(pins), pins.blocks) == (0, 0)


def test_a_source_request_that_ends_early_withdraws_the_order() -> None:
    serve, _, _ = serving()
    request = Request(100, ticket())
    serve.arrived(request)
    step(serve, request, 64)
    serve.finished(request)
    assert serve.has_news
    plan = StepPlan()
    serve.fill(plan, {})
    assert [withdrawal.order for withdrawal in plan.withdrawals] == ["o"]
    assert not serve.has_news


def test_a_served_request_says_so_in_its_response() -> None:
    serve, _, _ = serving()
    request = Request(64, ticket())
    serve.arrived(request)
    step(serve, request, 64)
    assert serve.finished(request) == {ORDER_KEY: {"order": "o", "ranges": 1}}
    assert not serve.has_news


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": EngineId("other")}, "meant for other"),
        ({"source_epoch": Epoch(2)}, "which has ended"),
        ({"fingerprint": "other"}, "fingerprint"),
        ({"version": 9}, "protocol 9"),
        ({"first_block": -1}, "first_block"),
        ({"lease_ms": 0}, "lease_ms"),
        ({"lease_ms": 10**9}, "lease_ms"),
    ],
)
def test_a_ticket_that_does_not_hold_is_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    serve, pool, _ = serving()
    request = Request(64, ticket(**changes))
    serve.arrived(request)
    plan = step(serve, request, 64)
    (withdrawal,) = plan.withdrawals
    assert words in withdrawal.reason
    assert plan.ranges == []
    assert pool.pinned() == []


@pytest.mark.parametrize("raw", [{}, [], "x", {"order": 1}])
def test_what_is_no_ticket_is_no_order(raw: object) -> None:
    serve, _, _ = serving()
    request = Request(64, {ORDER_KEY: raw})
    serve.arrived(request)
    assert step(serve, request, 64).ranges == []


def test_with_a_secret_only_signed_tickets_hold() -> None:
    seal = Seal("fleet")
    for good, signed in ((True, ticket(seal)), (False, ticket()), (False, ticket(Seal("other")))):
        serve, _, _ = serving(seal=seal)
        request = Request(64, signed)
        serve.arrived(request)
        assert bool(step(serve, request, 64).ranges) is good


def test_a_signature_does_not_cover_a_changed_ticket() -> None:
    seal = Seal("fleet")
    params = ticket(seal)
    params[ORDER_KEY]["first_block"] = 1
    serve, _, _ = serving(seal=seal)
    request = Request(64, params)
    serve.arrived(request)
    assert step(serve, request, 64).ranges == []
