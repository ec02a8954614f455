"""Which best-effort requests are given up so that one that waits has room. Pure.

A request of negative priority that engines have and have not begun to answer may be given up for one of priority 0 or
more that finds all its engines saturated: as few as it takes, and nobody if that does not make room. It goes back into
the queue, `most` times at most, and only while it has half of its time to wait before it.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Places, Roster
from vllm_llmd.router.members.membership import Engine
from vllm_llmd.router.slo import MOST_URGENT
from vllm_llmd.router.waiting import saturation
from vllm_llmd.router.waiting.flow import Flow, Item

MOST_VICTIMS: Final = 8
"""So many at most go for one."""
LOOKED_AT: Final = 256
ENGINES_LOOKED_AT: Final = 16
"""Of the requests that might go the first, and of the engines that have them: each of these is tried."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Running:
    """A request that `engines` have and have not begun to answer; `item` as it came. It was `given_up` so often."""

    item: Item
    engines: tuple[EngineId, ...]
    placed_ms: float
    given_up: int

    def may_go(self, now_ms: float) -> bool:
        """Whether enough of its time is left to wait again."""
        return now_ms - self.item.arrived_ms <= self.item.expires_ms - now_ms


@dataclass
class _Claim:
    """What a request that waits is to have: room at these engines, once those that give way have gone."""

    item: Item
    engines: tuple[EngineId, ...]
    going: set[str]


class Preemption:
    """`began` and `ended` say what may be given up, `victims` who is, and `waits_no_more` that it is settled."""

    def __init__(self, limits: saturation.Limits, flow: Flow, most: int) -> None:
        self._limits = limits
        self._flow = flow
        self._most = most
        self._running: dict[str, Running] = {}
        self._bands: dict[int, dict[str, Running]] = {}
        self._at: dict[EngineId, dict[str, Running]] = {}
        self._claims: dict[str, _Claim] = {}

    def __len__(self) -> int:
        """How many might be given up."""
        return len(self._running)

    def began(self, running: Running) -> None:
        """The request is with its engines. Only best effort that was not given up too often is of interest."""
        if running.item.priority < 0 and running.given_up < self._most:
            self._running[running.item.id] = running
            self._bands.setdefault(running.item.priority, {})[running.item.id] = running
            for engine in running.engines:
                self._at.setdefault(engine, {})[running.item.id] = running

    def ended(self, request: str) -> None:
        """It has begun to answer, or is with its engines no more."""
        running = self._running.pop(request, None)
        if running is None:
            return
        _drop(self._bands, running.item.priority, request)
        for engine in running.engines:
            _drop(self._at, engine, request)
        for claim in self._claims.values():
            claim.going.discard(request)

    def waits_no_more(self, request: str) -> None:
        """Who waited is about to be placed, or has left."""
        self._claims.pop(request, None)

    def victims(self, waiter: Item, roster: Roster, now_ms: float) -> list[Item]:
        """Who gives way to it now. Nobody while others still do so for its sake."""
        claim = self._claims.get(waiter.id)
        if not self._running or waiter.priority < 0 or (claim is not None and claim.going):
            return []
        self.waits_no_more(waiter.id)
        chosen: dict[str, Running] = {}
        engines = []
        for places in _needed(waiter, roster):
            if any(not saturation.saturated(roster.engines[place], self._limits, now_ms) for place in places):
                continue
            found = self._room_at(
                {roster.engines[place].info.id: roster.engines[place] for place in places}, chosen, now_ms
            )
            if found is None:
                return []
            engines.append(found[0].info.id)
            chosen |= found[1]
        if not engines or not self._can_wait(list(chosen.values())):
            return []
        self._claims[waiter.id] = _Claim(waiter, tuple(engines), set(chosen))
        return [running.item for running in chosen.values()]

    def _can_wait(self, chosen: list[Running]) -> bool:
        """Whether the queue has room for all of them: nobody is given up to be refused."""
        return self._flow.has_room(len(chosen), sum(running.item.size_bytes for running in chosen))

    def _room_at(
        self, engines: Mapping[EngineId, Engine], gone: dict[str, Running], now_ms: float
    ) -> tuple[Engine, dict[str, Running]] | None:
        """The engine where least is lost by it, and who has to go there besides `gone`. None if there is none."""
        found = [
            (engines[engine], going)
            for engine in itertools.islice(self._engines_in_order(engines), ENGINES_LOOKED_AT)
            if (going := self._going_at(engines[engine], gone, now_ms)) is not None
        ]
        return min(found, key=lambda each: _loss(each[1].values()), default=None)

    def _engines_in_order(self, engines: Mapping[EngineId, Engine]) -> Iterator[EngineId]:
        """Those of them that have best effort: where the lowest priority is first, and of one where the latest is."""
        latest = (reversed(self._bands[priority].values()) for priority in sorted(self._bands))
        seen: set[EngineId] = set()
        for running in itertools.islice(itertools.chain.from_iterable(latest), LOOKED_AT):
            for engine in running.engines:
                if engine in engines and engine not in seen:
                    seen.add(engine)
                    yield engine

    def _going_at(self, engine: Engine, gone: dict[str, Running], now_ms: float) -> dict[str, Running] | None:
        """Who has to go so that the engine has room for one more, none of whom could stay; None if it never has."""
        here = self._at.get(engine.info.id, {})
        already = {*gone, *(request for claim in self._claims.values() for request in claim.going)}
        going: dict[str, Running] = {}
        for running in self._in_order(here, already, now_ms):
            if not self._is_full(engine, {*already, *going}, now_ms):
                break
            going[running.item.id] = running
        if self._is_full(engine, {*already, *going}, now_ms):
            return None
        for request in list(going):
            if not self._is_full(engine, {*already, *going} - {request}, now_ms):
                del going[request]
        return going

    def _in_order(self, here: dict[str, Running], already: set[str], now_ms: float) -> list[Running]:
        """Who may go: the lowest priority first, and of one the latest to be placed."""
        may_go = [each for each in here.values() if each.item.id not in already and each.may_go(now_ms)]
        return sorted(may_go, key=lambda each: (each.item.priority, -each.placed_ms))[:MOST_VICTIMS]

    def _is_full(self, engine: Engine, gone: set[str], now_ms: float) -> bool:
        """Whether the engine would be saturated without those, and with those that it is claimed for."""
        own = engine.occupancy.copied(engine.load_at_ms)
        for request in gone:
            own.ended(request)
        for claim in self._claims.values():
            if engine.info.id in claim.engines:
                own.sent(claim.item.id, claim.item.tokens)
        return saturation.would_be_saturated(engine, own, self._limits, now_ms)


def _needed(waiter: Item, roster: Roster) -> list[Places]:
    """Among whom there has to be room."""
    sources = [roster.prefillers] if waiter.pool.needs_source and len(roster.prefillers) else []
    return [roster.decoders, *sources]


def _drop(kept: dict[Key, dict[str, Running]], key: Key, request: str) -> None:
    del kept[key][request]
    if not kept[key]:
        del kept[key]


def _loss(going: Iterable[Running]) -> tuple[int, int, float]:
    """What giving them up costs: least where priorities are low, then where few go, then where they came late."""
    each = list(going)
    if not each:
        return -MOST_URGENT - 1, 0, 0.0
    return max(one.item.priority for one in each), len(each), -min(one.placed_ms for one in each)
