"""Where requests wait while every engine that could take them is saturated. In the event loop.

One request is let go at a time, and the next only when that one has been placed, so that each is judged by what the
engines have by then. `flow.Flow` decides; this keeps the futures and the timer.
"""

import asyncio
from functools import cache, partial
from typing import Final

from vllm_llmd.clock import Clock
from vllm_llmd.names import EngineId
from vllm_llmd.router import saturation
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.flow import Arrival, Flow, IsOpen, Item, Pool, QueueLimits, Shed, to_wait
from vllm_llmd.router.membership import Engine, State
from vllm_llmd.router.observe import Metrics, band
from vllm_llmd.router.rosters import may_take
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.slo import Wish

TICK_S: Final = 0.05
"""How often reports and ends of waits are looked at while somebody waits."""

FRESH_HEARTBEATS: Final = 4
"""A report counts for so long."""


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
        self._turns: dict[str, asyncio.Future[Shed | None]] = {}
        self._longest_ms = settings.queue_ttl_ms
        self._let_go: str | None = None
        self._freed: EngineId | None = None
        self._ticking = False
        metrics.watch_queue(self._flow)

    def retry_after_s(self) -> int:
        """When it is worth while to ask again."""
        return self._flow.retry_after_s()

    async def admit(self, arrival: Arrival, wish: Wish) -> Shed | None:
        """Comes back when the request may be placed, which must be done before anything is waited for again.

        Otherwise it was sent away. Whoever is cancelled here has left.
        """
        self._fleet.traffic.asked(arrival.id, arrival.pool[0].model, wish, self._clock.now_ms())
        if self._let_go is None and not self._flow.waiting(arrival.pool) and self._has_room(arrival.pool):
            return None
        return await self._wait(to_wait(arrival, wish, self._longest_ms))

    async def _wait(self, item: Item) -> Shed | None:
        turn: asyncio.Future[Shed | None] = asyncio.get_running_loop().create_future()
        self._turns[item.id] = turn
        self._fleet.traffic.waits(item.id)
        self._send_away(self._flow.enter(item))
        self._tick_soon()
        try:
            return await turn
        finally:
            del self._turns[item.id]
            self._flow.leave(item.id)
            self._fleet.traffic.waits_no_more(item.id)
            if self._let_go == item.id:
                self._let_go = None
                asyncio.get_running_loop().call_soon(self._go_on)  # by then the request is placed, or gone

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
        if known is not None and not saturation.saturated(known, self._limits, self._clock.now_ms()):
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
        while self._let_go is None and (item := self._flow.next(is_open, now_ms)) is not None:
            if not self._turns[item.id].done():  # else its client has just gone
                self._let_go = item.id
                self._metrics.queue_wait_seconds.labels(band(item.priority)).observe((now_ms - item.arrived_ms) / 1000)
                self._turns[item.id].set_result(None)

    def _send_away(self, sheds: list[Shed]) -> None:
        for shed in sheds:
            self._metrics.shed.labels(band(shed.item.priority), shed.reason).inc()
            if not self._turns[shed.item.id].done():
                self._turns[shed.item.id].set_result(shed)

    def _tick_soon(self) -> None:
        if not self._ticking and len(self._flow):
            self._ticking = True
            asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        self._send_away(self._flow.expire(self._clock.now_ms()))
        self._look_at_all()
        self._tick_soon()

    def _has_room(self, pool: Pool) -> bool:
        wanted, needs_source = pool
        return saturation.has_room(self._fleet.roster(wanted), needs_source, self._limits, self._clock.now_ms())

    def _is_open_at(self, engine: Engine, pool: Pool) -> bool:
        """Whether there is room, given that the engine has some."""
        wanted, needs_source = pool
        if not may_take(engine, wanted):
            return False
        wants_another = engine.info.role == "prefill" or (needs_source and len(self._fleet.roster(wanted).prefillers))
        return self._has_room(pool) if wants_another else engine.state is State.READY
