"""What the scheduler side serves: which tickets hold, what each step announces, what stays pinned."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from vllm_llmd.kv_connector.adapters import digest
from vllm_llmd.kv_connector.orders import ORDER_KEY
from vllm_llmd.kv_connector.placing import OrderPolicy
from vllm_llmd.kv_connector.room import Room
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.serving import PinBook, Serving, Streaming
from vllm_llmd.kv_connector.steps import StepPlan
from vllm_llmd.kv_connector.ticket import Ticket, ticket_text
from vllm_llmd.names import EngineId, Epoch, OrderId, RequestId
from vllm_llmd.testing.clock import FakeClock
from vllm_llmd.testing.pool import FakeBlock, FakePool
from vllm_llmd.wire import Geometry, GroupShape

BLOCK = 32


@dataclass
class Pool(FakePool):
    """A block pool that counts pins; every request has blocks 100, 101, ..., of the second group 200, 201, ..."""

    groups: int = 1
    blocks: dict[int, FakeBlock] = field(default_factory=dict)

    def blocks_of(self, request_id: str) -> list[list[FakeBlock]]:
        return [
            [self.blocks.setdefault(i, FakeBlock(i)) for i in range(first, first + 20)]
            for first in range(100, 100 + 100 * self.groups, 100)
        ]

    def pinned(self) -> list[int]:
        return sorted(block.block_id for block in self.blocks.values() if block.refs)


@dataclass
class Request:
    """What the connector reads of a vLLM request."""

    num_prompt_tokens: int
    kv_transfer_params: Any
    request_id: str = "r"
    num_computed_tokens: int = 0
    lora_request: Any = None


def ticket(seal: Seal | None = None, **changes: Any) -> dict[str, Any]:
    me = EngineId("me")
    end = changes.pop("end_token", 64)
    plain = Ticket(OrderId("o"), me, Epoch(1), EngineId("d"), Epoch(5), 1, "same", 0, end, 1000)
    changed = msgspec.structs.replace(plain, **changes)
    if seal is not None:
        changed = msgspec.structs.replace(changed, mac=seal.sign(ticket_text(changed)))
    return {ORDER_KEY: msgspec.to_builtins(changed)}


@dataclass
class Bench:
    serving: Serving
    pool: Pool
    pins: PinBook
    room: Room
    clock: FakeClock

    def step(self, request: Request, tokens: int) -> StepPlan:
        plan = StepPlan()
        self.serving.fill(plan, {RequestId(request.request_id): tokens}, {RequestId(request.request_id): request})
        request.num_computed_tokens += tokens
        return plan

    def start(self, tokens: int, **changes: Any) -> Request:
        request = Request(tokens, ticket(end_token=tokens, **changes))
        self.serving.arrived(request)
        return request


def bench(*groups: tuple[int, int], capacity: int = 1000, seal: Seal | None = None, tp: int = 1) -> Bench:
    shapes = [GroupShape(size, 2, window) for size, window in groups or ((BLOCK, 0),)]
    pool, clock, room = Pool(len(shapes)), FakeClock(), Room(capacity)
    pins = PinBook(pool)
    policy = OrderPolicy(
        EngineId("me"),
        Epoch(1),
        "same",
        Geometry(tp, 4, "cells", shapes),
        (3, 12),
        BLOCK,
        True,
        1,
        1000,
        seal or Seal(None),
    )
    return Bench(Serving(policy, pool, pins, room, clock), pool, pins, room, clock)


def strips(plan: StepPlan) -> list[tuple[int, int, list[int], bool]]:
    """(sequence number, first block, blocks, last) of ranges with one strip each."""
    return [
        (r.message.seq, r.message.strips[0].first_block, r.message.strips[0].blocks, r.message.last)
        for r in plan.ranges
    ]


# --- ranges -------------------------------------------------------------------------------------------------------


def test_each_step_announces_the_blocks_that_it_completes() -> None:
    b = bench()
    request = b.start(100)
    announced = [strips(b.step(request, tokens)) for tokens in (20, 40, 40)]
    assert announced == [[], [(0, 0, [100], False)], [(1, 1, [101, 102, 103], True)]]
    assert b.pool.pinned() == [100, 101, 102, 103]


def test_blocks_that_the_destination_has_are_not_announced() -> None:
    b = bench()
    request = b.start(100, first_token=64)
    assert strips(b.step(request, 100)) == [(0, 2, [102, 103], True)]


def test_what_the_source_has_cached_is_announced_before_the_step_runs() -> None:
    b = bench()
    request = b.start(100)
    request.num_computed_tokens = 64
    plan = b.step(request, 36)
    (cached,) = plan.cached
    assert (cached.message.strips[0].blocks, cached.message.last) == ([100, 101], False)
    assert strips(plan) == [(1, 2, [102, 103], True)]


def test_what_another_request_computes_in_this_very_step_is_not_announced_before_it() -> None:
    """vLLM finds it in its cache already: the blocks of all requests are the same ones here."""
    b = bench()
    order, other = b.start(3 * BLOCK), Request(3 * BLOCK, None, "other", num_computed_tokens=BLOCK)
    order.num_computed_tokens = 2 * BLOCK
    plan = StepPlan()
    scheduled = {RequestId("other"): BLOCK, RequestId("r"): BLOCK}
    b.serving.fill(plan, scheduled, {RequestId("other"): other, RequestId("r"): order})
    assert [each.message.strips[0].blocks for each in plan.cached] == [[100]]
    assert [each.message.strips[0].blocks for each in plan.ranges] == [[101, 102]]


def test_a_prefix_that_is_cached_to_its_end_needs_no_step() -> None:
    b = bench()
    request = Request(65, ticket(end_token=64))
    b.serving.arrived(request)
    request.num_computed_tokens = 64
    plan = b.step(request, 1)
    (cached,) = plan.cached
    assert (cached.message.strips[0].blocks, cached.message.last) == ([100, 101], True)
    assert plan.ranges == []


def test_nothing_is_announced_beyond_the_order() -> None:
    b = bench()
    request = Request(200, ticket(end_token=64))
    b.serving.arrived(request)
    assert strips(b.step(request, 200)) == [(0, 0, [100, 101], True)]


def test_a_preempted_source_request_announces_nothing_twice() -> None:
    b = bench()
    request = b.start(100)
    b.step(request, 64)
    request.num_computed_tokens = 0
    assert strips(b.step(request, 64)) == []
    assert strips(b.step(request, 36)) == [(1, 2, [102, 103], True)]
    assert max(block.refs for block in b.pool.blocks.values()) == 1


def test_of_a_window_only_what_the_prompts_last_token_sees_is_announced() -> None:
    b = bench((BLOCK, 0), (BLOCK, 64))
    request = b.start(256)
    first, last = b.step(request, 128), b.step(request, 128)
    assert [strip.group for strip in first.ranges[0].message.strips] == [0]
    assert [(strip.group, strip.blocks[0]) for strip in last.ranges[0].message.strips] == [(0, 104), (1, 206)]
    assert 205 not in b.pool.pinned()


def test_blocks_that_a_window_has_passed_by_are_not_announced() -> None:
    b = bench((BLOCK, 0), (BLOCK, 128))
    request = b.start(160)
    for block in b.pool.blocks_of("r")[1][:3]:
        block.is_null = True
    (planned,) = b.step(request, 160).ranges
    assert planned.message.strips[1].first_block == 3
    assert planned.message.strips[1].blocks == [203, 204]


def test_the_last_range_may_be_announced_layer_by_layer() -> None:
    b = bench()
    b.serving.streaming = Streaming(True, 4, 1 << 20)
    request = b.start(96)
    first, last = b.step(request, 64), b.step(request, 32)
    assert [(r.message.first_layer, r.message.end_layer) for r in first.ranges] == [(0, 0)]
    assert [(r.message.first_layer, r.message.end_layer, r.message.last) for r in last.ranges] == [
        (0, 1, False), (1, 2, False), (2, 3, False), (3, 4, True)
    ]  # fmt: skip
    assert b.pool.blocks[102].refs == 4


@pytest.mark.parametrize(
    ("blocks", "slices"), [(1, [(0, 4)]), (2, [(0, 2), (2, 4)]), (9, [(0, 1), (1, 2), (2, 3), (3, 4)])]
)
def test_layers_are_announced_together_until_they_are_worth_a_message(
    blocks: int, slices: list[tuple[int, int]]
) -> None:
    assert Streaming(True, 4, 1 << 16).slices(blocks) == slices


# --- pins ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "readers", "holders"), [(1, 1, 1), (2, 2, 2), (1, 2, 2), (4, 2, 4)])
def test_a_range_is_unpinned_when_every_pair_of_ranks_has_let_go(tp: int, readers: int, holders: int) -> None:
    b = bench(tp=tp)
    request = b.start(64, destination_tp=readers)
    b.step(request, 64)
    for _ in range(holders):
        assert b.pool.pinned() == [100, 101]
        b.pins.release({(OrderId("o"), 0): 1})
    assert b.pool.pinned() == []
    assert (len(b.pins), b.pins.blocks) == (0, 0)


def test_a_source_request_that_ends_early_withdraws_the_order() -> None:
    b = bench()
    request = b.start(100)
    b.step(request, 64)
    b.serving.finished(request)
    assert b.serving.has_news
    plan = StepPlan()
    b.serving.fill(plan, {}, {})
    assert [withdrawal.order for withdrawal in plan.withdrawals] == ["o"]
    assert not b.serving.has_news


def test_a_served_request_says_so_in_its_response() -> None:
    b = bench()
    request = b.start(64)
    b.step(request, 64)
    assert b.serving.finished(request) == {ORDER_KEY: {"order": "o", "ranges": 1}}
    assert not b.serving.has_news


def test_an_order_whose_deadline_has_passed_is_not_gone_on_with() -> None:
    b = bench()
    request = b.start(100, deadline_ms=500)
    b.step(request, 64)
    b.clock.advance(501)
    plan = b.step(request, 36)
    assert plan.ranges == []
    assert [withdrawal.reason for withdrawal in plan.withdrawals] == ["deadline passed"]


# --- tickets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": EngineId("other")}, "meant for other"),
        ({"source_epoch": Epoch(2)}, "which has ended"),
        ({"fingerprint": "other"}, "fingerprint"),
        ({"version": 9}, "protocol 9"),
        ({"first_token": -1}, "are not within"),
        ({"first_token": 64}, "are not within"),
        ({"end_token": 65}, "are not within the order's prompt of 64"),
        ({"lease_ms": 0}, "lease_ms"),
        ({"lease_ms": 10**9}, "lease_ms"),
        ({"deadline_ms": -1}, "deadline_ms"),
        ({"adapter": "law"}, "adapter differs"),
    ],
)
def test_a_ticket_that_does_not_hold_is_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    b = bench()
    request = Request(64, ticket(**changes))
    b.serving.arrived(request)
    plan = b.step(request, 64)
    (withdrawal,) = plan.withdrawals
    assert words in withdrawal.reason
    assert plan.ranges == []
    assert b.pool.pinned() == []
    assert sum(b.serving.refused.values()) == 1


@pytest.mark.parametrize("tp", [0, -1, 3, 10**9])
def test_a_ticket_of_an_impossible_engine_is_ignored(tp: int) -> None:
    b = bench()
    request = Request(64, ticket(destination_tp=tp))
    b.serving.arrived(request)
    plan = b.step(request, 64)
    assert (plan.ranges, plan.withdrawals) == ([], [])


def test_an_order_that_comes_twice_is_served_once_and_not_withdrawn() -> None:
    b = bench()
    request = b.start(64)
    again = Request(64, request.kv_transfer_params, "again")
    b.serving.arrived(again)
    assert b.step(again, 64).withdrawals == []
    assert len(b.step(request, 64).ranges) == 1
    assert b.serving.refused == {"order came before": 1}


@pytest.mark.parametrize("raw", [{}, [], "x", {"order": 1}])
def test_what_is_no_ticket_is_no_order(raw: object) -> None:
    b = bench()
    request = Request(64, {ORDER_KEY: raw})
    b.serving.arrived(request)
    assert b.step(request, 64).ranges == []
    assert b.serving.refused == {"unusable ticket": 1}


@pytest.mark.parametrize("params", [None, [], "x", {}])
def test_an_ordinary_request_is_none(params: object) -> None:
    b = bench()
    b.serving.arrived(Request(64, params))
    assert b.serving.refused == {}


def test_with_a_secret_only_signed_tickets_hold_and_others_move_nothing() -> None:
    seal = Seal("fleet")
    for good, signed in ((True, ticket(seal)), (False, ticket()), (False, ticket(Seal("other")))):
        b = bench(seal=seal)
        request = Request(64, signed)
        b.serving.arrived(request)
        plan = b.step(request, 64)
        assert bool(plan.ranges) is good
        assert plan.withdrawals == []


def test_a_signature_does_not_cover_a_changed_ticket() -> None:
    seal = Seal("fleet")
    params = ticket(seal)
    params[ORDER_KEY]["first_token"] = 1
    b = bench(seal=seal)
    request = Request(64, params)
    b.serving.arrived(request)
    assert b.step(request, 64).ranges == []


def test_an_adapter_is_known_by_its_weights(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode() * 99)
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    for theirs, good in ((here, True), (there, False)):
        b = bench()
        adapter = SimpleNamespace(lora_name="law", lora_path=here)
        request = Request(64, ticket(adapter=digest(theirs)), lora_request=adapter)
        b.serving.arrived(request)
        assert bool(b.step(request, 64).ranges) is good


def test_an_order_without_room_beside_those_that_wait_is_refused() -> None:
    b = bench(capacity=10)
    b.room.waits(RequestId("mine"), 8)
    request = b.start(96)
    (withdrawal,) = b.step(request, 96).withdrawals
    assert "no room" in withdrawal.reason
