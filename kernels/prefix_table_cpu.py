"""A bank of the prefix table, compiled by numba; its contract is `prefix_table.BankLike`.

Open addressing in segments of 512 slots of 16 bytes (name, engines as bits). A full segment is split in two, so growing
never takes longer than that; a directory leads from the first bits of a name's place to its segment. A place is a name
with its bits mixed, for names that have little chance in them. Removing moves back what had been displaced, so
deletions leave nothing behind. A resident block costs 19 to 40 bytes, 28 on average; memory is reserved for
`max_blocks` and taken as segments come into use. Not to be called from two threads at once; nothing holds the GIL.
"""

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.memory_cpu import compiled, prefetch
from vllm_llmd.kernels.prefix_table import BANK_ENGINES, Contents, Depths

SEGMENT = 512
"""Slots of a segment."""

FULL = 416
"""Slots that may be taken before a segment is split: one is always empty, which ends a search."""

EXPECTED_FILL = 0.5
"""Slots that names take at least, of those in use, once there are many: segments split when full are half full."""

SLOT_BYTES = 16

AHEAD = 32
"""How many names ahead slots are asked for: the memory answers many questions at once."""

KEY, HOLDERS = 0, 1
DEPTH, SEGMENTS = 0, 1

LAST = SEGMENT - 1
NO_NAME, MASK = np.uint64(0), np.uint64(LAST)
ONE = np.uint64(1)
MIX, SLOT_SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)

Slots = npt.NDArray[np.uint64]
Directory = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]


class Bank:
    """Holds up to `max_blocks` different names, give or take what chance makes of the segments."""

    def __init__(self, max_blocks: int) -> None:
        segments = max(int(max_blocks / (FULL * EXPECTED_FILL)), 1)
        bits = max(segments - 1, 1).bit_length() + 4
        self._slots: Slots = np.zeros((segments * SEGMENT, 2), np.uint64)
        self._directory: Directory = np.zeros(1 << bits, np.uint32)
        self._filled: Counts = np.zeros(segments, np.int64)
        self._depths: Counts = np.zeros(segments, np.int64)
        self._state: Counts = np.array([0, 1], np.int64)
        self._scratch: Slots = np.zeros((SEGMENT, 2), np.uint64)
        self._blocks: Counts = np.zeros(BANK_ENGINES, np.int64)
        self._digests: Names = np.zeros(BANK_ENGINES, np.uint64)
        table = self._slots, self._directory, self._filled, self._depths, self._state, self._scratch
        self._all = *table, self._blocks, self._digests

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the segments in use and of the directory's part in use."""
        depth, segments = (int(each) for each in self._state)
        return segments * SEGMENT * 16 + (1 << depth) * 4 + segments * 16

    def store(self, names: Names, engine: int) -> int:
        return int(_store(*self._all, names, engine))

    def remove(self, names: Names, engine: int) -> None:
        _remove(self._slots, self._directory, self._filled, self._state, self._blocks, self._digests, names, engine)

    def clear(self, engine: int) -> None:
        _clear(self._slots, self._filled, self._state, self._scratch, engine)
        self._blocks[engine] = 0
        self._digests[engine] = 0

    def match(self, names: Names, depths: Depths) -> None:
        _match(self._slots, self._directory, self._state, names, depths)

    def holders(self, names: Names) -> Names:
        return _holders(self._slots, self._directory, self._state, names)

    def held(self, engine: int) -> Names:
        return _held(self._slots, self._state, self._blocks[engine], engine)

    def contents(self, engine: int) -> Contents:
        return Contents(int(self._blocks[engine]), int(self._digests[engine]))


def depths_of(holders: Names, depths: Depths) -> None:
    """As the reference."""
    _depths_of(holders, depths)


def compile_ahead() -> None:
    """Compiles every kernel or loads it from numba's cache, so that no message has to wait for that."""
    bank, some, depths = Bank(1), np.ones(1, np.uint64), np.zeros(BANK_ENGINES, np.int32)
    for names in (some, _read_only(some)):
        bank.store(names, 0)
        bank.remove(names, 0)
        bank.match(names, depths)
        depths_of(bank.holders(names), depths)
    bank.clear(0)
    bank.held(0)


def _read_only(names: Names) -> Names:
    """Names as they come off the wire are of a type of their own to numba."""
    names = names.copy()
    names.flags.writeable = False
    return names


@compiled
def _segment_of(directory: Directory, state: Counts, name: np.uint64) -> int:
    depth = state[DEPTH]
    return int(np.int64(directory[(name * MIX) >> np.uint64(64 - depth)] if depth else directory[0]))


