"""Which engines get requests at all: a circuit breaker per engine. Pure: time is an argument, nothing is sent.

A circuit opens when an engine fails often or is far slower than others; after a while it lets one request through,
and what becomes of that closes it, or opens it again for longer.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from vllm_llmd.names import EngineId
from vllm_llmd.router.members.membership import Engine
from vllm_llmd.router.members.outliers import Latencies, Shape


class Circuit(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half open"


class Event(StrEnum):
    FAILED_OFTEN = "failed often"
    SLOW = "slow"
    WAITED = "waited"
    ANSWERED = "answered"
    FAILED = "failed"


TRANSITIONS: Final[dict[tuple[Circuit, Event], Circuit]] = {
    (Circuit.CLOSED, Event.FAILED_OFTEN): Circuit.OPEN,
    (Circuit.CLOSED, Event.SLOW): Circuit.OPEN,
    (Circuit.OPEN, Event.WAITED): Circuit.HALF_OPEN,
    (Circuit.HALF_OPEN, Event.ANSWERED): Circuit.CLOSED,
    (Circuit.HALF_OPEN, Event.FAILED): Circuit.OPEN,
}
"""Every change of a circuit; an event that is not listed for one changes nothing."""

OUTCOMES_KEPT: Final = 10
FAILURES_TO_OPEN: Final = 5
"""Of the latest `OUTCOMES_KEPT` outcomes, in the last `RECENT_MS`."""
RECENT_MS: Final = 30_000.0

OPEN_MS: Final = 2000.0
"""How long a circuit stays open the first time; twice as long each time that it opens again before it is forgiven."""
OPEN_MOST_MS: Final = 60_000.0
FORGIVEN_AFTER_MS: Final = 120_000.0
"""After being closed for this long, the next opening counts as the first."""

EJECTED_SHARE: Final = 3
"""At most one in so many engines is held open for being slow, whatever the others are held open for."""
LOOK_EVERY_MS: Final = 1000.0


@dataclass
class Standing:
    """One engine's circuit. `openings` counts those that are not forgiven, `since_ms` is the latest change."""

    circuit: Circuit = Circuit.CLOSED
    since_ms: float = 0.0
    openings: int = 0
    probes: set[str] = field(default_factory=set)
    failures_ms: deque[float | None] = field(default_factory=lambda: deque(maxlen=OUTCOMES_KEPT))
    """Of each outcome, when it failed; None for one that did not."""

    @property
    def open_for_ms(self) -> float:
        return float(min(OPEN_MS * 2 ** min(self.openings - 1, 30), OPEN_MOST_MS))

    @property
    def admits(self) -> bool:
        """Closed, or half open with nobody else trying."""
        return self.circuit is Circuit.CLOSED or (self.circuit is Circuit.HALF_OPEN and not self.probes)


class Health:
    """The circuits of all engines. `version` is another whenever some engine admits requests that did not, or the
    other way round."""

    def __init__(self) -> None:
        self._standings: dict[EngineId, Standing] = {}
        self._latencies = Latencies()
        self._looked_ms = 0.0
        self.version = 0
        self.opened: Counter[tuple[EngineId, Event]] = Counter()

    def standing(self, engine: EngineId) -> Standing:
        """How the engine stands; one that nothing is known of has a closed circuit."""
        return self._standings.get(engine) or Standing()

    def admits(self, engine: EngineId) -> bool:
        """Whether a request may go to the engine."""
        return engine not in self._standings or self._standings[engine].admits

    def admitted(self, engines: Sequence[Engine]) -> list[Engine]:
        """Those that requests may go to. Where no engine that decodes is left, all of them may: one that has failed
        lately is better than none.
        """
        decoders = [engine for engine in engines if engine.info.role != "prefill"]
        admitted = [engine for engine in engines if self.admits(engine.info.id)]
        if any(engine.info.role != "prefill" for engine in admitted):
            return admitted
        return [*decoders, *admitted] if decoders else admitted or list(engines)

    def asked(self, engine: EngineId, request: str) -> None:
        """The request goes to the engine; with a circuit half open it is the one that tries."""
        standing = self._standings.get(engine)
        if standing is not None and standing.circuit is Circuit.HALF_OPEN:
            standing.probes.add(request)
            self.version += 1

    def answered(self, engine: EngineId, now_ms: float) -> None:
        """The engine has begun to answer, with anything but an error of its own."""
        self._standings.setdefault(engine, Standing()).failures_ms.append(None)
        self._on(engine, Event.ANSWERED, now_ms)

    def took(self, engine: EngineId, shape: Shape, first_byte_ms: float) -> None:
        """How long a request of this shape has waited for the first byte of its answer."""
        self._latencies.took(engine, shape, first_byte_ms)

    def failed(self, engine: EngineId, now_ms: float) -> None:
        """The engine has failed a request, before its first byte or after."""
        standing = self._standings.setdefault(engine, Standing())
        standing.failures_ms.append(now_ms)
        recent = sum(at is not None and now_ms - at <= RECENT_MS for at in standing.failures_ms)
        if not self._on(engine, Event.FAILED, now_ms) and recent >= FAILURES_TO_OPEN:
            self._on(engine, Event.FAILED_OFTEN, now_ms)

    def ended(self, engine: EngineId, request: str) -> None:
        """The request is over, whatever has become of it."""
        standing = self._standings.get(engine)
        if standing is not None and request in standing.probes:
            standing.probes.discard(request)
            self.version += 1

    def tick(self, engines: Iterable[EngineId], now_ms: float) -> None:
        """Lets circuits try again that were open for long enough, and opens those of engines that are far too slow."""
        for engine, standing in self._standings.items():
            if standing.circuit is Circuit.OPEN and now_ms - standing.since_ms >= standing.open_for_ms:
                self._on(engine, Event.WAITED, now_ms)
        if now_ms - self._looked_ms >= LOOK_EVERY_MS:
            self._looked_ms = now_ms
            self._eject(list(engines), now_ms)

    def forget(self, engine: EngineId) -> None:
        """The engine's life is over; the next one starts with a closed circuit."""
        self._latencies.forget(engine)
        if self._standings.pop(engine, None) is not None:
            self.version += 1

    def _eject(self, engines: list[EngineId], now_ms: float) -> None:
        closed = [engine for engine in engines if self.standing(engine).circuit is Circuit.CLOSED]
        room = len(engines) // EJECTED_SHARE - (len(engines) - len(closed))
        for engine in self._latencies.slow(closed)[: max(room, 0)]:
            self._latencies.forget(engine)
            self._on(engine, Event.SLOW, now_ms)

    def _on(self, engine: EngineId, event: Event, now_ms: float) -> bool:
        standing = self._standings.setdefault(engine, Standing())
        circuit = TRANSITIONS.get((standing.circuit, event))
        if circuit is None:
            return False
        if circuit is Circuit.OPEN:
            forgiven = standing.circuit is Circuit.CLOSED and now_ms - standing.since_ms > FORGIVEN_AFTER_MS
            standing.openings = 1 if forgiven else standing.openings + 1
            self.opened[engine, event] += 1
        if circuit is Circuit.CLOSED:
            standing.failures_ms.clear()
        standing.circuit, standing.since_ms = circuit, now_ms
        standing.probes.clear()
        self.version += 1
        return True
