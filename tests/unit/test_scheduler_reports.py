"""What the scheduler side does with the workers' reports: release, quarantine, start afresh."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_llmd.kv_connector.lifecycle import CANCELLED, Drained, Outcome
from vllm_llmd.kv_connector.own_ranks import RankIntroduction
from vllm_llmd.kv_connector.report import WorkerReport
from vllm_llmd.names import Epoch, OrderId, RequestId
from vllm_llmd.settings import EngineSettings
from vllm_llmd.wire import Geometry, GroupShape

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch deprecates as vLLM imports it is not ours to mend
    pytest.importorskip("vllm")
    from vllm_llmd.kv_connector import scheduler_side
    from vllm_llmd.kv_connector.scheduler_side import DEAF_WAIT_MS, WAIT_MS, SchedulerSide
    from vllm_llmd.kv_connector.vllm_compat import BlockPoolView
    from vllm_llmd.kv_connector.vllm_facts import EngineFacts, Layer


class Pool:
    """The parts of vLLM's block pool and cache manager that BlockPoolView touches."""

    def __init__(self, events_on: bool = False) -> None:
        self.enable_kv_cache_events = events_on
        self.blocks = [SimpleNamespace(block_id=i, pins=0) for i in range(16)]
        self.num_gpu_blocks = 16
        self.block_pool = self
        self.cached: list[int] = []
        self.given_up: list[str] = []
        self.events: list[Any] = []

    def touch(self, blocks: Sequence[Any]) -> None:
        for block in blocks:
            block.pins += 1

    def free_blocks(self, blocks: Sequence[Any]) -> None:
        for block in blocks:
            assert block.pins
            block.pins -= 1

    def get_num_free_blocks(self) -> int:
        return 16

    def take_events(self) -> list[Any]:
        events, self.events = self.events, []
        return events

    def get_blocks(self, request_id: str) -> Any:
        return SimpleNamespace(blocks=(self.blocks,))

    def cache_blocks(self, request: Any, tokens: int) -> None:
        self.cached.append(tokens)

    def free(self, request: Any) -> None:
        self.given_up.append(request.request_id)

    def pinned(self) -> list[int]:
        return [block.block_id for block in self.blocks if block.pins]


@pytest.fixture
def pool() -> Pool:
    return Pool()


@contextmanager
def side_of(pool: Pool, groups: int) -> Iterator[SchedulerSide]:
    geometry = Geometry(1, 2, "cells", [GroupShape(32, 1)] * groups)
    layers = tuple(Layer(f"layers.{group}", group, "cells") for group in range(groups))
    facts = EngineFacts("me", "decode", ("m",), (), 32, 16, 999, geometry, layers, 4096, 32, True, False, "same")
    side = SchedulerSide(facts, EngineSettings(), "http://me")
    side.bind(BlockPoolView(pool))
    side.introduce([RankIntroduction("tcp://127.0.0.1:9", Epoch(1), b"key")])
    yield side
    side.close()


@pytest.fixture
def side(pool: Pool) -> Iterator[SchedulerSide]:
    with side_of(pool, groups=1) as side:
        yield side


def request() -> Any:
    return SimpleNamespace(
        request_id="r", num_prompt_tokens=200, num_computed_tokens=64, kv_transfer_params=None, block_hashes=[]
    )


def outcome(reason: str | None, missing: tuple[int, ...] = (), quarantined: tuple[int, ...] = ()) -> WorkerReport:
    report = WorkerReport()
    report.add(Outcome(OrderId("o"), RequestId("r"), reason, (0, 1, 2, 3), missing, quarantined, (), None))
    return report


def test_a_load_that_failed_cleanly_goes_on_where_vllm_truncated_it(side: SchedulerSide, pool: Pool) -> None:
    waiting = request()
    side.new_request(waiting)
    side.take_report(outcome("source stalled", missing=(3,)), ["r"])
    assert (waiting.num_computed_tokens, pool.cached, pool.pinned()) == (64, [], [])


def test_blocks_that_may_still_change_are_held_and_the_request_starts_afresh(side: SchedulerSide, pool: Pool) -> None:
    waiting = request()
    side.new_request(waiting)
    side.take_report(outcome("source stalled", missing=(2, 3), quarantined=(2, 3)), ["r"])
    assert pool.cached == [64], "the valid prefix goes into the prefix cache first"
    assert waiting.num_computed_tokens == 0
    assert pool.pinned() == [2, 3]
    assert side.keep_stepping


