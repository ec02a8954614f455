"""Stock engines as the fleet knows them."""

import numpy as np

from vllm_llmd import wire
from vllm_llmd.kernels.block_names import NetChange
from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.kv_events_plain import Change
from vllm_llmd.names import BlockName, EngineId, Epoch
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.members.membership import State, Stock
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.stock.members import StockMembers
from vllm_llmd.testing.clock import FakeClock
from vllm_llmd.wire import EngineInfo, Load

STOCK = EngineId("stock")
NOTHING: Names = np.empty(0, np.uint64)
SOME: Names = np.array([7, 8], np.uint64)


def info(engine: str = STOCK, epoch: int = 1, block_size: int = 16) -> EngineInfo:
    return EngineInfo(EngineId(engine), Epoch(epoch), "both", "http://h", ["m"], block_size, 100, 512, "own", [])


class Joined:
    """A fleet with one stock engine in it."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.fleet = Fleet(RouterSettings(), self.clock, "life")
        self.stock = StockMembers(self.fleet, self.clock)
        assert self.stock.join(info(), Stock(None))
        self.stock.heard(STOCK, Load(running=2))
        self.stock.changed(STOCK, Change(False, NOTHING, SOME), 16)

    @property
    def held(self) -> set[int]:
        return set(self.fleet.index.held(STOCK).tolist())


def test_an_engine_that_has_answered_is_ready_with_its_load() -> None:
    [engine] = Joined().fleet.membership.ready()
    assert (engine.info.id, engine.load.running) == (STOCK, 2)


def test_a_change_is_cleared_then_removed_then_stored() -> None:
    joined = Joined()
    joined.stock.changed(STOCK, Change(False, SOME[:1], NOTHING), 16)
    assert joined.held == {8}
    joined.stock.changed(STOCK, Change(True, NOTHING, SOME[:1]), 16)
    assert joined.held == {7}


def test_a_change_of_another_tier_is_indexed_there() -> None:
    joined = Joined()
    joined.stock.changed(STOCK, Change(False, SOME, NOTHING, {"cpu": NetChange(stored={BlockName(7)})}), 16)
    assert (joined.held, joined.fleet.index.held(STOCK, "cpu").tolist()) == (set(), [7])
    joined.stock.changed(STOCK, Change(False, NOTHING, NOTHING, {"cpu": NetChange(removed={BlockName(7)})}), 16)
    assert not len(joined.fleet.index.held(STOCK, "cpu"))


def test_the_block_size_is_what_the_events_say() -> None:
    joined = Joined()
    joined.stock.changed(STOCK, Change(False, NOTHING, NOTHING), 32)
    [engine] = joined.fleet.membership.ready()
    assert engine.info.block_size == 32
    assert joined.held == {7, 8}


def test_a_new_life_starts_empty() -> None:
    joined = Joined()
    assert not joined.stock.join(info(), Stock(None))
    assert joined.held
    assert joined.stock.join(info(epoch=2), Stock(None))
    assert not joined.held


def test_nobody_is_told_of_it_and_nothing_is_asked_of_it() -> None:
    joined = Joined()
    hello = wire.Hello(info("linked"))
    joined.fleet.on_message(b"linked#1", hello)
    [published] = joined.fleet.members_to_publish()
    assert isinstance(published.message, wire.Members)
    assert [engine.id for engine in published.message.engines] == ["linked"]
    joined.fleet.verify(STOCK)
    assert {reply.to for reply in joined.fleet.tick()} <= {b"linked#1"}


def test_silence_makes_it_stale_then_gone_and_an_answer_brings_it_back() -> None:
    joined = Joined()
    settings = RouterSettings()
    joined.fleet.tick()
    for _ in range(settings.stale_after_ms // 1000 + 1):
        joined.clock.advance(1000)
        joined.fleet.tick()
    [engine] = joined.fleet.membership.all()
    assert engine.state is State.STALE
    assert joined.stock.heard(STOCK, None)
    assert engine.state is State.READY
    for _ in range(settings.gone_after_ms // 1000 + 1):
        joined.clock.advance(1000)
        joined.fleet.tick()
    assert joined.fleet.membership.all() == []
    joined.stock.changed(STOCK, Change(False, NOTHING, SOME), 16)
    assert not joined.held
    assert joined.stock.join(info(epoch=2), Stock(None))


def test_a_linked_engine_and_a_stock_engine_cannot_have_one_id() -> None:
    joined = Joined()
    [refused] = joined.fleet.on_message(b"x", wire.Hello(info(epoch=9)))
    assert isinstance(refused.message, wire.Refused)
    joined.fleet.on_message(b"linked#1", wire.Hello(info("linked")))
    assert not joined.stock.join(info("linked", epoch=5), Stock(None))
    assert not joined.stock.heard(EngineId("linked"), None)
