"""The router's waiting room in virtual time: its rules are `router/waiting/admission.py`, its timer an event. Pure."""

from collections.abc import Callable, Sequence

from vllm_llmd.names import EngineId
from vllm_llmd.router.slo import Wish
from vllm_llmd.router.waiting.admission import TICK_MS, Admission, Event, GiveUp, LetGo, Passed, Plan
from vllm_llmd.router.waiting.flow import Arrival, Shed
from vllm_llmd.simulate.events import Events

Then = Callable[[Shed | None], None]
"""What to do when a wait ends: to place the request, or to note why it was sent away."""

TakeBack = Callable[[str], None]
"""Takes a request from its engines for the sake of another. It has to come again, by `readmit`, but not before that."""


class Waiting:
    """`admit` before a request is placed, `look` whenever an engine may have room."""

    def __init__(self, admission: Admission, events: Events, take_back: TakeBack) -> None:
        self._admission = admission
        self._events = events
        self._take_back = take_back
        self._thens: dict[str, Then] = {}
        self._ticking = False

    def admit(self, arrival: Arrival, wish: Wish, plan: Plan, then: Then) -> None:
        """`then` is called once the request may be placed, or with why it is sent away."""
        self._thens[arrival.id] = then
        self._act(self._admission.admit(arrival, wish, plan, self._events.now_ms()))

    def readmit(self, arrival: Arrival, wish: Wish, plan: Plan, then: Then) -> None:
        """As `admit`, for one that was given up."""
        self._thens[arrival.id] = then
        self._act(self._admission.readmit(arrival, wish, plan, self._events.now_ms()))

    def look(self, *engines: EngineId | None) -> None:
        """Something has changed at these engines; what follows comes after all else that has happened by now."""
        for engine in engines:
            if engine is not None and len(self._admission):
                self._events.at(self._events.now_ms(), self._look, engine)

    def _look(self, engine: EngineId) -> None:
        self._act(self._admission.look(engine, self._events.now_ms()))

    def _tick(self, _: None) -> None:
        self._ticking = False
        self._act(self._admission.tick(self._events.now_ms()))

    def _act(self, events: Sequence[Event]) -> None:
        while events:
            for event in events:
                match event:
                    case Passed(item):
                        self._thens.pop(item.id)(None)
                    case LetGo(item):
                        self._admission.leave(item.id)
                        self._thens.pop(item.id)(None)
                    case Shed(item):
                        self._thens.pop(item.id)(event)
                    case GiveUp(item):
                        self._take_back(item.id)
            goes_on = isinstance(events[-1], LetGo)
            events = self._admission.go_on(self._events.now_ms()) if goes_on else ()
        if not self._ticking and len(self._admission):
            self._ticking = True
            self._events.at(self._events.now_ms() + TICK_MS, self._tick, None)
