"""Who is in the fleet, and in what state. Pure: time is an argument, nothing is sent.

An engine joins with Hello, is ready once its index is exact, goes stale when silent and is gone when silent for
long or when it says goodbye. One epoch is one life: a new one replaces the old, and a former one is refused.
"""

import math
import struct
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal

import msgspec

from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router.members.ledger import Entry, Ledger
from vllm_llmd.router.members.occupancy import Occupancy
from vllm_llmd.router.members.rates import PRIOR_ROW, RATE_COLUMNS
from vllm_llmd.wire import EngineInfo, Load


class State(StrEnum):
    JOINING = "joining"
    READY = "ready"
    STALE = "stale"
    GONE = "gone"


class Event(StrEnum):
    INDEX_EXACT = "index exact"
    HEARD = "heard"
    SILENT = "silent"
    SILENT_FOR_LONG = "silent for long"
    LEFT = "left"


TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    (State.JOINING, Event.INDEX_EXACT): State.READY,
    (State.JOINING, Event.SILENT): State.STALE,
    (State.READY, Event.SILENT): State.STALE,
    (State.STALE, Event.HEARD): State.JOINING,  # it must tell again what it holds
    (State.STALE, Event.SILENT_FOR_LONG): State.GONE,
    (State.JOINING, Event.LEFT): State.GONE,
    (State.READY, Event.LEFT): State.GONE,
    (State.STALE, Event.LEFT): State.GONE,
}
"""Every change of state; an event that is not listed for a state changes nothing."""

Standing = Literal["unknown", "current", "former"]

FORMER_EPOCHS_KEPT: Final = 64

LOAD_COLUMNS: Final = 10
_ROW: Final = struct.Struct(f"{LOAD_COLUMNS}d")

MOST: Final = 1e9
"""No engine has more requests, tokens or blocks, or takes more milliseconds: what says so is wrong."""


@dataclass
class Placed:
    """A request this router sent to an engine that may not be in the engine's own load report yet.

    The engine is to compute `prefill_tokens` of its prompt, and needs blocks for `new_tokens`. One that `supplies` gets
    the request from its destination, whenever that has blocks for it.
    """

    at_ms: float
    prefill_tokens: int
    new_tokens: int = 0
    supplies: bool = False


@dataclass(frozen=True)
class Stock:
    """An engine without our plugin. `rank` is its data-parallel rank, where one address serves several."""

    rank: int | None


