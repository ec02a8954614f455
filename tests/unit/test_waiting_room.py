"""The edge of the queue: clients that come and go in any order, and engines that become free meanwhile."""

import asyncio
import random
from dataclasses import dataclass, field

import pytest

from vllm_llmd.clock import MonotonicClock
from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.members.membership import Engine, Placed
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.placement.rosters import Wanted
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.slo import Wish
from vllm_llmd.router.waiting.flow import Arrival, Pool, Shed
from vllm_llmd.router.waiting.room import WaitingRoom
from vllm_llmd.wire import EngineInfo

AT_A_TIME = 3
DEADLINE_S = 60


@dataclass
class Place:
    """A waiting room in front of two engines, and what became of whom."""

    settings: RouterSettings = field(default_factory=lambda: RouterSettings(engine_queue=0))
    most: int = 0
    served: list[str] = field(default_factory=list)
    shed: dict[str, Shed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        clock = MonotonicClock()
        fleet = Fleet(self.settings, clock, "r")
        for name in "ab":
            fleet.membership.join(info(name), clock.now_ms())
            fleet.membership.index_exact(EngineId(name))
        self.engines: list[Engine] = fleet.membership.ready()
        self.room = WaitingRoom(self.settings, fleet, Metrics(fleet), clock)

    async def serve(self, request: str, wish: Wish, turns: int) -> None:
        arrival = Arrival(request, Pool(Wanted("m"), False), 10, None, 100, MonotonicClock().now_ms())
        shed = await self.room.admit(arrival, wish, lambda: None)
        if shed is not None:
            self.shed[request] = shed
            return
        engine = min(self.engines, key=lambda each: len(each.occupancy))
        engine.place(request, Placed(0.0, 0))
        self.most = max(self.most, len(engine.occupancy))
        try:
            for _ in range(turns):
                await asyncio.sleep(0)
        finally:
            engine.ended(request)
            self.room.look(engine.info.id)
        self.served.append(request)


def info(name: str) -> EngineInfo:
    return EngineInfo(
        EngineId(name), Epoch(1), "both", "", ["m"], 16, 99, 99, "f", [], max_sequences=AT_A_TIME
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(30))
async def test_whoever_stays_is_served_once_whoever_leaves(seed: int) -> None:
    rng, place = random.Random(seed), Place()
    tasks, left = {}, set()
    for number in range(60):
        wish = Wish(priority=rng.randrange(-1, 2), tenant=rng.choice("xyz"))
        name = str(number)
        tasks[name] = asyncio.ensure_future(place.serve(name, wish, rng.randrange(5)))
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(0)
        if rng.random() < 0.4:
            gone = rng.choice(list(tasks))
            if tasks[gone].cancel():
                left.add(gone)
    await asyncio.wait_for(asyncio.gather(*tasks.values(), return_exceptions=True), DEADLINE_S)
    assert sorted(place.served) == sorted(tasks.keys() - left)
    assert place.most <= AT_A_TIME
    assert not place.shed


async def test_everyone_who_is_cut_short_at_once_leaves_nothing_behind() -> None:
    place = Place()
    tasks = [asyncio.ensure_future(place.serve(str(number), Wish(), 10**6)) for number in range(20)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.wait_for(place.serve("last", Wish(), 0), DEADLINE_S)
    assert place.served == ["last"]


async def test_a_wait_ends_when_its_time_is_up_though_nothing_happens() -> None:
    place = Place()
    busy = [asyncio.ensure_future(place.serve(str(number), Wish(), 10**6)) for number in range(2 * AT_A_TIME)]
    await asyncio.sleep(0)
    await asyncio.wait_for(place.serve("late", Wish(ttl_ms=1), 0), DEADLINE_S)
    assert place.shed["late"].reason == "expired"
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)


async def test_a_room_that_closes_sends_everyone_away() -> None:
    place = Place()
    tasks = [asyncio.ensure_future(place.serve(str(number), Wish(), 3)) for number in range(20)]
    await asyncio.sleep(0)
    await place.room.close()
    await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S)
    assert len(place.served) == 2 * AT_A_TIME
    assert {shed.reason for shed in place.shed.values()} == {"shutting-down"}


async def test_room_that_comes_while_a_client_goes_is_for_the_next() -> None:
    place = Place()
    busy = [asyncio.ensure_future(place.serve(str(number), Wish(), 10**6)) for number in range(2 * AT_A_TIME)]
    gone, next_ = (asyncio.ensure_future(place.serve(name, Wish(), 0)) for name in ("gone", "next"))
    await asyncio.sleep(0)
    gone.cancel()
    place.engines[0].ended("0")
    place.room.look(place.engines[0].info.id)
    await asyncio.wait_for(next_, DEADLINE_S)
    assert place.served == ["next"]
    for task in busy:
        task.cancel()
    await asyncio.gather(gone, *busy, return_exceptions=True)
