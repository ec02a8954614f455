"""`block_names.BlockNamer`, compiled: a table from an engine's own block hashes to our names, and what changed.

A hash is a 64-bit key here, never 0. Open addressing, one slot of 32 bytes per cached block and at most 5 of 8 taken;
a full table is doubled. Removing moves back what had been displaced. Not to be called from two threads at once.
"""

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels.hash_chain import TOKEN_BYTES, Names
from vllm_llmd.kernels.hash_chain_cpu import TokenIds, hash_at
from vllm_llmd.kernels.memory_cpu import compiled, prefetch

Table = npt.NDArray[np.uint64]
"""Shape (slots, 4), a power of two of slots."""
Counts = npt.NDArray[np.int64]

KEY, NAME, COPIES, STORED_AT = 0, 1, 2, 3
"""`STORED_AT` counts the names stored since the start, which tells whether this batch has stored it, and where."""

TAKEN, MARK, STORED, REMOVED, WITHDRAWN, UNNAMED = 0, 1, 2, 3, 4, 5
"""Slots taken; names stored before this batch; stored, removed, and stored and removed again, in this batch; blocks
whose parent is unknown, since the start."""

COUNTS = 6
SMALLEST = 1 << 10
SLOT_BYTES = 32
NOTHING, ONE = np.uint64(0), np.uint64(1)
MIX, HALF = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)


class NameTable:
    """What one pool holds, and the change that a batch of events makes: net of `removed`, then `stored`."""

    def __init__(self) -> None:
        self.counts: Counts = np.zeros(COUNTS, np.int64)
        self.stored: Names = np.empty(SMALLEST, np.uint64)
        self.removed: Names = np.empty(SMALLEST, np.uint64)
        self.table: Table = np.zeros((SMALLEST, 4), np.uint64)

    def clear(self) -> None:
        """Nothing is cached any more."""
        self.table[:] = NOTHING
        self.counts[TAKEN] = 0
        self.forget_changes()

    def expect(self, keys: int) -> None:
        """Makes the table large enough for so many more keys."""
        slots = len(self.table)
        while not has_room(slots, self.counts[TAKEN], keys):
            slots *= 2
        if slots > len(self.table):
            table = np.zeros((slots, 4), np.uint64)
            _move_all(self.table, table)
            self.table = table

    def make_room(self, keys: int) -> None:
        """For an event or several with so many blocks in all."""
        self.expect(keys)
        for name, used in (("stored", self.counts[STORED]), ("removed", self.counts[REMOVED])):
            old = getattr(self, name)
            if used + keys > len(old):
                new = np.empty(2 * (used + keys), np.uint64)
                new[:used] = old[:used]
                setattr(self, name, new)

    def store(self, keys: Names, parent: int | None, tokens: TokenIds, digests: Names) -> None:
        """Blocks of one size are cached after `parent`. `digests` as for `chain_names`."""
        self.make_room(len(keys))
        size = len(tokens) // max(len(keys), 1)
        has_parent, parent_key = parent is not None, np.uint64(parent or 0)
        store_run(self.table, self.counts, keys, tokens, size, has_parent, parent_key, digests, self.stored)

    def remove(self, keys: Names) -> None:
        """One cached copy of each is gone."""
        self.make_room(len(keys))
        remove_run(self.table, self.counts, keys, self.stored, self.removed)

    def cached_name(self, key: int) -> int | None:
        """The name of a cached block."""
        row = _find(self.table, np.uint64(key))
        return int(self.table[row, NAME]) if self.table[row, KEY] else None

    def take_changes(self) -> tuple[Names, Names]:
        """Names removed, then names stored, since this was last asked."""
        removed = self.removed[: self.counts[REMOVED]].copy()
        stored = self.stored[: self.counts[STORED]]
        stored = stored[stored != NOTHING] if self.counts[WITHDRAWN] else stored.copy()
        self.forget_changes()
        return removed, stored

    def forget_changes(self) -> None:
        self.counts[MARK] += self.counts[STORED]
        self.counts[STORED] = self.counts[REMOVED] = self.counts[WITHDRAWN] = 0


