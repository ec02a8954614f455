"""The text table, compiled by numba; its contract is `text_table.TextTableLike`.

A chunk costs 41 to 57 bytes, a page of up to 16 blocks 172 to 188, all of it reserved at the start and taken by the
system as rows come into use. A page leads to the row of the page before it, which is safe for as long as no page
outlives that one: whatever uses a page uses all before it afterwards. Not to be called from two threads at once;
nothing holds the GIL.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels import lru_cpu
from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.lru_cpu import Lru, Rows, find, insert, no_row, touch
from vllm_llmd.kernels.memory_cpu import compiled
from vllm_llmd.kernels.text_table import PAGE_BLOCKS

Counts = npt.NDArray[np.uint8]
Depths = npt.NDArray[np.int64]

NO_NAME = np.uint64(0)


class Pages(NamedTuple):
    """By row: the names, how many there are, the row of the page before, and how many pages are before it."""

    lru: Lru
    names: Names
    counts: Counts
    before: Rows
    numbers: Rows


class Chunks(NamedTuple):
    """By row: the page that a chunk is tied to, by its last name, and how many of its names; none if 0."""

    lru: Lru
    pages: Names
    counts: Counts


class TextTable:
    """At most `max_chunks` chunks and `max_pages` pages."""

    def __init__(self, max_chunks: int, max_pages: int) -> None:
        self._chunks = Chunks(lru_cpu.new(max_chunks), np.zeros(max_chunks, np.uint64), np.zeros(max_chunks, np.uint8))
        self._pages = Pages(
            lru_cpu.new(max_pages),
            np.zeros((max_pages, PAGE_BLOCKS), np.uint64),
            np.zeros(max_pages, np.uint8),
            np.zeros(max_pages, np.int32),
            np.zeros(max_pages, np.int32),
        )

    def __len__(self) -> int:
        return int(self._chunks.lru.used[0])

    @property
    def bytes_reserved(self) -> int:
        return lru_cpu.bytes_of((self._chunks, self._pages))

    @property
    def pages(self) -> int:
        """Pages known."""
        return int(self._pages.lru.used[0])

    def learn(self, keys: Names, blocks: Depths, names: Names) -> None:
        _learn(self._chunks, self._pages, keys, blocks, names)

    def predict(self, keys: Names) -> Names:
        return _predict(self._chunks, self._pages, keys)


def compile_ahead() -> None:
    """Compiles every kernel or loads it from numba's cache, so that no request has to wait for that."""
    table, one = TextTable(1, 1), np.ones(1, np.uint64)
    read_only = one.copy()
    read_only.flags.writeable = False
    for names in (one, read_only):
        table.learn(one, np.ones(1, np.int64), names)
    table.predict(one)


@compiled
def _learn(chunks: Chunks, pages: Pages, keys: Names, blocks: Depths, names: Names) -> None:
    rows = _keep(pages, names)
    count = min(len(keys), len(chunks.lru.keys))
    for number in range(count - 1, -1, -1):
        row = find(chunks.lru, keys[number])
        if row != no_row(chunks.lru):
            touch(chunks.lru, row)
    most = min(len(names), len(rows) * PAGE_BLOCKS)
    last_page, last_shared = no_row(pages.lru), 0
    for number in range(count - 1, -1, -1):
        row = find(chunks.lru, keys[number])
        depth = min(max(int(blocks[number]), 0), most)
        if row == no_row(chunks.lru):
            row = insert(chunks.lru, keys[number])
        else:
            touch(chunks.lru, row)
            page = no_row(pages.lru)
            if chunks.counts[row]:
                page = find(pages.lru, chunks.pages[row])
            if not chunks.counts[row]:
                depth = 0
            elif page != no_row(pages.lru):
                if page != last_page:
                    last_page, last_shared = page, _shared(pages, page, rows)
                tied = int(pages.numbers[page]) * PAGE_BLOCKS + int(chunks.counts[row])
                depth = min(tied, last_shared)
        if depth:
            chunks.pages[row] = pages.lru.keys[rows[(depth - 1) // PAGE_BLOCKS]]
            chunks.counts[row] = (depth - 1) % PAGE_BLOCKS + 1
        else:
            chunks.pages[row], chunks.counts[row] = NO_NAME, 0


@compiled
def _keep(pages: Pages, names: Names) -> Rows:
    """The rows of a chain's pages, those that are new included."""
    total = min(len(names), len(pages.lru.keys) * PAGE_BLOCKS)
    rows = np.empty((total + PAGE_BLOCKS - 1) // PAGE_BLOCKS, np.int32)
    kept = 0
    before = no_row(pages.lru)
    for number in range(len(rows)):
        first = number * PAGE_BLOCKS
        count = min(total - first, PAGE_BLOCKS)
        row = find(pages.lru, names[first + count - 1])
        if row == no_row(pages.lru):
            row = insert(pages.lru, names[first + count - 1])
            pages.counts[row], pages.before[row], pages.numbers[row] = count, before, number
            for i in range(count):
                pages.names[row, i] = names[first + i]
        elif pages.before[row] != before or _alike(pages, row, names, first, count) < max(
            count, int(pages.counts[row])
        ):
            break
        else:
            touch(pages.lru, row)
        rows[number] = before = row
        kept += 1
    for number in range(kept - 1, -1, -1):
        touch(pages.lru, int(rows[number]))
    return rows[:kept]


@compiled
def _alike(pages: Pages, row: int, names: Names, first: int, count: int) -> int:
    """How many names a page and a chain from `first` on begin with alike."""
    for i in range(min(count, int(pages.counts[row]))):
        if pages.names[row, i] != names[first + i]:
            return i
    return min(count, int(pages.counts[row]))


@compiled
def _shared(pages: Pages, page: int, rows: Rows) -> int:
    """How many blocks, up to the end of a page, are those of the chain whose pages are `rows`."""
    number = int(pages.numbers[page])
    while True:
        if number < len(rows):
            row = int(rows[number])
            if row == page:
                return number * PAGE_BLOCKS + int(pages.counts[page])
            if number == 0 or pages.before[page] == rows[number - 1]:
                alike = _alike(pages, page, pages.names[row], 0, int(pages.counts[row]))
                return number * PAGE_BLOCKS + alike
        elif number == 0:
            return 0
        page = int(pages.before[page])
        number -= 1


@compiled
def _predict(chunks: Chunks, pages: Pages, keys: Names) -> Names:
    rows = np.empty(len(keys), np.int32)
    known = 0
    for number in range(len(keys)):
        row = find(chunks.lru, keys[number])
        if row == no_row(chunks.lru):
            break
        rows[number] = row
        known += 1
    for number in range(known - 1, -1, -1):
        touch(chunks.lru, int(rows[number]))
    for number in range(known - 1, -1, -1):
        row = int(rows[number])
        count = int(chunks.counts[row])
        if count == 0:
            break
        page = find(pages.lru, chunks.pages[row])
        if page != no_row(pages.lru):
            return _chain_to(pages, page, count)
    return np.empty(0, np.uint64)


@compiled
def _chain_to(pages: Pages, page: int, count: int) -> Names:
    """The names up to the first `count` of a page, from the start. All its pages are the newest then."""
    number = int(pages.numbers[page])
    names = np.empty(number * PAGE_BLOCKS + count, np.uint64)
    while True:
        for i in range(count):
            names[number * PAGE_BLOCKS + i] = pages.names[page, i]
        touch(pages.lru, page)
        if number == 0:
            return names
        page = int(pages.before[page])
        number, count = number - 1, PAGE_BLOCKS
