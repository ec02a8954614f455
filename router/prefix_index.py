"""Which engine holds which KV block, and how long a prefix each has cached.

Engines are numbered as they come, 64 to a bank of the prefix table; a bank costs memory only for blocks that its own
engines hold. Not to be called from two threads at once.
"""

import heapq
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.prefix_table import BANK_ENGINES, Contents
from vllm_llmd.kernels.prefix_table_cpu import Bank
from vllm_llmd.names import EngineId

log = logging.getLogger(__name__)

Places = npt.NDArray[np.intp]

_EVERYONE = (1 << BANK_ENGINES) - 1


@dataclass(frozen=True)
class Difference:
    """Blocks that the index lacks, and blocks that it has though the engine does not hold them."""

    missing: int
    extra: int


@dataclass(frozen=True)
class _Seat:
    """An engine's bank and its number there."""

    bank: int
    number: int


def unpacked(names: bytes) -> Names:
    """Names as they travel, as an array that may not be written to."""
    return np.frombuffer(names, "<u8")


@dataclass(frozen=True)
class Depths:
    """What a match has found, bank by bank. To be read before the index changes."""

    seats: Mapping[EngineId, _Seat]
    banks: Sequence[npt.NDArray[np.int32]]

    def of(self, engine: EngineId) -> int:
        """How many blocks from the start the engine holds."""
        seat = self.seats.get(engine)
        return 0 if seat is None else int(self.banks[seat.bank][seat.number])

    def at(self, places: Places) -> npt.NDArray[np.int64]:
        """The same for many engines, by their places."""
        return np.concatenate(self.banks)[places].astype(np.int64) if len(places) else np.empty(0, np.int64)


class PrefixIndex:
    """`max_blocks` is how many different blocks the engines of one bank may hold."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._banks: list[Bank] = []
        self._seats: dict[EngineId, _Seat] = {}
        self._vacant: list[int] = []
        self._without_room: dict[EngineId, int] = {}

    def apply(self, engine: EngineId, removed: Names, stored: Names) -> None:
        """Takes blocks away, then adds blocks. Names removed twice or stored twice count once."""
        seat = self._seat(engine)
        bank = self._banks[seat.bank]
        if len(removed):
            bank.remove(removed, seat.number)
        if len(stored):
            self._note_without_room(engine, bank.store(stored, seat.number))

    def clear_engine(self, engine: EngineId) -> None:
        """Forgets everything an engine holds."""
        self._without_room.pop(engine, None)
        seat = self._seats.get(engine)
        if seat is not None and self._banks[seat.bank].contents(seat.number).blocks:
            self._banks[seat.bank].clear(seat.number)

    def forget_engine(self, engine: EngineId) -> None:
        """The engine is gone: its number goes to the next that comes."""
        self.clear_engine(engine)
        seat = self._seats.pop(engine, None)
        if seat is not None:
            heapq.heappush(self._vacant, seat.bank * BANK_ENGINES + seat.number)

    def replace_engine(self, engine: EngineId, names: Names) -> Difference:
        """Makes `names` exactly what the engine holds. Returns how far the index was off."""
        self._without_room.pop(engine, None)
        removed, stored = self._difference(engine, names)
        self.apply(engine, removed, stored)
        return Difference(len(stored), len(removed))

    def compare(self, engine: EngineId, names: Names) -> Difference:
        """How far the index is off if `names` are exactly what the engine holds."""
        extra, missing = self._difference(engine, names)
        return Difference(len(missing), len(extra))

    def _difference(self, engine: EngineId, names: Names) -> tuple[Names, Names]:
        held, wanted = self.held(engine), np.unique(names)
        return np.setdiff1d(held, wanted, assume_unique=True), np.setdiff1d(wanted, held, assume_unique=True)

    def match(self, names: Names) -> Depths:
        """How many blocks from the start of `names` each engine holds without a hole."""
        return Depths(self._seats, [bank.match(names, _EVERYONE) for bank in self._banks])

    def places(self, engines: Iterable[EngineId]) -> Places:
        """Where `Depths.at` finds them, for as long as none of them is forgotten."""
        seats = map(self._seat, engines)
        return np.array([seat.bank * BANK_ENGINES + seat.number for seat in seats], np.intp)

    def held(self, engine: EngineId) -> Names:
        """What the engine holds, in any order."""
        seat = self._seats.get(engine)
        return np.empty(0, np.uint64) if seat is None else self._banks[seat.bank].held(seat.number)

    def contents(self, engine: EngineId) -> Contents:
        """How much it holds, and the exclusive or of the names."""
        seat = self._seats.get(engine)
        return Contents(0, 0) if seat is None else self._banks[seat.bank].contents(seat.number)

    def without_room(self, engine: EngineId) -> int:
        """How many blocks the engine holds, or held, that the index has no room for."""
        return self._without_room.get(engine, 0)

    def _note_without_room(self, engine: EngineId, blocks: int) -> None:
        if blocks == 0:
            return
        if not self._without_room:
            log.warning("the prefix index is full: set --index-blocks to more than %d", self._max_blocks)
        self._without_room[engine] = self.without_room(engine) + blocks

    def _seat(self, engine: EngineId) -> _Seat:
        seat = self._seats.get(engine)
        if seat is None:
            seat = self._seats[engine] = self._next_seat()
        return seat

    def _next_seat(self) -> _Seat:
        if not self._vacant:
            first = len(self._banks) * BANK_ENGINES
            self._banks.append(Bank(self._max_blocks))
            self._vacant = list(range(first, first + BANK_ENGINES))
        return _Seat(*divmod(heapq.heappop(self._vacant), BANK_ENGINES))