@compiled
def has_room(slots: int, taken: int, keys: int) -> bool:
    return 8 * (taken + keys) <= 5 * slots


@compiled
def _home(table: Table, key: np.uint64) -> int:
    return int(np.int64((key * MIX) >> HALF)) & (len(table) - 1)


@compiled
def _find(table: Table, key: np.uint64) -> int:
    """The slot of a key, or the empty one where it would be."""
    at = _home(table, key)
    while table[at, KEY] not in (key, NOTHING):
        at = (at + 1) & (len(table) - 1)
    return at


@compiled
def fetch(table: Table, key: np.uint64) -> None:
    """Asks the memory for where a key would be if it were alone. It does so for many at a time, and waits for none."""
    prefetch(table.ctypes.data, _home(table, key) * SLOT_BYTES)


@compiled
def store_run(
    table: Table,
    counts: Counts,
    keys: Names,
    tokens: TokenIds,
    block_size: int,
    has_parent: bool,
    parent_key: np.uint64,
    digests: Names,
    stored: Names,
) -> None:
    """Names the blocks of one event. With an unknown parent, those after the first one that is known."""
    name, first = NOTHING, 0
    if has_parent:
        row = _find(table, parent_key)
        while table[row, KEY] == NOTHING:
            if first == len(keys):
                return
            row = _find(table, keys[first])
            first += 1
            if table[row, KEY] == NOTHING:
                counts[UNNAMED] += 1
            else:
                table[row, COPIES] += ONE
        name = table[row, NAME]
    size = block_size * TOKEN_BYTES
    address = tokens.ctypes.data
    for i in range(first, len(keys)):
        seed = name ^ digests[i] if len(digests) else name
        name = hash_at(address + i * size, size, seed)
        if name == NOTHING:
            name = ONE
        row = _find(table, keys[i])
        if table[row, KEY] == NOTHING:
            table[row, KEY], table[row, NAME], table[row, COPIES] = keys[i], name, ONE
            table[row, STORED_AT] = np.uint64(counts[MARK] + counts[STORED])
            stored[counts[STORED]] = name
            counts[STORED] += 1
            counts[TAKEN] += 1
        else:
            table[row, COPIES] += ONE


@compiled
def remove_run(table: Table, counts: Counts, keys: Names, stored: Names, removed: Names) -> None:
    for i in range(len(keys)):
        row = _find(table, keys[i])
        if table[row, KEY] == NOTHING:
            continue
        if table[row, COPIES] > ONE:
            table[row, COPIES] -= ONE
            continue
        place = np.int64(table[row, STORED_AT]) - counts[MARK]
        if place >= 0:
            stored[place] = NOTHING
            counts[WITHDRAWN] += 1
        else:
            removed[counts[REMOVED]] = table[row, NAME]
            counts[REMOVED] += 1
        _delete(table, row)
        counts[TAKEN] -= 1


@compiled
def _delete(table: Table, hole: int) -> None:
    """Empty a slot, and move back into it what had been displaced by it."""
    last = len(table) - 1
    at = (hole + 1) & last
    while table[at, KEY] != NOTHING:
        if (at - _home(table, table[at, KEY])) & last >= (at - hole) & last:
            _copy(table, at, table, hole)
            hole = at
        at = (at + 1) & last
    table[hole, KEY] = NOTHING


@compiled
def _move_all(old: Table, new: Table) -> None:
    for row in range(len(old)):
        if old[row, KEY] != NOTHING:
            _copy(old, row, new, _find(new, old[row, KEY]))


@compiled
def _copy(origin: Table, row: int, to: Table, place: int) -> None:
    for column in range(4):
        to[place, column] = origin[row, column]
