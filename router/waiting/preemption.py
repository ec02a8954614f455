"""Which best-effort requests are given up so that one that waits has room. Pure.

A request of negative priority that engines have and have not begun to answer may be given up for one of priority 0 or
more that finds all its engines saturated: as few as it takes, and nobody if that does not make room. It goes back into
the queue, `most` times at most, and only while it has half of its time to wait before it.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Roster
from vllm_llmd.router.members.membership import Engine
from vllm_llmd.router.members.occupancy import Supposed
from vllm_llmd.router.waiting import saturation
from vllm_llmd.router.waiting.flow import Flow, Item

MOST_VICTIMS: Final = 8
"""So many at most go for one."""
LOOKED_AT: Final = 256
ENGINES_LOOKED_AT: Final = 8
LOOKED_AT_THERE: Final = 32
"""Of the requests that might go the first, of the engines that have them, and of the requests there."""

Loss = tuple[int, int, float]
NOTHING_FOUND: Final[Loss] = (1, 0, 0.0)
"""More than any loss: what is given up has a priority below 0."""

Named = Mapping[EngineId, Engine]
AnyFree = Callable[[Named], bool]
"""Whether one of them is not saturated."""

Key = TypeVar("Key")
Value = TypeVar("Value")


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


class _Best:
    """Best effort at one engine, by priority; of one, in the order in which it was placed."""

    def __init__(self) -> None:
        self._bands: dict[int, dict[str, Running]] = {}

    def __bool__(self) -> bool:
        return bool(self._bands)

    def put(self, running: Running) -> None:
        self._bands.setdefault(running.item.priority, {})[running.item.id] = running

    def take(self, running: Running) -> None:
        _drop(self._bands, running.item.priority, running.item.id)

    def in_order(self) -> Iterator[Running]:
        """Who goes first: the lowest priority, and of one the latest to be placed."""
        latest = (reversed(self._bands[priority].values()) for priority in sorted(self._bands))
        return itertools.chain.from_iterable(latest)


class Preemption:
    """`began` and `ended` say what may be given up, `victims` who is, and `waits_no_more` that it is settled."""

    def __init__(self, limits: saturation.Limits, flow: Flow, most: int) -> None:
        self._limits = limits
        self._flow = flow
        self._most = most
        self._running: dict[str, Running] = {}
        self._all = _Best()
        self._at: dict[EngineId, _Best] = {}
        self._going: dict[str, Running] = {}
        """Who has been given up, but is still with its engines."""
        self._going_at: dict[EngineId, dict[str, Running]] = {}
        self._claims: dict[str, _Claim] = {}
        self._claims_at: dict[EngineId, dict[str, _Claim]] = {}

    def __len__(self) -> int:
        """How many might be given up."""
        return len(self._running)

    def began(self, running: Running) -> None:
        """The request is with its engines. Only best effort that was not given up too often is of interest."""
        if running.item.priority < 0 and running.given_up < self._most:
            self._running[running.item.id] = running
            self._all.put(running)
            for engine in running.engines:
                self._at.setdefault(engine, _Best()).put(running)

    def ended(self, request: str) -> None:
        """It has begun to answer, or is with its engines no more."""
        if request in self._running:
            self._forget(self._running[request])
        going = self._going.pop(request, None)
        if going is not None:
            for engine in going.engines:
                _drop(self._going_at, engine, request)
            for claim in self._claims.values():
                claim.going.discard(request)

    def waits_no_more(self, request: str) -> None:
        """Who waited is about to be placed, or has left."""
        claim = self._claims.pop(request, None)
        if claim is not None:
            for engine in claim.engines:
                _drop(self._claims_at, engine, request)

    def victims(self, waiters: Iterable[tuple[Item, Roster]], now_ms: float) -> list[Item]:
        """Who gives way now to those that wait, each for engines of a roster."""
        found: dict[int, bool] = {}

        def any_free(among: Named) -> bool:
            if id(among) not in found:
                found[id(among)] = saturation.any_free(among, self._limits, now_ms)
            return found[id(among)]

        needs = ((waiter, _needed(waiter, roster)) for waiter, roster in waiters)
        return [item for waiter, needed in needs for item in self._victims_of(waiter, needed, any_free, now_ms)]

    def _victims_of(self, waiter: Item, needed: list[Named], any_free: AnyFree, now_ms: float) -> list[Item]:
        """Nobody while others still give way for its sake."""
        claim = self._claims.get(waiter.id)
        if not self._running or waiter.priority < 0 or (claim is not None and claim.going):
            return []
        self.waits_no_more(waiter.id)
        chosen: dict[str, Running] = {}
        engines = []
        for among in needed:
            if any_free(among):
                continue
            found = self._room_at(among, chosen, now_ms)
            if found is None:
                return []
            engines.append(found[0])
            chosen |= found[1]
        if not engines or not self._can_wait(list(chosen.values())):
            return []
        self._claim(_Claim(waiter, tuple(dict.fromkeys(engines)), set(chosen)))
        for running in chosen.values():
            self._goes(running)
        return [running.item for running in chosen.values()]

    def _can_wait(self, chosen: list[Running]) -> bool:
        """Whether the queue has room for all of them: nobody is given up to be refused."""
        return self._flow.has_room(len(chosen), sum(running.item.size_bytes for running in chosen))

    def _claim(self, claim: _Claim) -> None:
        self._claims[claim.item.id] = claim
        for engine in claim.engines:
            self._claims_at.setdefault(engine, {})[claim.item.id] = claim

    def _goes(self, running: Running) -> None:
        self._forget(running)
        self._going[running.item.id] = running
        for engine in running.engines:
            self._going_at.setdefault(engine, {})[running.item.id] = running

    def _forget(self, running: Running) -> None:
        """It is not to be given up any more."""
        del self._running[running.item.id]
        self._all.take(running)
        for engine in running.engines:
            self._at[engine].take(running)
            if not self._at[engine]:
                del self._at[engine]

    # --- where there is to be room ------------------------------------------------------------------------------

    def _room_at(
        self, among: Named, gone: Mapping[str, Running], now_ms: float
    ) -> tuple[EngineId, dict[str, Running]] | None:
        """The engine where least is lost by it, and who has to go there besides `gone`. None if there is none."""
        found, least = self._room_soon(among, gone, now_ms), NOTHING_FOUND
        if found is not None:
            return found
        for engine, at_best in itertools.islice(self._engines_in_order(among), ENGINES_LOOKED_AT):
            if least <= at_best:
                break  # engines that come later are no better
            going = self._going_from(among[engine], gone, now_ms)
            if going is not None and (loss := _loss(going.values())) < least:
                found, least = (engine, going), loss
        return found

    def _room_soon(
        self, among: Named, gone: Mapping[str, Running], now_ms: float
    ) -> tuple[EngineId, dict[str, Running]] | None:
        """An engine that has room once those have gone that go already: nobody else has to. None if there is none."""
        left = {each for running in gone.values() for each in running.engines}
        for engine in itertools.islice((*left, *self._going_at), ENGINES_LOOKED_AT):
            if engine in among:
                own = self._supposed(among[engine], gone)
                if not saturation.would_be_saturated(among[engine], own, self._limits, now_ms):
                    return engine, {}
        return None

    def _engines_in_order(self, among: Named) -> Iterator[tuple[EngineId, Loss]]:
        """Those of them that have best effort, and the least that may be lost there; it only grows.

        First comes where the lowest priority is, and of one where the latest is.
        """
        seen: set[EngineId] = set()
        for running in itertools.islice(self._all.in_order(), LOOKED_AT):
            for engine in running.engines:
                if engine in among and engine not in seen:
                    seen.add(engine)
                    yield engine, _loss([running])

    def _going_from(self, engine: Engine, gone: Mapping[str, Running], now_ms: float) -> dict[str, Running] | None:
        """Who has to go so that the engine has room for one more, none of whom could stay; None if it never has."""
        own = self._supposed(engine, gone)
        may_go = self._who_may_go(engine, gone, now_ms)
        for running in may_go:
            own.without(running.item.id)
        if saturation.would_be_saturated(engine, own, self._limits, now_ms):
            return None
        going = {}
        for running in reversed(may_go):
            own.again(running.item.id)
            if saturation.would_be_saturated(engine, own, self._limits, now_ms):
                own.without(running.item.id)
                going[running.item.id] = running
        return going

    def _who_may_go(self, engine: Engine, gone: Mapping[str, Running], now_ms: float) -> list[Running]:
        """The first of them."""
        best = self._at.get(engine.info.id)
        if best is None:
            return []
        first = itertools.islice(best.in_order(), LOOKED_AT_THERE)
        may_go = (each for each in first if each.item.id not in gone and each.may_go(now_ms))
        return list(itertools.islice(may_go, MOST_VICTIMS))

    def _supposed(self, engine: Engine, gone: Mapping[str, Running]) -> Supposed:
        """Without those that go, and with those that it is claimed for."""
        own, name = engine.occupancy.supposed(engine.load_at_ms), engine.info.id
        for request in (*gone, *self._going_at.get(name, ())):
            own.without(request)
        for claim in self._claims_at.get(name, {}).values():
            own.more(1, claim.item.tokens)
        return own


def _needed(waiter: Item, roster: Roster) -> list[Named]:
    """Among whom there has to be room."""
    sources = [roster.prefilling] if waiter.pool.needs_source and roster.prefilling else []
    return [roster.decoding, *sources]


def _drop(kept: dict[Key, dict[str, Value]], key: Key, request: str) -> None:
    del kept[key][request]
    if not kept[key]:
        del kept[key]


def _loss(going: Collection[Running]) -> Loss:
    """What giving them up costs: least where priorities are low, then where few go, then where they came late."""
    return max(one.item.priority for one in going), len(going), -min(one.placed_ms for one in going)