@dataclass
class Engine:
    """One engine's current life. `stock` is None where it has our plugin, and with it a link to us.

    `row` is its load as `candidates.Loads` has it, `rates` how fast it is thought to be. `cached_blocks` were in the
    index of its GPU when it last reported.
    """

    info: EngineInfo
    state: State
    heard_ms: float
    load: Load = field(default_factory=Load)
    load_at_ms: float = 0.0
    unreported: dict[str, Placed] = field(default_factory=dict)
    drained: bool = False
    """An operator has said so."""
    leaving: bool = False
    """The engine itself says that it is about to go."""
    stock: Stock | None = None
    other_requests: int = 0
    other_tokens: int = 0
    """Requests, and prompt tokens to prefill, that come from elsewhere: reported, or soon to be."""
    unplaced_ahead: int = 0
    """Prompt tokens without a block, including what it has not reported yet."""
    stamp: bytes | None = None
    """What `usage.Unasked` has learnt from its streams."""
    takes_stream_options: bool = True
    occupancy: Occupancy = field(default_factory=Occupancy)
    """The requests of this router that it has a part in."""
    line_requests: int = 0
    line_tokens: int = 0
    """Requests that wait in this router for it to have room, and prompt tokens that it would compute for them."""
    cached_blocks: int = 0
    row: bytes = b""
    rates: bytes = PRIOR_ROW
    entry: Entry | None = None
    """Where `row` and `rates` are written to, too; None for an engine of no fleet."""

    def __post_init__(self) -> None:
        self._write_row()
        self.rated(self.rates)

    @property
    def requests_ahead(self) -> int:
        """All that it has to do: this router knows at once what has come of its own, and of others by the report."""
        return self.occupancy.own_requests + self.other_requests

    @property
    def tokens_ahead(self) -> int:
        """Prompt tokens to prefill, likewise."""
        return self.occupancy.own_tokens + self.other_tokens

    @property
    def draining(self) -> bool:
        """Whether it finishes what it has and gets nothing new."""
        return self.drained or self.leaving

    def place(self, request: str, placed: Placed) -> None:
        """Counts a request that this router sends to it until its own report does."""
        self.ended(request)
        self.occupancy.reported(self.load_at_ms)
        self.unreported[request] = placed
        if placed.supplies:
            self.occupancy.supplies(request, placed.prefill_tokens)
            self.other_requests += 1
            self.other_tokens += placed.prefill_tokens
        else:
            self.occupancy.sent(request, placed.prefill_tokens)
        self.unplaced_ahead += placed.new_tokens
        self._write_row()

    def answering(self, request: str) -> None:
        """The request's answer has begun."""
        self.occupancy.reported(self.load_at_ms)
        self.occupancy.answering(request)
        self._write_row()

    def ended(self, request: str) -> None:
        """The request is over, reported or not."""
        self.occupancy.reported(self.load_at_ms)
        self.occupancy.ended(request)
        placed = self.unreported.pop(request, None)
        if placed is not None:
            self.unplaced_ahead -= placed.new_tokens
            self.other_requests -= placed.supplies
            self.other_tokens -= placed.prefill_tokens * placed.supplies
        self._write_row()

    def line_up(self, requests: int, tokens: int) -> None:
        """So many more wait in this router for it, or fewer: who comes later comes after them."""
        self.line_requests += requests
        self.line_tokens += tokens
        self._write_row()

    def reported(self, load: Load, now_ms: float, cached_blocks: int = 0) -> None:
        """Takes a load report in. It covers what was placed before the report before it."""
        load = plausible(load)
        still = {request: placed for request, placed in self.unreported.items() if placed.at_ms > self.load_at_ms}
        self.load, self.load_at_ms, self.unreported = load, now_ms, still
        own_requests, own_tokens = self.occupancy.own_requests, self.occupancy.own_tokens
        others = max(load.running + load.waiting + load.waiting_for_kv - own_requests, 0)
        other_tokens = max(load.prefill_tokens - own_tokens, 0) if others or not own_requests else 0
        self.other_requests = others + sum(placed.supplies for placed in still.values())
        self.other_tokens = other_tokens + sum(each.prefill_tokens for each in still.values() if each.supplies)
        unplaced = load.prefill_tokens if load.unplaced_tokens is None else load.unplaced_tokens
        self.unplaced_ahead = unplaced + sum(placed.new_tokens for placed in still.values())
        self.cached_blocks = cached_blocks
        self._write_row()

    def rated(self, rates: bytes) -> None:
        """It is thought to be so fast."""
        self.rates = rates
        if self.entry is not None:
            self.entry.write_rates(rates)

    def _write_row(self) -> None:
        load = self.load
        waiting = min(load.waiting, self.other_requests)
        self.row = _ROW.pack(
            self.requests_ahead + self.line_requests,
            self.tokens_ahead + self.line_tokens,
            load.running,
            waiting + self.line_requests,
            load.free_blocks,
            self.cached_blocks,
            load.step_ms,
            self.requests_ahead - waiting,
            self.unplaced_ahead,
            self.occupancy.answering_requests + self.other_requests - waiting,
        )
        if self.entry is not None:
            self.entry.write_load(self.row)


def plausible(load: Load) -> Load:
    """The load with every number between 0 and what an engine can have; what is no number counts as 0."""
    if all(0 <= value <= MOST for value in msgspec.structs.astuple(load) if value is not None):
        return load
    told = {name: value for name in load.__struct_fields__ if (value := getattr(load, name)) is not None}
    kept = {name: type(value)(min(max(value, 0), MOST)) if math.isfinite(value) else 0 for name, value in told.items()}
    return msgspec.structs.replace(load, **kept)


