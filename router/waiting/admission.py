"""Whether a request may be placed, what it waits for if not, and when it has waited for long enough. Pure.

One request is let go at a time, and the next only when that one has been placed, so that each is judged by what the
engines have by then. `flow.Flow` decides who, `prospects` what for; whoever drives this acts on the events it returns.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Final

from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Roster
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.members.membership import Engine, State
from vllm_llmd.router.placement.prospects import Prospect, Wait
from vllm_llmd.router.placement.rosters import may_take
from vllm_llmd.router.request import Facts
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.slo import Wish
from vllm_llmd.router.waiting import saturation
from vllm_llmd.router.waiting.flow import Arrival, Flow, IsOpen, Item, Pool, QueueLimits, Shed, to_wait
from vllm_llmd.router.waiting.preemption import Preemption

TICK_MS: Final = 50.0
"""How often reports and ends of waits are looked at while somebody waits."""

FRESH_HEARTBEATS: Final = 4
"""A report counts for so long."""

WORTH_WAITING_MS: Final = 50.0
"""Nobody waits for one engine while others have room to save less: as long as changes may go unnoticed."""

RECONSIDERED_MS: Final = 250.0
"""Whoever waits for one engine is asked again after so long, whatever happens."""

MARGIN_MS: Final = 200.0
"""So long before a request must leave, it waits for no one engine any more."""

LOOKED_AT: Final = 32
MOVED: Final = 16
"""Requests that are asked in one look, and that a tick has asked again: each costs a decision."""

Plan = Callable[[], Prospect | None]
"""What a request could have, as of now. None if nobody can take it."""


@dataclass(frozen=True)
class Passed:
    """It need not wait: it is to be placed before anything else happens."""

    item: Item


@dataclass(frozen=True)
class Held:
    """For the first time it waits for one engine though others have room."""

    item: Item


@dataclass(frozen=True)
class LetGo:
    """It has waited for `waited_ms`, and is to be placed; the next one follows when `go_on` is called after that."""

    item: Item
    waited_ms: float


@dataclass(frozen=True)
class GiveUp:
    """An engine has it and has not begun to answer: it is to be broken off, and to come again by `readmit`."""

    item: Item


Event = Passed | Held | LetGo | Shed | GiveUp
"""What has happened to a request that came or waited: after all but `Held` it waits no more. `GiveUp` is for others."""


@dataclass
class _Guest:
    """A request that waits: `item` as it came.

    In the line of an engine, `line` says so, until `until_ms`; `last` is the engine in whose line it was last. It is in
    lines until `patience_ends_ms`, as is settled the first time.
    """

    item: Item
    plan: Plan
    line: Wait | None = None
    last: Engine | None = None
    until_ms: float = 0.0
    patience_ends_ms: float | None = None


class Admission:
    """`admit` whoever comes, `look` whenever an engine may have room, `tick` while somebody waits."""

    def __init__(self, settings: RouterSettings, fleet: Fleet) -> None:
        self._fleet = fleet
        self._limits = saturation.Limits(
            engine_queue=settings.engine_queue,
            engine_requests=settings.engine_requests,
            prefill_tokens=settings.engine_prefill_tokens,
            fresh_ms=FRESH_HEARTBEATS * settings.heartbeat_ms,
        )
        self._min_remote_tokens = settings.min_remote_tokens
        weights = settings.tenant_weight or {}
        self.flow = Flow(QueueLimits(settings.queue_requests, settings.queue_bytes, weights))
        self.preemption = Preemption(self._limits, self.flow, settings.preemptions)
        self._guests: dict[str, _Guest] = {}
        self._lined: dict[str, _Guest] = {}
        self._longest_ms = settings.queue_ttl_ms
        self._let_go: str | None = None
        self._freed: EngineId | None = None

    def __len__(self) -> int:
        """How many wait."""
        return len(self._guests)

    def is_saturated(self, engine: Engine, now_ms: float) -> bool:
        """Whether requests should rather wait here than there."""
        return saturation.saturated(engine, self._limits, now_ms)

    def saturated(self, roster: Roster, now_ms: float) -> tuple[int, ...]:
        """Who of them are, by their places."""
        return tuple(place for place, engine in enumerate(roster.engines) if self.is_saturated(engine, now_ms))

    # --- coming and going ---------------------------------------------------------------------------------------

    def admit(self, arrival: Arrival, wish: Wish, plan: Plan, now_ms: float) -> list[Event]:
        """A request has come. It waits if it is not among the events; whoever else is waits no more."""
        self._fleet.traffic.asked(arrival.id, arrival.pool.wanted.model, wish, now_ms)
        return self._take_in(_Guest(self.item(arrival, wish), plan), now_ms)

    def readmit(self, arrival: Arrival, wish: Wish, plan: Plan, now_ms: float) -> list[Event]:
        """As `admit`, for one that was given up: in its old place, and not on its tenant's account again."""
        return self._take_in(_Guest(replace(self.item(arrival, wish), tokens=0), plan), now_ms)

    def arrival(self, request: str, facts: Facts, size_bytes: int, arrived_ms: float) -> Arrival:
        """The request as far as its wait depends on it."""
        return Arrival(
            id=request,
            pool=Pool(self._fleet.rosters.wanted(facts), facts.prompt_tokens >= self._min_remote_tokens),
            prompt_tokens=facts.prompt_tokens,
            max_tokens=facts.output_tokens,
            size_bytes=size_bytes,
            arrived_ms=arrived_ms,
        )

    def item(self, arrival: Arrival, wish: Wish) -> Item:
        """The request as it would wait."""
        return to_wait(arrival, wish, self._longest_ms)

    def _take_in(self, guest: _Guest, now_ms: float) -> list[Event]:
        pool = guest.item.pool
        if self._let_go is not None or self.flow.waiting(pool) or not self._has_room(now_ms, pool):
            return [*self._enter(guest), *self._given_up_for([guest], now_ms)]
        prospect = guest.plan()
        if prospect is None or not self.flow.fits(guest.item):  # it goes, for want of room to wait
            return [Passed(guest.item)]
        wait = self._worth_waiting(guest, prospect, now_ms)
        lined = next((engine for engine in prospect.engines if engine.line_requests), None)
        if wait is not None:
            return [*self._enter(guest), *self._line_up(guest, wait, now_ms)]
        if lined is not None:  # it has room just now, for those in its line first
            events = [*self._enter(guest), *self._line_up(guest, Wait(lined, 0, 0.0), now_ms)]
            return [*events, *self.look(lined.info.id, now_ms)]
        return [Passed(guest.item)]

    def leave(self, request: str) -> bool:
        """It waits no more: it is about to be placed, or its client has gone.

        Whether it had been let go. Then `go_on` has to follow, once it is placed or known not to be.
        """
        guest = self._guests.get(request)
        if guest is not None:
            self._step_out(guest)
            self.flow.leave(request)
            self._forget(request)
        was_let_go = self._let_go == request
        if was_let_go:
            self._let_go = None
        return was_let_go

    def close(self) -> list[Event]:
        """The router stops: nobody is let go any more."""
        return self._send_away(self.flow.close())

    def _enter(self, guest: _Guest) -> list[Event]:
        self._guests[guest.item.id] = guest
        self._fleet.traffic.waits(guest.item.id)
        return self._send_away(self.flow.enter(guest.item))

    def _send_away(self, sheds: list[Shed]) -> list[Event]:
        for shed in sheds:
            self._step_out(self._guests[shed.item.id])
            self._forget(shed.item.id)
        return [*sheds]

    def _given_up_for(self, guests: Iterable[_Guest], now_ms: float) -> list[Event]:
        """Best effort gives way to those of them that wait for want of room."""
        if not len(self.preemption) or self._let_go is not None:
            return []
        waiting = [guest.item for guest in guests if guest.item.id in self._guests and guest.line is None]
        waiters = ((item, self._fleet.roster(item.pool.wanted)) for item in waiting)
        return [GiveUp(item) for item in self.preemption.victims(waiters, now_ms)]

    def _forget(self, request: str) -> None:
        self.preemption.waits_no_more(request)
        del self._guests[request]
        self._fleet.traffic.waits_no_more(request)

    # --- the lines of engines -----------------------------------------------------------------------------------

    def _worth_waiting(self, guest: _Guest, prospect: Prospect, now_ms: float) -> Wait | None:
        """The wait that is better than what can begin now, within the patience that the request has."""
        wait = prospect.wait
        if wait is None or not (math.isfinite(wait.saves_ms) and wait.saves_ms >= WORTH_WAITING_MS):
            return None
        if guest.patience_ends_ms is None:
            guest.patience_ends_ms = min(now_ms + wait.saves_ms, guest.item.deadline_ms - MARGIN_MS)
        return wait if guest.patience_ends_ms - now_ms >= WORTH_WAITING_MS else None

    def _line_up(self, guest: _Guest, wait: Wait, now_ms: float) -> list[Event]:
        if guest.item.id not in self._guests:  # it was sent away as it entered
            return []
        self.preemption.waits_no_more(guest.item.id)
        events: list[Event] = [] if guest.last is not None else [Held(guest.item)]
        patience_ends_ms = math.inf if guest.patience_ends_ms is None else guest.patience_ends_ms
        guest.line, guest.last = wait, wait.engine
        guest.until_ms = min(now_ms + RECONSIDERED_MS, patience_ends_ms)
        wait.engine.line_up(1, wait.tokens)
        self._lined[guest.item.id] = guest
        self.flow.move(guest.item.id, guest.item.pool._replace(engine=wait.engine.info.id))
        return events

    def _step_out(self, guest: _Guest) -> None:
        """Of the line that it is in, if it is in any."""
        if guest.line is not None:
            guest.line.engine.line_up(-1, -guest.line.tokens)
            guest.line = None
            del self._lined[guest.item.id]

    # --- whose turn it is ---------------------------------------------------------------------------------------

    def look(self, engine: EngineId, now_ms: float) -> list[Event]:
        """Something has changed at the engine: if it has room, someone goes. Room of others is the tick's business."""
        known = self._fleet.membership.get(engine)
        if self._let_go is not None or not self._guests or known is None or self.is_saturated(known, now_ms):
            return []
        self._freed = engine
        return self._let_one_go(partial(self._is_open_at, now_ms, known), now_ms)

    def tick(self, now_ms: float) -> list[Event]:
        """To be called every `TICK_MS` while somebody waits."""
        events = self._send_away(self.flow.expire(now_ms))
        due = (guest for guest in self._lined.values() if guest.until_ms <= now_ms)
        for guest in list(itertools.islice(due, MOVED)):
            self._step_out(guest)
            self.flow.move(guest.item.id, guest.item.pool)
        return [*events, *self._look_at_all(now_ms), *self._given_up_for_all(now_ms)]

    def _given_up_for_all(self, now_ms: float) -> list[Event]:
        """Who still waits is looked at, the first of them."""
        if not len(self.preemption) or self._let_go is not None:
            return []
        waiting = (guest for guest in self._guests.values() if guest.item.priority >= 0)
        first = heapq.nsmallest(MOVED, waiting, key=lambda guest: (-guest.item.priority, guest.item.deadline_ms))
        return self._given_up_for(first, now_ms)

    def go_on(self, now_ms: float) -> list[Event]:
        """The one before is placed."""
        return self._look_at_all(now_ms) if self._freed is None else self.look(self._freed, now_ms)

    def _look_at_all(self, now_ms: float) -> list[Event]:
        self._freed = None
        return self._let_one_go(cache(partial(self._has_room, now_ms)), now_ms)

    def _let_one_go(self, is_open: IsOpen, now_ms: float) -> list[Event]:
        events: list[Event] = []
        for _ in range(LOOKED_AT):  # who is left is looked at with the next tick
            item = None if self._let_go is not None else self.flow.first(is_open)
            if item is None:
                break
            guest = self._guests[item.id]
            wait = self._still_waits(guest, now_ms)
            self._step_out(guest)
            if wait is not None:
                events += self._line_up(guest, wait, now_ms)
                continue
            self.flow.send(item, now_ms)
            self._forget(item.id)
            self._let_go = item.id
            events.append(LetGo(item, now_ms - item.arrived_ms))
        return events

    def _still_waits(self, guest: _Guest, now_ms: float) -> Wait | None:
        """For whom it does better to wait, though it is its turn. Who are in the line with it do not count as ahead."""
        with _without_line(guest.last):
            prospect = guest.plan()
        return None if prospect is None else self._worth_waiting(guest, prospect, now_ms)

    # --- whether there is room ----------------------------------------------------------------------------------

    def _has_room(self, now_ms: float, pool: Pool) -> bool:
        if pool.engine is not None:
            known = self._fleet.membership.get(pool.engine)
            if known is None or known.state is not State.READY or known.draining:
                return True  # nobody has to wait for it any more
            return not self.is_saturated(known, now_ms)
        roster = self._fleet.roster(pool.wanted)
        return saturation.has_room(roster, pool.needs_source, self._limits, now_ms)

    def _is_open_at(self, now_ms: float, engine: Engine, pool: Pool) -> bool:
        """Whether there is room, given that the engine has some."""
        if pool.engine is not None:
            return pool.engine == engine.info.id
        if not may_take(engine, pool.wanted):
            return False
        needs_source = pool.needs_source and len(self._fleet.roster(pool.wanted).prefillers)
        wants_another = engine.info.role == "prefill" or needs_source
        return self._has_room(now_ms, pool) if wants_another else engine.state is State.READY


@contextmanager
def _without_line(engine: Engine | None) -> Iterator[None]:
    """As if nobody waited here for the engine."""
    if engine is None:
        yield
        return
    requests, tokens = engine.line_requests, engine.line_tokens
    engine.line_up(-requests, -tokens)
    try:
        yield
    finally:
        engine.line_up(requests, tokens)
