"""Which engine holds which KV block in which tier, and how long a prefix each has cached.

Engines are numbered as they come, 64 to a bank of the prefix table, with a bank for every tier that one of them uses;
a bank costs memory only for blocks that its own engines hold. Not to be called from two threads at once.
"""

import heapq
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.prefix_table import BANK_ENGINES, Contents
from vllm_llmd.kernels.prefix_table_cpu import Bank, depths_of
from vllm_llmd.names import TIERS, EngineId, Tier
from vllm_llmd.router.index.evictions import Evictions

log = logging.getLogger(__name__)

Places = npt.NDArray[np.intp]

NO_NAMES: Names = np.empty(0, np.uint64)


@dataclass(frozen=True)
class Difference:
    """Blocks that the index lacks, and blocks that it has though the engine does not hold them."""

    missing: int
    extra: int

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(self.missing + other.missing, self.extra + other.extra)


@dataclass(frozen=True)
class _Seat:
    """An engine's bank and its number there."""

    bank: int
    number: int


def unpacked(names: bytes) -> Names:
    """Names as they travel, as an array that may not be written to."""
    return np.frombuffer(names, "<u8")


def unpacked_tiers(held: Mapping[Tier, bytes]) -> Mapping[Tier, Names]:
    """The same, tier by tier."""
    return {tier: unpacked(names) for tier, names in held.items()}


AllDepths = npt.NDArray[np.int32]
"""How many blocks from the start each engine holds, shape (banks, 64)."""

Tiers = dict[Tier, Bank]
"""What the same 64 engines hold, tier by tier. There is always one for the GPU."""


@dataclass(slots=True, eq=False)
class Depths:
    """What a match has found: on the GPU, and in any tier. To be read before the index changes."""

    on_gpu: AllDepths
    in_any_tier: AllDepths

    @property
    def offloaded(self) -> bool:
        """Whether anything may be in another tier than the GPU's."""
        return self.in_any_tier is not self.on_gpu

    def at(self, places: Places) -> npt.NDArray[np.int64]:
        """How many blocks from the start the engines at these places have on their GPU."""
        return self.on_gpu.ravel()[places].astype(np.int64)

    def with_offloaded_at(self, places: Places) -> npt.NDArray[np.int64]:
        """How many blocks from the start they need not compute: each is in some tier."""
        return self.in_any_tier.ravel()[places].astype(np.int64)


