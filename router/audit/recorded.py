"""Decisions of a recording as policies would see them again: facts, candidates, and what was chosen. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vllm_llmd.names import EngineId
from vllm_llmd.router.audit.recording import (
    FACTS,
    LOADS,
    PREFIXES,
    RATES,
    SCALARS,
    Began,
    Decided,
    Ended,
    Listed,
    Lost,
    Member,
    Message,
)
from vllm_llmd.router.candidates import Candidates, Loads, RateColumns, Roster
from vllm_llmd.router.members.membership import Engine, State, Stock
from vllm_llmd.router.members.rates import Rates, packed
from vllm_llmd.router.request import Facts
from vllm_llmd.wire import Load

_NOTHING: Final = Facts(None, None, b"", b"", 0, None)


@dataclass(frozen=True)
class Recorded:
    """One decision. `destination` and `source` are places; None for a destination where nobody could take it.

    `saturated` were not to be chosen while others had room.
    """

    id: str
    facts: Facts
    candidates: Candidates
    destination: int | None
    source: int | None
    until: int | None
    saturated: frozenset[EngineId] = frozenset()


Event = Began | Recorded | Ended | Lost


class Restorer:
    """Follows a recording from its beginning, message by message.

    `orphans` are decisions that cannot be restored, since what they refer to was damaged.
    """

    def __init__(self) -> None:
        self._engines: dict[int, Engine] = {}
        self._rosters: dict[int, tuple[Roster, list[int]]] = {}
        self._columns: tuple[str, ...] = ()
        self.orphans = 0

    def events(self, messages: Iterable[Message]) -> Iterator[Event]:
        """The decisions restored; what else concerns a replay as it is."""
        for message in messages:
            match message:
                case Began():
                    self._engines, self._rosters, self._columns = {}, {}, message.columns
                    yield message
                case Member():
                    stock = Stock(None) if message.stock else None
                    self._engines[message.number] = Engine(message.info, State.READY, 0.0, stock=stock)
                case Listed():
                    self._list(message)
                case Decided():
                    try:
                        yield self._restored(message)
                    except (ValueError, TypeError, LookupError):  # it contradicts what came before
                        self.orphans += 1
                case _:
                    yield message

    def _list(self, listed: Listed) -> None:
        try:
            members = np.frombuffer(listed.members, np.uint32).tolist()
            roster = Roster.of([self._engines[number] for number in members], listed.model)
        except (ValueError, LookupError):
            return  # its decisions will be orphans
        self._rosters[listed.number] = roster, members

    def _restored(self, decided: Decided) -> Recorded:
        """Raises ValueError, TypeError or LookupError for one that cannot be."""
        roster, members = self._rosters[decided.roster]
        rows = np.frombuffer(decided.rows, np.float64).reshape(-1, len(self._columns))
        for place, row in zip(np.frombuffer(decided.changed, np.uint32).tolist(), rows.tolist(), strict=True):
            _take(self._engines[members[place]], dict(zip(self._columns, row, strict=True)))
        cached = np.zeros((len(PREFIXES), len(members)), np.int64)
        told = np.frombuffer(decided.cached, np.int64).reshape(len(PREFIXES), -1)
        cached[:, np.frombuffer(decided.cached_at, np.uint32)] = told
        scalars: dict[str, Any] = {name: decided.scalars[name] for name in SCALARS if name in decided.scalars}
        blocks = cached[0], cached[1], cached[2]
        columns = Candidates(roster, *blocks, Loads.of(roster.engines), RateColumns.of(roster.engines))
        candidates = replace(columns, coming_blocks=cached[3] if cached[3].any() else None, **scalars)
        saturated = frozenset(roster.id(place) for place in np.frombuffer(decided.saturated, np.uint32).tolist())
        choice = decided.destination, decided.source, decided.until
        return Recorded(decided.id, facts_of(decided), candidates, *choice, saturated)


def facts_of(decided: Decided) -> Facts:
    """The request, with a made-up text that begins like another's for as long as the real one did."""
    told = {name: decided.facts[name] for name in FACTS if name in decided.facts}
    names = np.frombuffer(decided.chunks, np.uint64)
    return replace(_NOTHING, **told, text=made_up(names, decided.chunk_bytes)[: decided.text_bytes])


def made_up(names: "npt.NDArray[np.uint64]", chunk_bytes: int) -> bytes:
    """A text of chunks that are the same where their names are."""
    words = -(-chunk_bytes // 8)
    repeated = np.repeat(names[:, None], words, axis=1)
    return repeated.view(np.uint8)[:, :chunk_bytes].tobytes()


def _take(engine: Engine, told: "dict[str, float]") -> None:
    """The engine becomes as busy and as fast as is told."""
    load = {name: told.get(f"load.{name}", 0.0) for name in LOADS}
    counts = {name: int(load[name]) for name in ("running", "waiting", "free_blocks")}
    engine.load = Load(**counts, step_ms=load["step_ms"])
    engine.other_requests, engine.other_tokens = int(load["requests"]), int(load["tokens"])
    engine.unplaced_ahead, engine.cached_blocks = int(load["unplaced"]), int(load["cached_blocks"])
    engine.row = np.array([load[name] for name in LOADS]).tobytes()
    engine.rates = packed(Rates(**{name: told[f"rate.{name}"] for name in RATES if f"rate.{name}" in told}))
