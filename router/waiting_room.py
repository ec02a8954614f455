"""Where requests wait while all engines that could take them are saturated, or for one that is worth it. Event loop.

One request is let go at a time, and the next only when that one has been placed, so that each is judged by what the
engines have by then. `flow.Flow` decides who; `prospects` what for; this keeps the futures and the timer.
"""

import asyncio
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Final

from vllm_llmd.clock import Clock
from vllm_llmd.names import EngineId
from vllm_llmd.router import saturation
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.flow import Arrival, Flow, IsOpen, Item, Pool, QueueLimits, Shed, to_wait
from vllm_llmd.router.membership import Engine, State
from vllm_llmd.router.observe import Metrics, band
from vllm_llmd.router.prospects import Prospect, Wait
from vllm_llmd.router.rosters import may_take
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.slo import Wish

TICK_S: Final = 0.05
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


@dataclass
class _Guest:
    """A request that waits: `item` as it came, `turn` when its wait ends.

    In the line of an engine, `line` says so, until `until_ms`; `last` is the engine in whose line it was last. It is in
    lines until `patience_ends_ms`, as is settled the first time.
    """

    item: Item
    turn: "asyncio.Future[Shed | None]"
    plan: Plan
    line: Wait | None = None
    last: Engine | None = None
    until_ms: float = 0.0
    patience_ends_ms: float | None = None


