"""A map of at most so many 64-bit keys to rows that forgets the key used longest ago, compiled by numba.

Whatever belongs to a key is kept by its user in arrays of as many rows. Keys are found by open addressing in a table
at most half full; a ring of rows, newest to oldest, says what to forget. The last row of the ring is its two ends, and
stands for "no row" elsewhere. Its plain twin is `PlainLru` in `text_table`. Costs 24 to 32 bytes a key.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.memory_cpu import compiled

Rows = npt.NDArray[np.int32]

NEWER, OLDER = 0, 1
EMPTY = 0
"""A place in the table where no row stands; rows stand there by their number plus one."""

MIX, SHIFT = np.uint64(0x9E3779B185EBCA87), np.uint64(32)


class Lru(NamedTuple):
    """`keys` by row; the ring as two links per row; the table; and how many rows are in use, shape (1,)."""

    keys: Names
    ring: Rows
    table: Rows
    used: npt.NDArray[np.int64]


def new(max_keys: int) -> Lru:
    """An empty map."""
    ring = np.full((max_keys + 1, 2), max_keys, np.int32)
    table = np.zeros(1 << (2 * max_keys - 1).bit_length(), np.int32)
    return Lru(np.zeros(max_keys, np.uint64), ring, table, np.zeros(1, np.int64))


def bytes_of(arrays: Any) -> int:
    """What the arrays of a tuple, and of tuples in it, take."""
    return sum(bytes_of(each) if isinstance(each, tuple) else each.nbytes for each in arrays)


@compiled
def no_row(lru: Lru) -> int:
    """What stands for no row."""
    return len(lru.keys)


@compiled
def find(lru: Lru, key: np.uint64) -> int:
    """The row of a key, or `no_row`. It stays as old as it was."""
    row = int(lru.table[_place(lru, key)])
    return row - 1 if row != EMPTY else len(lru.keys)


@compiled
def insert(lru: Lru, key: np.uint64) -> int:
    """A row for a key that has none, as the newest. Where all rows are in use, the oldest key loses its own."""
    if lru.used[0] < len(lru.keys):
        row = int(lru.used[0])
        lru.used[0] += 1
    else:
        row = int(lru.ring[len(lru.keys), NEWER])
        _delete(lru, _place(lru, lru.keys[row]))
        _unlink(lru, row)
    lru.keys[row] = key
    lru.table[_place(lru, key)] = row + 1
    _link(lru, row)
    return row


@compiled
def touch(lru: Lru, row: int) -> None:
    """The row is the newest now."""
    _unlink(lru, row)
    _link(lru, row)


@compiled
def _home(lru: Lru, key: np.uint64) -> int:
    return int(np.int64((key * MIX) >> SHIFT)) & (len(lru.table) - 1)


@compiled
def _place(lru: Lru, key: np.uint64) -> int:
    """Where a key's row stands in the table, or where it would."""
    last = len(lru.table) - 1
    at = _home(lru, key)
    while lru.table[at] != EMPTY and lru.keys[lru.table[at] - 1] != key:
        at = (at + 1) & last
    return at


@compiled
def _delete(lru: Lru, hole: int) -> None:
    """Empties a place, and moves back into it what had been displaced by it."""
    last = len(lru.table) - 1
    at = (hole + 1) & last
    while lru.table[at] != EMPTY:
        home = _home(lru, lru.keys[lru.table[at] - 1])
        if (at - home) & last >= (at - hole) & last:
            lru.table[hole] = lru.table[at]
            hole = at
        at = (at + 1) & last
    lru.table[hole] = EMPTY


@compiled
def _unlink(lru: Lru, row: int) -> None:
    newer, older = lru.ring[row, NEWER], lru.ring[row, OLDER]
    lru.ring[newer, OLDER] = older
    lru.ring[older, NEWER] = newer


@compiled
def _link(lru: Lru, row: int) -> None:
    ends = len(lru.keys)
    newest = lru.ring[ends, OLDER]
    lru.ring[row, NEWER], lru.ring[row, OLDER] = ends, newest
    lru.ring[newest, NEWER] = row
    lru.ring[ends, OLDER] = row