@compiled
def _home(name: np.uint64) -> int:
    """The slot of its segment where a name would be if it were alone."""
    return int(np.int64((name * MIX >> SLOT_SHIFT) & MASK))


@compiled
def _find(slots: Slots, segment: int, name: np.uint64) -> int:
    """The row of a name within its segment, or of the empty slot where it would be."""
    base = segment * SEGMENT
    at = _home(name)
    while True:
        key = slots[base + at, KEY]
        if key in (name, NO_NAME):
            return base + at
        at = (at + 1) & LAST


@compiled
def _store(
    slots: Slots,
    directory: Directory,
    filled: Counts,
    depths: Counts,
    state: Counts,
    scratch: Slots,
    blocks: Counts,
    digests: Names,
    names: Names,
    engine: int,
) -> int:
    bit = ONE << np.uint64(engine)
    missed = 0
    rows = np.empty(AHEAD, np.int64)
    _fetch_first(slots, directory, state, names, rows)
    for number in range(len(names)):
        name = names[number]
        _fetch(slots, directory, state, names, number + AHEAD, rows)
        if name == NO_NAME:
            continue
        segment = _segment_of(directory, state, name)
        row = _find(slots, segment, name)
        while slots[row, KEY] == NO_NAME and filled[segment] >= FULL:
            if not _split(slots, directory, filled, depths, state, scratch, segment, name):
                break
            segment = _segment_of(directory, state, name)
            row = _find(slots, segment, name)
        if slots[row, KEY] == NO_NAME:
            if filled[segment] >= FULL:
                missed += 1
                continue
            slots[row, KEY] = name
            filled[segment] += 1
        if not slots[row, HOLDERS] & bit:
            slots[row, HOLDERS] |= bit
            blocks[engine] += 1
            digests[engine] ^= name
    return missed


@compiled
def _fetch_first(slots: Slots, directory: Directory, state: Counts, names: Names, rows: Counts) -> None:
    for number in range(AHEAD):
        _fetch(slots, directory, state, names, number, rows)


@compiled
def _fetch(slots: Slots, directory: Directory, state: Counts, names: Names, number: int, rows: Counts) -> None:
    """Notes in `rows` where a name would be if it were alone, asks the memory for that, and waits for nothing."""
    if number < len(names):
        row = _segment_of(directory, state, names[number]) * SEGMENT + _home(names[number])
        prefetch(slots.ctypes.data, row * SLOT_BYTES)
        rows[number & AHEAD - 1] = row