@pytest.mark.parametrize("quarantined", [(), (2, 3)])
def test_with_several_groups_nothing_of_a_failed_load_is_kept(pool: Pool, quarantined: tuple[int, ...]) -> None:
    """Which of a group's blocks make a valid prefix is not known, and vLLM 0.29 would take all of them for valid."""
    waiting, other = request(), request()
    other.request_id = "other"
    with side_of(pool, groups=2) as side:
        side.new_request(waiting)
        side.new_request(other)
        side.take_report(outcome("source stalled", (2, 3), quarantined), ["other"])
        side.take_report(None, ["r"])
    assert (waiting.num_computed_tokens, other.num_computed_tokens) == (0, 64)
    assert (pool.given_up, pool.cached, pool.pinned()) == (["r"], [], list(quarantined))


def test_held_blocks_are_let_go_once_their_reads_have_ended(side: SchedulerSide, pool: Pool) -> None:
    side.take_report(outcome("source stalled", missing=(2, 3), quarantined=(2, 3)), ["r"])
    for blocks in ((2,), (3,)):
        report = WorkerReport()
        report.add(Drained(OrderId("o"), blocks))
        side.take_report(report, [])
    assert pool.pinned() == []
    assert not side.keep_stepping


def test_blocks_of_a_cancelled_request_are_held_too(side: SchedulerSide, pool: Pool) -> None:
    side.take_report(outcome(CANCELLED, missing=(2,), quarantined=(2,)), ["r"])
    assert pool.pinned() == [2]


def test_two_ranks_hold_a_block_until_both_have_drained(side: SchedulerSide, pool: Pool) -> None:
    both = outcome("source stalled", (2,), (2,)).merge(outcome("source stalled", (2,), (2,)))
    side.take_report(both, ["r"])
    drained = WorkerReport()
    drained.add(Drained(OrderId("o"), (2,)))
    side.take_report(drained, [])
    assert pool.pinned() == [2]
    side.take_report(drained, [])
    assert pool.pinned() == []


def test_counts_are_those_of_the_slowest_rank_and_are_handed_over_once(side: SchedulerSide) -> None:
    side.take_report(outcome("source stalled", (2, 3)).merge(outcome("source stalled", (3,))), ["r"])
    counts = side.take_counts()
    assert counts is not None
    assert (counts.orders, counts.orders_failed, counts.blocks_loaded, counts.blocks_missing) == (1, 1, 2, 2)
    assert side.take_counts() is None


def test_events_are_handed_on_only_where_vllm_publishes_them_itself(side: SchedulerSide, pool: Pool) -> None:
    pool.events = [SimpleNamespace()]
    side.plan_step({})
    assert side.take_events() == []
    published = Pool(events_on=True)
    side.bind(BlockPoolView(published))
    published.events = [event := SimpleNamespace()]
    side.plan_step({})
    assert side.take_events() == [event]
    assert side.take_events() == []


def test_the_pool_is_made_to_tell_of_its_blocks(pool: Pool) -> None:
    assert not BlockPoolView(pool).published
    assert pool.enable_kv_cache_events


class Nudges:
    """What stands in for vLLM's arrivals and the way to the ranks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
        self.count = 0
        self.listeners: list[Callable[[], None]] = []
        monkeypatch.setattr(scheduler_side, "on_arrival", lambda heard: self.listeners.append(heard) or told)
        monkeypatch.setattr(scheduler_side, "forget_arrivals", self.listeners.remove)
        monkeypatch.setattr(scheduler_side.OwnRanks, "nudge", lambda ranks: self._nudge())

    def _nudge(self) -> None:
        self.count += 1


@pytest.mark.parametrize(("told", "wait_ms"), [(True, WAIT_MS), (False, DEAF_WAIT_MS)])
def test_a_step_waits_for_io_alone_and_shorter_where_arrivals_are_not_heard_of(
    monkeypatch: pytest.MonkeyPatch, pool: Pool, told: bool, wait_ms: float
) -> None:
    Nudges(monkeypatch, told)
    with side_of(pool, groups=1) as side:
        assert side.plan_step({}).wait_ms == 0
        side.take_report(outcome("source stalled", missing=(2,), quarantined=(2,)), [])
        assert side.plan_step({}).wait_ms == wait_ms
        assert side.plan_step({"r": 1}).wait_ms == 0


def test_an_arrival_nudges_ranks_that_may_wait(monkeypatch: pytest.MonkeyPatch, pool: Pool) -> None:
    nudges = Nudges(monkeypatch, told=True)
    with side_of(pool, groups=1) as side:
        (arrived,) = nudges.listeners
        arrived()
        assert nudges.count == 0, "no step waits"
        side.take_report(outcome("source stalled", missing=(2,), quarantined=(2,)), [])
        arrived()
        assert nudges.count == 1
    assert nudges.listeners == []
