"""What the scheduler side orders: from whom, which part of a prompt, and what becomes of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from vllm_llmd.kv_connector.lifecycle import CANCELLED, Outcome
from vllm_llmd.kv_connector.orders import HttpOrder, OrderResult
from vllm_llmd.kv_connector.placing import GAVE_WAY, OrderPolicy, Outside, Placing
from vllm_llmd.kv_connector.room import Room
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.steps import Fail, Finish, StepPlan
from vllm_llmd.names import EngineId, Epoch, OrderId, RequestId
from vllm_llmd.testing.clock import FakeClock
from vllm_llmd.wire import EngineInfo, Geometry, GroupShape

BLOCK = 32


@dataclass
class Request:
    """What the connector reads of a vLLM request."""

    num_prompt_tokens: int
    kv_transfer_params: Any = None
    request_id: str = "r"
    num_computed_tokens: int = 0
    prompt_token_ids: list[int] | None = None
    prompt_embeds: object = None
    mm_features: tuple[object, ...] = ()
    lora_request: Any = None
    cache_salt: str | None = None
    priority: int = 0
    trace_headers: dict[str, str] | None = None
    block_hashes: list[str] = field(default_factory=list)
    waits: bool = False

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


def geometry(*groups: tuple[int, int], tp: int = 1, interior: str = "cells") -> Geometry:
    shapes = [GroupShape(size, 2, window) for size, window in groups or ((BLOCK, 0),)]
    return Geometry(tp, 4, interior, shapes)


def policy(**changes: Any) -> OrderPolicy:
    facts: dict[str, Any] = {
        "me": EngineId("me"),
        "epoch": Epoch(1),
        "fingerprint": "same",
        "geometry": geometry(),
        "layer_masks": (0b11, 0b1100),
        "hash_tokens": BLOCK,
        "prefix_caching": True,
        "min_order_tokens": 1,
        "lease_ms": 1000,
        "seal": Seal(None),
    }
    return OrderPolicy(**{**facts, **changes})


def peer(**changes: Any) -> EngineInfo:
    info = EngineInfo(EngineId("s"), Epoch(9), "prefill", "http://s", ["m"], BLOCK, 99, 999, "same", ["tcp://s:1"])
    return msgspec.structs.replace(info, **{"geometry": geometry(), **changes})


HINT = {"llmd": {"source": "s", "request": "name"}}


@dataclass
class Bench:
    """A Placing with everything around it faked; `place` does what vLLM does for one request."""

    placing: Placing
    client: Client
    clock: FakeClock
    room: Room
    members: dict[EngineId, EngineInfo]

    def place(self, request: Request, computed: int = 0, nulls: int = 0, groups: int = 1) -> int | None:
        self.placing.arrived(request)
        tokens = self.placing.tokens_to_load(request, computed)
        blocks = [
            [SimpleNamespace(block_id=100 * group + i, is_null=group > 0 and i < nulls) for i in range(99)]
            for group in range(groups)
        ]
        self.placing.allocated(request, tokens or 0, blocks)
        request.waits = bool(tokens)
        return tokens

    def step(self) -> StepPlan:
        plan = StepPlan()
        self.placing.fill(plan)
        return plan


def bench(*peers: EngineInfo, capacity: int = 1000, **changes: Any) -> Bench:
    client, clock, room = Client(), FakeClock(), Room(capacity)
    members = {info.id: info for info in (peers or [peer()])}
    waits: Callable[[Any], bool] = lambda request: request.waits  # noqa: E731
    outside = Outside(client, lambda: members, room, waits, clock)  # type: ignore[arg-type]
    return Bench(Placing(policy(**changes), outside), client, clock, room, members)


def ended(reason: str | None) -> list[Outcome]:
    return [Outcome(OrderId("o"), RequestId("r"), reason, (), (), (), (), None)]


# --- one source ---------------------------------------------------------------------------------------------------


def test_all_but_the_last_token_of_a_hinted_prompt_is_ordered() -> None:
    b = bench()
    assert b.place(Request(100, HINT), 32) == 67
    ((load,),) = b.step().loads
    (wanted,) = load.spec.wanted
    assert (wanted.first_token, wanted.end_token, wanted.first_block, wanted.blocks) == (32, 99, 1, (1, 2, 3))
    (order,) = b.client.placed
    assert order.body["prompt"] == list(range(99))
    assert (order.url, order.ticket.first_token, order.ticket.end_token) == ("http://s", 32, 99)
    assert (order.ticket.source_epoch, order.ticket.destination_tp, order.ticket.request) == (9, 1, "name")


def test_a_part_that_ends_with_a_block_takes_one_more_token_along() -> None:
    b = bench()
    b.place(Request(97, HINT))
    assert b.client.placed[0].ticket.end_token == 96
    assert b.client.placed[0].body["prompt"] == list(range(97))


def test_without_prefix_caching_one_more_token_would_be_of_no_use() -> None:
    b = bench(prefix_caching=False)
    b.place(Request(97, HINT))
    assert b.client.placed[0].body["prompt"] == list(range(96))


def test_asking_twice_before_allocation_changes_nothing() -> None:
    b = bench()
    request = Request(100, HINT)
    assert [b.placing.tokens_to_load(request, 0) for _ in range(2)] == [99, 99]
    assert not b.client.placed


def test_a_request_is_ordered_once_only() -> None:
    b = bench()
    request = Request(100, HINT)
    b.place(request)
    b.placing.ended(RequestId("r"), ended("source stalled"))
    assert b.placing.tokens_to_load(request, 0) == 0


@pytest.mark.parametrize(
    "params", [None, {}, [], "x", {"llmd": 5}, {"llmd": {"source": ["s"]}}, {"llmd": {"request": "x"}}]
)
def test_without_a_usable_hint_nothing_is_ordered(params: Any) -> None:
    b = bench()
    assert b.place(Request(100, params)) == 0
    assert b.placing.take_fallbacks() == {}


def test_too_few_missing_tokens_are_computed_here() -> None:
    b = bench(min_order_tokens=50)
    assert b.placing.tokens_to_load(Request(100, HINT), 50) == 0
    assert b.placing.tokens_to_load(Request(100, HINT), 49) == 50


@pytest.mark.parametrize(
    ("request_changes", "peer_changes", "reason"),
    [
        ({"mm_features": (1,)}, {}, "prompt is not text alone"),
        ({"prompt_embeds": 1}, {}, "prompt is not text alone"),
        ({"lora_request": SimpleNamespace(lora_path="/nowhere")}, {}, "adapter cannot be read"),
        ({}, {"id": EngineId("other")}, "unknown engine"),
        ({}, {"fingerprint": "other"}, "fingerprint differs"),
        ({}, {"geometry": geometry(interior="other")}, "blocks are laid out differently"),
        ({}, {"geometry": geometry((48, 0))}, "block sizes must divide each other"),
        ({}, {"workers": ["tcp://s:1", "tcp://s:2"]}, "ranks are missing"),
        ({}, {"models": []}, "serves no model"),
    ],
)
def test_what_cannot_be_ordered_is_counted_once_by_reason(
    request_changes: dict[str, Any], peer_changes: dict[str, Any], reason: str
) -> None:
    b = bench(peer(**peer_changes))
    request = Request(100, HINT)
    for name, value in request_changes.items():
        setattr(request, name, value)
    assert [b.placing.tokens_to_load(request, 0) for _ in range(2)] == [0, 0]
    assert b.placing.take_fallbacks() == {reason: 1}


def test_an_engine_does_not_order_from_itself() -> None:
    b = bench(peer(id=EngineId("me")))
    assert b.place(Request(100, {"llmd": {"source": "me"}})) == 0


def test_a_source_that_leaves_between_question_and_order_is_still_ordered_from() -> None:
    b = bench()
    request = Request(100, HINT)
    b.placing.tokens_to_load(request, 0)
    b.members.clear()
    b.placing.allocated(request, 99, [[SimpleNamespace(block_id=i, is_null=False) for i in range(4)]])
    assert len(b.client.placed) == 1


def test_an_answer_that_vllm_does_not_use_places_nothing() -> None:
    b = bench()
    request = Request(100, HINT)
    b.placing.tokens_to_load(request, 0)
    b.placing.allocated(request, 0, [[]])
    assert not b.client.placed
    assert not b.placing


def test_a_finished_request_that_still_waits_hangs_up_and_fails_its_order() -> None:
    b = bench()
    request = Request(100, HINT)
    b.place(request)
    b.placing.finished(request)
    assert b.step().failures == [Fail(b.client.placed[0].ticket.order, CANCELLED)]
    assert b.client.cancelled == [b.client.placed[0].ticket.order]


def test_results_of_orders_reach_the_workers() -> None:
    b = bench()
    b.place(Request(100, HINT))
    b.client.answers = [OrderResult(OrderId("a"), None), OrderResult(OrderId("b"), "source answered 500")]
    plan = b.step()
    assert plan.finishes == [Finish(OrderId("a"))]
    assert plan.failures == [Fail(OrderId("b"), "source answered 500")]


# --- what travels with an order -----------------------------------------------------------------------------------


def test_the_salt_travels_with_the_order() -> None:
    b = bench()
    b.place(Request(100, HINT, cache_salt="tenant"))
    assert b.client.placed[0].body["cache_salt"] == "tenant"


@pytest.mark.parametrize("priorities", [True, False])
def test_the_priority_travels_to_a_source_that_schedules_by_it(priorities: bool) -> None:
    b = bench(peer(priorities=priorities))
    b.place(Request(100, HINT, priority=7))
    assert b.client.placed[0].body.get("priority") == (7 if priorities else None)


@pytest.mark.parametrize(("said", "told"), [(0, None), (-9, -9), ("first", 7), (2**70, 7), (True, 7)])
def test_what_the_router_says_of_the_order_goes_before_the_priority_of_the_request(
    said: object, told: int | None
) -> None:
    b = bench(peer(priorities=True))
    b.place(Request(100, {"llmd": {"sources": [{"engine": "s", "priority": said}]}}, priority=7))
    assert b.client.placed[0].body.get("priority") == told


def test_an_adapter_travels_by_name_with_a_digest_of_its_weights(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    b = bench()
    b.place(Request(100, HINT, lora_request=SimpleNamespace(lora_name="law", lora_path=str(tmp_path))))
    assert b.client.placed[0].body["model"] == "law"
    assert len(b.client.placed[0].ticket.adapter) == 32


def test_a_trace_travels_from_the_requests_headers_or_from_the_hint() -> None:
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    b = bench()
    b.place(Request(100, HINT, "one", trace_headers={"traceparent": parent}))
    b.place(Request(100, {"llmd": {"source": "s", "trace": parent}}, "two"))
    assert [order.headers["traceparent"] for order in b.client.placed] == [parent, parent]


def test_what_is_left_of_the_deadline_travels_and_its_passing_gives_the_order_up() -> None:
    b = bench()
    request = Request(100, {"llmd": {"source": "s", "deadline_ms": 500}})
    b.placing.arrived(request)
    b.clock.advance(100)
    tokens = b.placing.tokens_to_load(request, 0)
    assert tokens == 99
    b.placing.allocated(request, tokens, [[SimpleNamespace(block_id=i, is_null=False) for i in range(4)]])
    assert b.client.placed[0].ticket.deadline_ms == 400
    assert b.step().failures == []
    b.clock.advance(401)
    assert b.step().failures == [Fail(b.client.placed[0].ticket.order, "deadline passed")]
    assert b.step().failures == []


# --- several sources, groups and sizes ----------------------------------------------------------------------------


def two_sources(**until: int) -> dict[str, Any]:
    return {"llmd": {"sources": [{"engine": "a", **until}, {"engine": "b"}]}}


def test_two_sources_supply_successive_parts() -> None:
    b = bench(peer(id=EngineId("a")), peer(id=EngineId("b")))
    assert b.place(Request(200, two_sources(until=100))) == 199
    first, second = b.client.placed
    assert (first.ticket.source, first.ticket.first_token, first.ticket.end_token) == ("a", 0, 96)
    assert (second.ticket.source, second.ticket.first_token, second.ticket.end_token) == ("b", 96, 199)
    ((one, other),) = b.step().loads
    assert (one.spec.wanted[0].blocks, other.spec.wanted[0].blocks) == ((0, 1, 2), (3, 4, 5, 6))


def test_what_the_first_source_would_supply_may_be_here_already() -> None:
    b = bench(peer(id=EngineId("a")), peer(id=EngineId("b")))
    assert b.place(Request(200, two_sources(until=100)), 128) == 71
    (order,) = b.client.placed
    assert (order.ticket.source, order.ticket.first_token) == ("b", 128)


def test_a_source_that_cannot_be_used_leaves_its_part_to_the_next() -> None:
    b = bench(peer(id=EngineId("b")))
    assert b.place(Request(200, two_sources(until=100))) == 199
    assert [order.ticket.source for order in b.client.placed] == ["b"]
    assert b.placing.take_fallbacks() == {"unknown engine": 1}


def test_a_prefix_alone_can_be_fetched_and_the_rest_is_computed_here() -> None:
    b = bench()
    assert b.place(Request(200, {"llmd": {"sources": [{"engine": "s", "until": 100}]}})) == 96
    assert b.client.placed[0].body["prompt"] == list(range(97))


@pytest.mark.parametrize(("least", "computed", "ordered"), [(96, 0, 96), (97, 0, 0), (64, 32, 64), (65, 32, 0)])
def test_fewer_tokens_than_the_hint_says_are_not_ordered(least: int, computed: int, ordered: int) -> None:
    b = bench()
    hint = {"llmd": {"sources": [{"engine": "s", "until": 100, "least": least}]}}
    assert b.place(Request(200, hint), computed=computed) == ordered
    assert b.placing.take_fallbacks() == {}


def test_a_prefix_ends_where_a_block_ends_on_both_sides() -> None:
    b = bench(peer(geometry=geometry((64, 0))))
    assert b.place(Request(200, {"llmd": {"sources": [{"engine": "s", "until": 100}]}})) == 64
    ((load,),) = b.step().loads
    assert (load.spec.wanted[0].source_block_size, load.spec.wanted[0].cell) == (64, 32)


def test_of_a_window_only_the_blocks_that_vllm_keeps_are_wanted() -> None:
    hybrid = geometry((BLOCK, 0), (BLOCK, 64))
    b = bench(peer(geometry=hybrid), geometry=hybrid)
    b.place(Request(200, HINT), nulls=4, groups=2)
    ((load,),) = b.step().loads
    full, window = load.spec.wanted
    assert (full.first_token, full.layers, full.blocks) == (0, 0b11, (0, 1, 2, 3, 4, 5, 6))
    assert (window.first_token, window.layers, window.blocks) == (128, 0b1100, (104, 105, 106))


# --- prefixes on their way ----------------------------------------------------------------------------------------


def hashes(count: int, name: str = "h") -> list[str]:
    return [f"{name}{i}" for i in range(count)]


def test_a_prefix_that_is_on_its_way_is_waited_for() -> None:
    b = bench()
    first = Request(200, HINT, "first", block_hashes=hashes(6))
    b.place(first)
    second = Request(150, HINT, "second", block_hashes=hashes(4))
    assert b.place(second) is None
    assert (len(b.placing.deferred), len(b.client.placed)) == (1, 1)
    first.waits = False
    assert b.place(second) == 149
    assert not b.placing.deferred


def test_a_request_without_a_hint_waits_too() -> None:
    b = bench()
    b.place(Request(200, HINT, "first", block_hashes=hashes(6)))
    assert b.place(Request(150, None, "second", block_hashes=hashes(4))) is None


def test_another_prompt_is_not_held_up() -> None:
    b = bench()
    b.place(Request(200, HINT, "first", block_hashes=hashes(6)))
    assert b.place(Request(150, HINT, "second", block_hashes=hashes(4, "other"))) == 149


def test_a_shared_prefix_too_short_to_order_is_not_waited_for() -> None:
    b = bench(min_order_tokens=100)
    b.place(Request(200, HINT, "first", block_hashes=hashes(6)))
    mixed = [*hashes(3), "x", "y"]
    assert b.place(Request(170, HINT, "second", block_hashes=mixed)) == 169


@pytest.mark.parametrize(
    ("first", "common", "second", "waits"),
    [(12, 6, 12, True), (12, 5, 12, False), (12, 5, 10, False), (12, 6, 6, True), (6, 6, 12, True), (6, 6, 13, False)],
)
def test_what_comes_must_be_half_of_what_either_lacks_to_be_waited_for(
    first: int, common: int, second: int, waits: bool
) -> None:
    """Of `first` and `second` blocks, the first are `common`."""
    b = bench()
    b.place(Request(32 * first + 10, HINT, "first", block_hashes=hashes(first)))
    mixed = [*hashes(common), *hashes(second - common, "own")]
    assert (b.place(Request(32 * second + 10, HINT, "second", block_hashes=mixed)) is None) == waits


def test_who_has_most_of_it_cached_does_not_wait_for_what_comes_after_it() -> None:
    b = bench()
    b.place(Request(410, HINT, "first", block_hashes=hashes(12)), computed=320)
    assert b.place(Request(410, HINT, "second", block_hashes=hashes(12)), computed=320) is None
    mixed = [*hashes(10), "x", "y"]
    assert b.place(Request(410, HINT, "third", block_hashes=mixed), computed=320) == 89


def test_nobody_waits_for_a_request_that_is_over() -> None:
    b = bench()
    first = Request(200, HINT, "first", block_hashes=hashes(6))
    b.place(first)
    b.placing.finished(first)
    assert b.place(Request(150, HINT, "second", block_hashes=hashes(4))) == 149


# --- room ---------------------------------------------------------------------------------------------------------


def test_requests_wait_only_for_as_much_as_leaves_room_for_the_orders_served() -> None:
    b = bench(capacity=20)
    b.room.serves(RequestId("served"), 10)
    assert b.place(Request(300, HINT, "fits")) == 299
    assert b.place(Request(300, HINT, "does not")) == 0
    assert b.placing.take_fallbacks() == {"no room to wait": 1}
    b.placing.ended(RequestId("fits"), ended(None))
    assert b.place(Request(300, HINT, "fits now")) == 299


def test_the_youngest_gives_way() -> None:
    b = bench()
    b.place(Request(100, HINT, "old"))
    b.place(Request(100, HINT, "young"))
    b.placing.give_way()
    assert b.step().failures == [Fail(b.client.placed[1].ticket.order, GAVE_WAY)]