class Membership:
    """The table of engines. `changed` says that the list to publish differs from the one published last.

    `version` is another after every change of who there is, of an engine's state or of what it says of itself.
    """

    def __init__(self, stale_after_ms: float, gone_after_ms: float) -> None:
        self._stale_after_ms = stale_after_ms
        self._gone_after_ms = gone_after_ms
        self._engines: dict[EngineId, Engine] = {}
        self._former: dict[EngineId, deque[Epoch]] = {}
        self._ticked_ms: float | None = None
        self.changed = False
        self.version = 0
        self.ledger = Ledger(LOAD_COLUMNS, RATE_COLUMNS)
        """Of all members: their loads and rates."""

    def get(self, engine: EngineId) -> Engine | None:
        return self._engines.get(engine)

    def all(self) -> list[Engine]:
        return list(self._engines.values())

    def ready(self) -> list[Engine]:
        return [engine for engine in self._engines.values() if engine.state is State.READY]

    def accepting(self) -> list[Engine]:
        """Those that are ready and not draining."""
        return [engine for engine in self.ready() if not engine.draining]

    def infos(self) -> list[EngineInfo]:
        """The list to publish: every engine with a link that is not gone."""
        return [engine.info for engine in self._engines.values() if engine.stock is None]

    def standing(self, engine: EngineId, epoch: Epoch) -> Standing:
        """Whether messages of this life are to be believed. Former only counts while the current life is heard of:
        which of two lives is the later one is a guess from who came last.
        """
        known = self._engines.get(engine)
        if known is None:
            return "unknown"
        if known.info.epoch == epoch:
            return "current"
        return "former" if known.state is not State.STALE and epoch in self._former[engine] else "unknown"

    def join(self, info: EngineInfo, now_ms: float, stock: Stock | None = None) -> bool:
        """Takes a Hello of a current or unknown life in, or whatever else says who an engine is.

        True if this is a new life (its index starts empty).
        """
        known = self._engines.get(info.id)
        if known is not None and known.info.epoch == info.epoch:
            known.heard_ms = now_ms
            if known.info != info:
                known.info = info
                self.changed = True
                self.version += 1
            return False
        former = self._former.setdefault(info.id, deque(maxlen=FORMER_EPOCHS_KEPT))
        if known is not None:
            former.append(known.info.epoch)
            _close(known)
        self._engines[info.id] = Engine(info, State.JOINING, now_ms, stock=stock, entry=self.ledger.entry())
        self.changed = True
        self.version += 1
        return True

    def heard(self, engine: EngineId, now_ms: float) -> bool:
        """Notes a sign of life. True if the engine was stale, so that it must tell again what it holds."""
        known = self._engines[engine]
        known.heard_ms = now_ms
        return self._on(known, Event.HEARD)

    def reported(self, engine: EngineId, load: Load, now_ms: float, cached_blocks: int = 0) -> None:
        self._engines[engine].reported(load, now_ms, cached_blocks)

    def drain(self, engine: EngineId) -> None:
        """It gets no more requests, until `undrain` or for the rest of its life."""
        self._engines[engine].drained = True
        self.version += 1

    def undrain(self, engine: EngineId) -> None:
        """It gets requests again, unless it is leaving."""
        self._engines[engine].drained = False
        self.version += 1

    def says_leaving(self, engine: EngineId, leaving: bool) -> None:
        """What the engine says of itself."""
        known = self._engines[engine]
        if known.leaving is not leaving:
            known.leaving = leaving
            self.version += 1

    def index_exact(self, engine: EngineId) -> None:
        self._on(self._engines[engine], Event.INDEX_EXACT)

    def left(self, engine: EngineId) -> None:
        """The engine said goodbye; its life is over."""
        self._on(self._engines[engine], Event.LEFT)

    def tick(self, now_ms: float) -> list[EngineId]:
        """Ages everyone. Returns who is gone. Time in which this router itself stood still counts for nobody."""
        stood_still_ms = 0.0 if self._ticked_ms is None else now_ms - self._ticked_ms
        self._ticked_ms = now_ms
        if stood_still_ms > self._stale_after_ms / 2:
            for engine in self._engines.values():
                engine.heard_ms += stood_still_ms
        before = list(self._engines)
        for engine in list(self._engines.values()):
            silent_ms = now_ms - engine.heard_ms
            if silent_ms > self._stale_after_ms:
                self._on(engine, Event.SILENT)
            if silent_ms > self._gone_after_ms:
                self._on(engine, Event.SILENT_FOR_LONG)
        return [engine_id for engine_id in before if engine_id not in self._engines]

    def _on(self, engine: Engine, event: Event) -> bool:
        state = TRANSITIONS.get((engine.state, event))
        if state is None:
            return False
        engine.state = state
        self.version += 1
        if state is State.GONE:
            del self._engines[engine.info.id], self._former[engine.info.id]
            self.changed = True
            _close(engine)
        return True


def _close(engine: Engine) -> None:
    if engine.entry is not None:
        engine.entry.close()