class PrefixIndex:
    """`max_blocks` is how many different blocks the engines of one bank may hold in a tier."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._banks: list[Tiers] = []
        self._seats: dict[EngineId, _Seat] = {}
        self._vacant: list[int] = []
        self._without_room: dict[EngineId, int] = {}
        self.evictions = Evictions()

    @property
    def bytes_in_use(self) -> int:
        return sum(bank.bytes_in_use for tiers in self._banks for bank in tiers.values())

    def apply(self, engine: EngineId, removed: Names, stored: Names, tier: Tier = "gpu") -> None:
        """Takes blocks away, then adds blocks. Names removed twice or stored twice count once."""
        seat = self._seat(engine)
        tiers = self._banks[seat.bank]
        if len(removed) and tier in tiers:
            tiers[tier].remove(removed, seat.number)
            if tier == "gpu":
                self.evictions.evicted(removed)
        if len(stored):
            if tier not in tiers:
                tiers[tier] = Bank(self._max_blocks)
            self._note_without_room(engine, tiers[tier].store(stored, seat.number))

    def clear_engine(self, engine: EngineId) -> None:
        """Forgets everything an engine holds."""
        self._without_room.pop(engine, None)
        for tier in TIERS:
            self.clear_tier(engine, tier)

    def clear_tier(self, engine: EngineId, tier: Tier) -> None:
        """Forgets what an engine holds in one tier."""
        found = self._find(engine, tier)
        if found is not None and found[0].contents(found[1]).blocks:
            found[0].clear(found[1])

    def forget_engine(self, engine: EngineId) -> None:
        """The engine is gone: its number goes to the next that comes."""
        self.clear_engine(engine)
        seat = self._seats.pop(engine, None)
        if seat is not None:
            heapq.heappush(self._vacant, seat.bank * BANK_ENGINES + seat.number)

    def replace_engine(self, engine: EngineId, held: Mapping[Tier, Names]) -> Difference:
        """Makes `held` exactly what the engine holds, tier by tier. Returns how far the index was off."""
        self._without_room.pop(engine, None)
        wrong = Difference(0, 0)
        for tier, extra, missing in self._differences(engine, held):
            self.apply(engine, extra, missing, tier)
            wrong += Difference(len(missing), len(extra))
        return wrong

    def compare(self, engine: EngineId, held: Mapping[Tier, Names]) -> Difference:
        """How far the index is off if `held` is exactly what the engine holds, tier by tier."""
        found = self._differences(engine, held)
        return sum((Difference(len(missing), len(extra)) for _, extra, missing in found), Difference(0, 0))

    def _differences(self, engine: EngineId, held: Mapping[Tier, Names]) -> Iterator[tuple[Tier, Names, Names]]:
        """Of each tier what the index has beyond `held`, and what it lacks."""
        for tier in TIERS:
            known, wanted = self.held(engine, tier), _distinct(held.get(tier, NO_NAMES))
            extra = np.setdiff1d(known, wanted, assume_unique=True)
            yield tier, extra, np.setdiff1d(wanted, known, assume_unique=True)

    def match(self, names: Names) -> Depths:
        """How many blocks from the start of `names`, which somebody asks for, each engine holds without a hole."""
        on_gpu = np.zeros((len(self._banks), BANK_ENGINES), np.int32)
        for number, tiers in enumerate(self._banks):
            tiers["gpu"].match(names, on_gpu[number])
        in_any_tier = self._with_offloaded(names, on_gpu)
        self.evictions.asked(names, in_any_tier)
        return Depths(on_gpu, in_any_tier)

    def _with_offloaded(self, names: Names, on_gpu: AllDepths) -> AllDepths:
        """The depths in any tier, which are those on the GPU where nothing is offloaded."""
        offloading = [number for number, tiers in enumerate(self._banks) if len(tiers) > 1]
        if not offloading:
            return on_gpu
        depths = on_gpu.copy()
        for number in offloading:
            holders = [bank.holders(names) for bank in self._banks[number].values()]
            depths_of(reduce(np.bitwise_or, holders), depths[number])
        return depths

    def places(self, engines: Iterable[EngineId]) -> Places:
        """Where `Depths.at` finds them, for as long as none of them is forgotten."""
        seats = map(self._seat, engines)
        return np.array([seat.bank * BANK_ENGINES + seat.number for seat in seats], np.intp)

    def held(self, engine: EngineId, tier: Tier = "gpu") -> Names:
        """What the engine holds in a tier, in any order."""
        found = self._find(engine, tier)
        return NO_NAMES if found is None else found[0].held(found[1])

    def contents(self, engine: EngineId, tier: Tier = "gpu") -> Contents:
        """How much it holds in a tier, and the exclusive or of the names."""
        found = self._find(engine, tier)
        return Contents(0, 0) if found is None else found[0].contents(found[1])

    def without_room(self, engine: EngineId) -> int:
        """How many blocks the engine holds, or held, that the index has no room for."""
        return self._without_room.get(engine, 0)

    def _find(self, engine: EngineId, tier: Tier) -> tuple[Bank, int] | None:
        """The bank that has what the engine holds in a tier, and the engine's number there."""
        seat = self._seats.get(engine)
        bank = None if seat is None else self._banks[seat.bank].get(tier)
        return None if seat is None or bank is None else (bank, seat.number)

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
            self._banks.append({"gpu": Bank(self._max_blocks)})
            self._vacant = list(range(first, first + BANK_ENGINES))
        return _Seat(*divmod(heapq.heappop(self._vacant), BANK_ENGINES))


def _distinct(names: Names) -> Names:
    """Each name once. For names, which are as good as random, sorting takes a tenth of the time of numpy's `unique`."""
    ordered = np.sort(names)
    first = np.ones(len(ordered), bool)
    first[1:] = ordered[1:] != ordered[:-1]
    once: Names = ordered[first]
    return once