@compiled
def _found(slots: Slots, row: int, name: np.uint64) -> int:
    """As `_find`, from where the name would be if it were alone, as long as nothing has changed since."""
    return row if slots[row, KEY] == name else _find(slots, row // SEGMENT, name)


@compiled
def _split(
    slots: Slots,
    directory: Directory,
    filled: Counts,
    depths: Counts,
    state: Counts,
    scratch: Slots,
    segment: int,
    name: np.uint64,
) -> bool:
    """Move half of a segment's names, those with the next bit of their place set, to a new one. False without room."""
    new = state[SEGMENTS]
    if new * SEGMENT >= len(slots):
        return False
    depth = depths[segment]
    if depth == state[DEPTH]:
        size = 1 << depth
        if 2 * size > len(directory):
            return False
        for i in range(size - 1, -1, -1):
            directory[2 * i] = directory[2 * i + 1] = directory[i]
        state[DEPTH] += 1
    state[SEGMENTS] += 1
    depths[segment] = depths[new] = depth + 1
    prefix = np.int64((name * MIX) >> np.uint64(64 - depth)) if depth else 0
    width = 1 << (state[DEPTH] - depth - 1)
    first = (2 * prefix + 1) * width
    for i in range(first, first + width):
        directory[i] = new
    bit = ONE << np.uint64(63 - depth)
    _deal(slots, filled, scratch, segment, new, bit)
    return True


@compiled
def _deal(slots: Slots, filled: Counts, scratch: Slots, segment: int, new: int, bit: np.uint64) -> None:
    """Empty a segment and place anew what somebody holds: into `new` where the name's place has `bit` set."""
    for i in range(SEGMENT):
        row = segment * SEGMENT + i
        scratch[i, KEY], scratch[i, HOLDERS] = slots[row, KEY], slots[row, HOLDERS]
        slots[row, KEY] = slots[row, HOLDERS] = NO_NAME
    filled[segment] = 0
    for i in range(SEGMENT):
        name = scratch[i, KEY]
        if scratch[i, HOLDERS] != NO_NAME:
            into = new if name * MIX & bit else segment
            row = _find(slots, into, name)
            slots[row, KEY], slots[row, HOLDERS] = name, scratch[i, HOLDERS]
            filled[into] += 1


@compiled
def _remove(
    slots: Slots,
    directory: Directory,
    filled: Counts,
    state: Counts,
    blocks: Counts,
    digests: Names,
    names: Names,
    engine: int,
) -> None:
    bit = ONE << np.uint64(engine)
    rows = np.empty(AHEAD, np.int64)
    _fetch_first(slots, directory, state, names, rows)
    for number in range(len(names)):
        name = names[number]
        _fetch(slots, directory, state, names, number + AHEAD, rows)
        segment = _segment_of(directory, state, name)
        row = _find(slots, segment, name)
        if slots[row, KEY] == NO_NAME or not slots[row, HOLDERS] & bit:
            continue
        slots[row, HOLDERS] ^= bit
        blocks[engine] -= 1
        digests[engine] ^= name
        if slots[row, HOLDERS] == NO_NAME:
            _delete(slots, segment, row - segment * SEGMENT)
            filled[segment] -= 1


@compiled
def _delete(slots: Slots, segment: int, hole: int) -> None:
    """Empty a slot, and move back into it what had been displaced by it."""
    base = segment * SEGMENT
    at = (hole + 1) & LAST
    while slots[base + at, KEY] != NO_NAME:
        home = _home(slots[base + at, KEY])
        if (at - home) & LAST >= (at - hole) & LAST:
            slots[base + hole, KEY] = slots[base + at, KEY]
            slots[base + hole, HOLDERS] = slots[base + at, HOLDERS]
            hole = at
        at = (at + 1) & LAST
    slots[base + hole, KEY] = slots[base + hole, HOLDERS] = NO_NAME


@compiled
def _clear(slots: Slots, filled: Counts, state: Counts, scratch: Slots, engine: int) -> None:
    bit = ONE << np.uint64(engine)
    for segment in range(state[SEGMENTS]):
        emptied = False
        for row in range(segment * SEGMENT, (segment + 1) * SEGMENT):
            if slots[row, HOLDERS] & bit:
                slots[row, HOLDERS] ^= bit
                emptied |= slots[row, HOLDERS] == NO_NAME
        if emptied:
            _deal(slots, filled, scratch, segment, segment, NO_NAME)


@compiled
def _match(slots: Slots, directory: Directory, state: Counts, names: Names, depths: Depths) -> None:
    alive = ~NO_NAME
    rows = np.empty(AHEAD, np.int64)
    _fetch_first(slots, directory, state, names, rows)
    for depth in range(len(names)):
        row = _found(slots, rows[depth & AHEAD - 1], names[depth])
        _fetch(slots, directory, state, names, depth + AHEAD, rows)
        alive = _who_goes_on(depths, alive, slots[row, HOLDERS], depth)
        if alive == NO_NAME:
            return
    _note(depths, alive, len(names))


@compiled
def _holders(slots: Slots, directory: Directory, state: Counts, names: Names) -> Names:
    holders = np.empty(len(names), np.uint64)
    rows = np.empty(AHEAD, np.int64)
    _fetch_first(slots, directory, state, names, rows)
    for number in range(len(names)):
        holders[number] = slots[_found(slots, rows[number & AHEAD - 1], names[number]), HOLDERS]
        _fetch(slots, directory, state, names, number + AHEAD, rows)
    return holders


@compiled
def _depths_of(holders: Names, depths: Depths) -> None:
    alive = ~NO_NAME
    for depth in range(len(holders)):
        alive = _who_goes_on(depths, alive, holders[depth], depth)
        if alive == NO_NAME:
            return
    _note(depths, alive, len(holders))


@compiled
def _who_goes_on(depths: Depths, alive: np.uint64, holders: np.uint64, depth: int) -> np.uint64:
    """Who of the alive holds the next block too. The others have got as far as `depth`."""
    held: np.uint64 = alive & holders
    if held != alive:
        _note(depths, alive ^ held, depth)
    return held


@compiled
def _note(depths: Depths, engines: np.uint64, depth: int) -> None:
    for engine in range(BANK_ENGINES):
        if engines >> np.uint64(engine) & ONE:
            depths[engine] = depth


@compiled
def _held(slots: Slots, state: Counts, blocks: int, engine: int) -> Names:
    names = np.empty(blocks, np.uint64)
    found = 0
    for row in range(state[SEGMENTS] * SEGMENT):
        if slots[row, HOLDERS] >> np.uint64(engine) & ONE:
            names[found] = slots[row, KEY]
            found += 1
    return names