class WaitingRoom:
    """`admit` before a request is placed, `look` whenever an engine may have room."""

    def __init__(self, settings: RouterSettings, fleet: Fleet, metrics: Metrics, clock: Clock) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._clock = clock
        self._limits = saturation.Limits(
            engine_queue=settings.engine_queue,
            engine_requests=settings.engine_requests,
            prefill_tokens=settings.engine_prefill_tokens,
            fresh_ms=FRESH_HEARTBEATS * settings.heartbeat_ms,
        )
        weights = settings.tenant_weight or {}
        self._flow = Flow(QueueLimits(settings.queue_requests, settings.queue_bytes, weights))
        self._guests: dict[str, _Guest] = {}
        self._lined: dict[str, _Guest] = {}
        self._longest_ms = settings.queue_ttl_ms
        self._let_go: str | None = None
        self._freed: EngineId | None = None
        self._ticking = False
        metrics.watch_queue(self._flow)

    def retry_after_s(self) -> int:
        """When it is worth while to ask again."""
        return self._flow.retry_after_s()

    def is_saturated(self, engine: Engine) -> bool:
        """Whether requests should rather wait here than there."""
        return saturation.saturated(engine, self._limits, self._clock.now_ms())

    async def admit(self, arrival: Arrival, wish: Wish, plan: Plan) -> Shed | None:
        """None once the request may be placed; it then has to be, before anything is awaited. Or why it is sent away.

        Whoever is cancelled here has left.
        """
        self._fleet.traffic.asked(arrival.id, arrival.pool.wanted.model, wish, self._clock.now_ms())
        prospect = None
        if self._let_go is None and not self._flow.waiting(arrival.pool) and self._has_room(arrival.pool):
            prospect = plan()
            if prospect is None or (prospect.wait is None and not any(each.line_requests for each in prospect.engines)):
                return None
        guest = _Guest(to_wait(arrival, wish, self._longest_ms), asyncio.get_running_loop().create_future(), plan)
        wait = None if prospect is None else self._queues_up(guest, prospect)
        return None if prospect is not None and wait is None else await self._wait(guest, wait)

    def _queues_up(self, guest: _Guest, prospect: Prospect) -> Wait | None:
        """In whose line the request should be though others have room; there must be room to wait, too."""
        if not self._flow.fits(guest.item):
            return None
        wait = self._worth_waiting(guest, prospect)
        lined = [engine for engine in prospect.engines if engine.line_requests]
        if wait is None and lined:  # it has room just now, for those in its line first
            asyncio.get_running_loop().call_soon(self.look, lined[0].info.id)
            return Wait(lined[0], 0, 0.0)
        return wait

    def _worth_waiting(self, guest: _Guest, prospect: Prospect) -> Wait | None:
        """The wait that is better than what can begin now, within the patience that the request has."""
        wait, now_ms = prospect.wait, self._clock.now_ms()
        if wait is None or not (math.isfinite(wait.saves_ms) and wait.saves_ms >= WORTH_WAITING_MS):
            return None
        if guest.patience_ends_ms is None:
            guest.patience_ends_ms = min(now_ms + wait.saves_ms, guest.item.deadline_ms - MARGIN_MS)
        return wait if guest.patience_ends_ms - now_ms >= WORTH_WAITING_MS else None

    async def _wait(self, guest: _Guest, wait: Wait | None) -> Shed | None:
        item = guest.item
        self._guests[item.id] = guest
        self._fleet.traffic.waits(item.id)
        self._send_away(self._flow.enter(item))
        if wait is not None and not guest.turn.done():
            self._line_up(guest, wait)
        self._tick_soon()
        try:
            return await guest.turn
        finally:
            del self._guests[item.id]
            self._step_out(guest)
            self._flow.leave(item.id)
            self._fleet.traffic.waits_no_more(item.id)
            if self._let_go == item.id:
                self._let_go = None
                asyncio.get_running_loop().call_soon(self._go_on)  # by then the request is placed, or gone

    def _line_up(self, guest: _Guest, wait: Wait) -> None:
        if guest.last is None:
            self._metrics.held.inc()
        patience_ends_ms = math.inf if guest.patience_ends_ms is None else guest.patience_ends_ms
        guest.line, guest.last = wait, wait.engine
        guest.until_ms = min(self._clock.now_ms() + RECONSIDERED_MS, patience_ends_ms)
        wait.engine.line_up(1, wait.tokens)
        self._lined[guest.item.id] = guest
        self._flow.move(guest.item.id, guest.item.pool._replace(engine=wait.engine.info.id))

    def _step_out(self, guest: _Guest) -> None:
        """Of the line that it is in, if it is in any."""
        if guest.line is not None:
            guest.line.engine.line_up(-1, -guest.line.tokens)
            guest.line = None
            del self._lined[guest.item.id]

    def look(self, *engines: EngineId | None) -> None:
        """Something has changed at these engines."""
        for engine in engines:
            if engine is not None and self._let_go is None and len(self._flow):
                self._look_at(engine)

    async def close(self) -> None:
        """The router stops: nobody is let go any more."""
        self._send_away(self._flow.close())

    def _look_at(self, engine: EngineId) -> None:
        """Lets someone go if the engine has room. That of others is the tick's business."""
        known = self._fleet.membership.get(engine)
        if known is not None and not self.is_saturated(known):
            self._freed = engine
            self._let_one_go(partial(self._is_open_at, known))

    def _look_at_all(self) -> None:
        self._freed = None
        self._let_one_go(cache(self._has_room))

    def _go_on(self) -> None:
        """The one before is placed."""
        if self._freed is None:
            self._look_at_all()
        else:
            self.look(self._freed)

    def _let_one_go(self, is_open: IsOpen) -> None:
        now_ms = self._clock.now_ms()
        for _ in range(LOOKED_AT):  # who is left is looked at with the next tick
            item = None if self._let_go is not None else self._flow.first(is_open)
            if item is None:
                return
            guest = self._guests[item.id]
            wait = None if guest.turn.done() else self._still_waits(guest)
            self._step_out(guest)
            if guest.turn.done():  # its client has just gone
                self._flow.leave(item.id)
            elif wait is not None:
                self._line_up(guest, wait)
            else:
                self._flow.send(item, now_ms)
                self._let_go = item.id
                self._metrics.queue_wait_seconds.labels(band(item.priority)).observe((now_ms - item.arrived_ms) / 1000)
                guest.turn.set_result(None)

    def _still_waits(self, guest: _Guest) -> Wait | None:
        """For whom it does better to wait, though it is its turn. Who are in the line with it do not count as ahead."""
        with _without_line(guest.last):
            prospect = guest.plan()
        return None if prospect is None else self._worth_waiting(guest, prospect)

    def _send_away(self, sheds: list[Shed]) -> None:
        for shed in sheds:
            self._metrics.shed.labels(band(shed.item.priority), shed.reason).inc()
            guest = self._guests[shed.item.id]
            self._step_out(guest)
            if not guest.turn.done():
                guest.turn.set_result(shed)

    def _tick_soon(self) -> None:
        if not self._ticking and len(self._flow):
            self._ticking = True
            asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        now_ms = self._clock.now_ms()
        self._send_away(self._flow.expire(now_ms))
        due = (guest for guest in self._lined.values() if guest.until_ms <= now_ms)
        for guest in list(itertools.islice(due, MOVED)):
            self._step_out(guest)
            self._flow.move(guest.item.id, guest.item.pool)
        self._look_at_all()
        self._tick_soon()

    def _has_room(self, pool: Pool) -> bool:
        if pool.engine is not None:
            known = self._fleet.membership.get(pool.engine)
            return known is None or known.state is not State.READY or known.draining or not self.is_saturated(known)
        roster = self._fleet.roster(pool.wanted)
        return saturation.has_room(roster, pool.needs_source, self._limits, self._clock.now_ms())

    def _is_open_at(self, engine: Engine, pool: Pool) -> bool:
        """Whether there is room, given that the engine has some."""
        if pool.engine is not None:
            return pool.engine == engine.info.id
        if not may_take(engine, pool.wanted):
            return False
        needs_source = pool.needs_source and len(self._fleet.roster(pool.wanted).prefillers)
        wants_another = engine.info.role == "prefill" or needs_source
        return self._has_room(pool) if wants_another else engine.state is State.READY


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
