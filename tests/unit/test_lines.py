"""Requests that wait for one engine though others have room: in made-up time, against what that promises."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router.candidates import Candidates, Loads, RateColumns
from vllm_llmd.router.decide import decision_of
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.placement.prospects import Prospect, prospect
from vllm_llmd.router.placement.rosters import Wanted
from vllm_llmd.router.policy import Choice
from vllm_llmd.router.request import Facts
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.slo import Wish
from vllm_llmd.router.waiting.flow import Arrival, Pool
from vllm_llmd.router.waiting.room import WaitingRoom
from vllm_llmd.testing.virtual_loop import VirtualLoop
from vllm_llmd.wire import EngineInfo

FACTS = Facts("m", None, b"", b"", 100, None)


@dataclass(frozen=True)
class LoopClock:
    loop: asyncio.AbstractEventLoop

    def now_ms(self) -> float:
        return self.loop.time() * 1000


@dataclass
class Wants:
    """A policy: `engine` costs nothing, others `more_ms`; each that is ahead costs `ahead_ms`."""

    engine: str
    more_ms: float
    ahead_ms: float = 0.0

    def choose(self, _: Facts, candidates: Candidates) -> Choice | None:
        roster = candidates.roster
        price = np.array([self.ahead_ms * float(candidates.loads.requests[place]) for place in roster.decoders])
        price += [0.0 if roster.id(int(place)) == self.engine else self.more_ms for place in roster.decoders]
        at = int(price.argmin())
        return Choice(int(roster.decoders[at]), terms={"queue_ms": float(price[at])})


@dataclass
class Place:
    """A waiting room before engines a, b and c, each of which runs one request at a time."""

    served: list[tuple[str, str]] = field(default_factory=list)
    at_ms: dict[str, float] = field(default_factory=dict)
    shed: dict[str, str] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = LoopClock(asyncio.get_running_loop())
        made = RouterSettings(engine_queue=0, **self.changes)
        self.fleet = Fleet(made, self.clock, "r")
        for name in "abc":
            info = EngineInfo(EngineId(name), Epoch(1), "both", "", ["m"], 16, 99, 999, "f", [], max_sequences=1)
            self.fleet.membership.join(info, self.clock.now_ms())
            self.fleet.membership.index_exact(EngineId(name))
        self.room = WaitingRoom(made, self.fleet, Metrics(self.fleet), self.clock)

    def plan(self, policy: Wants) -> Prospect | None:
        return prospect(FACTS, self.candidates(), policy, self.room.is_saturated)

    def candidates(self) -> Candidates:
        roster = self.fleet.roster(Wanted("m"))
        none = np.zeros(len(roster.engines), np.int64)
        return Candidates(roster, none, none, none, Loads.of(roster.engines), RateColumns.of(roster.engines))

    async def ask(self, name: str, policy: Wants, takes_ms: float, wish: Wish | None = None) -> None:
        arrival = Arrival(name, Pool(Wanted("m"), False), 100, None, 10, self.clock.now_ms())
        shed = await self.room.admit(arrival, wish or Wish(), partial(self.plan, policy))
        if shed is not None:
            self.shed[name] = shed.reason
            return
        made = self.plan(policy)
        if made is None:
            return
        decision = decision_of(made.choice, FACTS, self.candidates())
        self.fleet.place(name, decision, FACTS, self.fleet.cut(FACTS))
        self.served.append((name, decision.destination))
        self.at_ms[name] = self.clock.now_ms()
        try:
            await asyncio.sleep(takes_ms / 1000)
        finally:
            self.fleet.done(name, decision)
            self.room.look(decision.destination, decision.source)

    def nothing_left(self) -> None:
        for engine in self.fleet.membership.all():
            assert (engine.line_requests, engine.line_tokens, len(engine.occupancy)) == (0, 0, 0)
        assert not len(self.room)


def run(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    loop = VirtualLoop()
    try:
        loop.run_until_complete(asyncio.wait_for(story(), 1000))
    finally:
        loop.close()


def start(place: Place, *asks: tuple[str, Wants, float]) -> list["asyncio.Task[None]"]:
    return [asyncio.ensure_future(place.ask(*each)) for each in asks]


def test_a_request_waits_for_the_engine_that_is_worth_it_and_goes_there() -> None:
    async def story() -> None:
        place = Place()
        tasks = start(place, ("first", Wants("a", 9e9), 300), ("second", Wants("a", 1000), 10))
        await asyncio.gather(*tasks)
        assert place.served == [("first", "a"), ("second", "a")]
        assert place.at_ms["second"] == pytest.approx(300, abs=1)
        place.nothing_left()

    run(story)


def test_it_waits_no_longer_than_what_waiting_was_to_save() -> None:
    async def story() -> None:
        place = Place()
        tasks = start(place, ("first", Wants("a", 9e9), 60_000), ("second", Wants("a", 1000), 10))
        await asyncio.gather(*tasks)
        assert dict(place.served)["second"] in "bc"
        assert place.at_ms["second"] <= 1000 + 100
        place.nothing_left()

    run(story)


@pytest.mark.parametrize("more_ms", [0.0, 49.0, float("nan"), float("inf")])
def test_what_is_not_worth_it_or_no_number_is_not_waited_for(more_ms: float) -> None:
    async def story() -> None:
        place = Place()
        tasks = start(place, ("first", Wants("a", 1e9), 500), ("second", Wants("a", more_ms), 10))
        await asyncio.gather(*tasks)
        assert place.at_ms["second"] == pytest.approx(0, abs=1)

    run(story)


def test_those_behind_it_who_would_go_elsewhere_do() -> None:
    async def story() -> None:
        place = Place()
        asks = [("first", Wants("a", 9e9), 500), ("held", Wants("a", 9e9), 10), ("free", Wants("b", 9e9), 10)]
        await asyncio.gather(*start(place, *asks))
        assert place.at_ms["free"] == pytest.approx(0, abs=1)
        assert place.served[-1] == ("held", "a")

    run(story)


def test_priority_holds_in_the_line_of_an_engine_and_nobody_slips_in_from_outside() -> None:
    async def story() -> None:
        place, wants = Place(), Wants("a", 9e9)
        tasks = start(place, ("first", wants, 100))
        await asyncio.sleep(0)
        for name, priority in (("low", -1), ("normal", 0), ("high", 1), ("normal too", 0)):
            tasks.append(asyncio.ensure_future(place.ask(name, wants, 100, Wish(priority=priority))))
            await asyncio.sleep(0.001)
        await asyncio.gather(*tasks)
        assert [name for name, _ in place.served] == ["first", "high", "normal", "normal too", "low"]
        place.nothing_left()

    run(story)


def test_the_line_counts_as_ahead_so_that_no_more_wait_than_is_worth_it() -> None:
    async def story() -> None:
        place, wants = Place(), Wants("a", 1000, ahead_ms=300)
        tasks = start(place, *((f"{number}", wants, 250) for number in range(12)))
        await asyncio.sleep(0.001)
        assert place.fleet.membership.get(EngineId("a")).line_requests <= 4  # type: ignore[union-attr]
        await asyncio.gather(*tasks)
        place.nothing_left()

    run(story)


def test_a_plan_that_has_become_cheaper_is_taken() -> None:
    async def story() -> None:
        place, wants = Place(), Wants("a", 5000)
        tasks = start(place, ("first", Wants("a", 9e9), 3000), ("second", wants, 10))
        await asyncio.sleep(0.1)
        wants.engine = "b"
        await asyncio.gather(*tasks)
        assert place.served[1] == ("second", "b") and place.at_ms["second"] < 500

    run(story)


def test_an_engine_that_leaves_is_waited_for_no_more() -> None:
    async def story() -> None:
        place = Place()
        tasks = start(place, ("first", Wants("a", 9e9), 3000), ("second", Wants("a", 9e9), 10))
        await asyncio.sleep(0.1)
        place.fleet.membership.drain(EngineId("a"))
        await asyncio.gather(*tasks)
        assert dict(place.served)["second"] in "bc" and place.at_ms["second"] < 500

    run(story)


def test_nobody_is_sent_away_while_there_is_room_elsewhere() -> None:
    async def story() -> None:
        place = Place()
        tasks = start(place, ("first", Wants("a", 9e9), 60_000))
        await asyncio.sleep(0)
        tasks.append(asyncio.ensure_future(place.ask("short", Wants("a", 9e9), 1, Wish(ttl_ms=2000))))
        tasks.append(asyncio.ensure_future(place.ask("urgent", Wants("a", 9e9), 1, Wish(ttft_ms=500))))
        tasks.append(asyncio.ensure_future(place.ask("now", Wants("a", 9e9), 1, Wish(ttft_ms=100))))
        await asyncio.gather(*tasks)
        assert not place.shed
        assert place.at_ms["short"] < 2000 and place.at_ms["urgent"] < 500 and place.at_ms["now"] < 1

    run(story)


def test_without_a_queue_nobody_is_held() -> None:
    async def story() -> None:
        place = Place(changes={"queue_requests": 0})
        await asyncio.gather(*start(place, ("first", Wants("a", 9e9), 500), ("second", Wants("a", 9e9), 10)))
        assert place.at_ms["second"] == pytest.approx(0, abs=1) and not place.shed

    run(story)


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_whoever_stays_is_served_once_whatever_they_want_and_whoever_leaves(seed: int) -> None:
    async def story() -> None:
        rng, place = random.Random(seed), Place()
        tasks: dict[str, asyncio.Task[None]] = {}
        left = set()
        for number in range(60):
            wants = Wants(rng.choice("abc"), rng.choice([0, 60, 400, 9e9]), rng.choice([0, 20, 300]))
            wish = Wish(priority=rng.randrange(-1, 2), tenant=rng.choice("xy"))
            tasks[str(number)] = asyncio.ensure_future(place.ask(str(number), wants, rng.choice([0, 1, 50, 400]), wish))
            await asyncio.sleep(rng.choice([0, 0, 0.01, 0.3]))
            if rng.random() < 0.3:
                gone = rng.choice(list(tasks))
                if tasks[gone].cancel():
                    left.add(gone)
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        names = [name for name, _ in place.served]
        assert len(names) == len(set(names)) and not place.shed
        assert set(tasks) - set(names) <= left
        place.nothing_left()

    run(story)
