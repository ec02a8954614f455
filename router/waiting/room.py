"""Where requests wait for an engine that has room: futures and a timer around `admission.Admission`. Event loop."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

from vllm_llmd.clock import Clock
from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Roster
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.members.membership import Engine
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.request import Facts
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.slo import Wish, band
from vllm_llmd.router.waiting.admission import TICK_MS, Admission, Event, GiveUp, Held, LetGo, Passed, Plan
from vllm_llmd.router.waiting.flow import Arrival, Item, Shed
from vllm_llmd.router.waiting.in_flight import InFlight
from vllm_llmd.router.waiting.preemption import Running


class WaitingRoom:
    """`admit` before a request is placed, `look` whenever an engine may have room."""

    def __init__(self, settings: RouterSettings, fleet: Fleet, metrics: Metrics, clock: Clock) -> None:
        self._metrics = metrics
        self._clock = clock
        self._admission = Admission(settings, fleet)
        self._turns: dict[str, asyncio.Future[Shed | None]] = {}
        """When the wait of each request ends, and how."""
        self._in_flight = InFlight(self._admission.preemption)
        self._ticking = False
        metrics.watch_queue(self._admission.flow)

    def __len__(self) -> int:
        """How many wait."""
        return len(self._admission)

    def retry_after_s(self) -> int:
        """When it is worth while to ask again."""
        return self._admission.flow.retry_after_s()

    def is_saturated(self, engine: Engine) -> bool:
        """Whether requests should rather wait here than there."""
        return self._admission.is_saturated(engine, self._clock.now_ms())

    def saturated(self, roster: Roster) -> tuple[int, ...]:
        """Who of them are, by their places."""
        return self._admission.saturated(roster, self._clock.now_ms())

    def arrival(self, request: str, facts: Facts, size_bytes: int) -> Arrival:
        """A request that comes now, as far as its wait depends on it."""
        return self._admission.arrival(request, facts, size_bytes, self._clock.now_ms())

    async def admit(self, arrival: Arrival, wish: Wish, plan: Plan) -> Shed | None:
        """None once the request may be placed; it then has to be, before anything is awaited. Or why it is sent away.

        Whoever is cancelled here has left.
        """
        return await self._turn(arrival.id, lambda: self._admission.admit(arrival, wish, plan, self._clock.now_ms()))

    async def readmit(self, arrival: Arrival, wish: Wish, plan: Plan) -> Shed | None:
        """As `admit`, for one that was given up."""
        return await self._turn(arrival.id, lambda: self._admission.readmit(arrival, wish, plan, self._clock.now_ms()))

    def until_answered(
        self, arrival: Arrival, wish: Wish, engines: tuple[EngineId, ...], given_up: int
    ) -> AbstractAsyncContextManager[None]:
        """While engines have it, who was given up so often before. Raises GivenUp if it is once more."""
        running = Running(self._admission.item(arrival, wish), engines, self._clock.now_ms(), given_up)
        return self._in_flight.until_answered(running)

    async def _turn(self, request: str, come: Callable[[], list[Event]]) -> Shed | None:
        turn: asyncio.Future[Shed | None] = asyncio.get_running_loop().create_future()
        self._turns[request] = turn
        try:
            self._act(come())
            return await turn
        finally:
            del self._turns[request]
            if self._admission.leave(request):
                asyncio.get_running_loop().call_soon(self._go_on)  # by then the request is placed, or gone

    def look(self, *engines: EngineId | None) -> None:
        """Something has changed at these engines."""
        for engine in engines:
            if engine is not None:
                self._act(self._admission.look(engine, self._clock.now_ms()))

    async def close(self) -> None:
        """The router stops: nobody is let go any more."""
        self._act(self._admission.close())

    def _go_on(self) -> None:
        self._act(self._admission.go_on(self._clock.now_ms()))

    def _tick(self) -> None:
        self._ticking = False
        self._act(self._admission.tick(self._clock.now_ms()))

    def _act(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Passed(item):
                    self._end(item, None)
                case Held():
                    self._metrics.held.inc()
                case LetGo(item, waited_ms):
                    self._metrics.queue_wait_seconds.labels(band(item.priority)).observe(waited_ms / 1000)
                    self._end(item, None)
                case Shed(item, reason):
                    self._metrics.shed.labels(band(item.priority), reason).inc()
                    self._end(item, event)
                case GiveUp(item):
                    self._in_flight.give_up(item.id)
        if not self._ticking and len(self._admission):
            self._ticking = True
            asyncio.get_running_loop().call_later(TICK_MS / 1000, self._tick)

    def _end(self, item: Item, shed: Shed | None) -> None:
        turn = self._turns[item.id]
        if not turn.done():  # else its client has just gone
            turn.set_result(shed)
