"""Where texts lead in chains of blocks: the contract of the text table, and its plain twin.

A text is a row of chunk keys, each of which stands for the whole text up to its end. A chunk is tied to a block: the
last one of the text up to there. Chains are kept in pages of `PAGE_BLOCKS` names that start at multiples of it; a page
is known by its last name, which is chained and so stands for all before it, and leads to the page before it. Both are
bounded, and what was used longest ago goes first: of a text its end, of a chain its last page, since every use runs
from the end to the start. So no page outlives the page before it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels.hash_chain import Names

PAGE_BLOCKS = 16

V = TypeVar("V")


class TextTableLike(Protocol):
    """Example: after `learn(keys, [1, 3], names)`, `predict(keys[:1])` is `names[:1]`."""

    def learn(self, keys: Names, blocks: npt.NDArray[np.int64], names: Names) -> None:
        """Ties each chunk to the first `blocks` of the chain `names`, both shape (n,).

        A chunk that is tied to a block of another chain is tied to the last block that both share; to none for ever
        if they share none. What is beyond the room for one text, or of a chain whose names contradict what is known,
        is left out.
        """
        ...

    def predict(self, keys: Names) -> Names:
        """The chain up to the block that the last chunk is tied to, of those known without a hole from the first."""
        ...

    def __len__(self) -> int:
        """Chunks known."""
        ...


class PlainLru(Generic[V]):
    """`lru_cpu`, plain, with a value per key in place of a row."""

    def __init__(self, max_keys: int) -> None:
        self._max_keys = max_keys
        self._values: OrderedDict[int, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def find(self, key: int) -> V | None:
        return self._values.get(key)

    def put(self, key: int, value: V) -> None:
        """As the newest. Where there is no room for it, the oldest goes."""
        if key not in self._values and len(self._values) == self._max_keys:
            self._values.popitem(last=False)
        self._values[key] = value
        self._values.move_to_end(key)

    def touch(self, key: int) -> None:
        self._values.move_to_end(key)


@dataclass(frozen=True)
class _Page:
    names: tuple[int, ...]
    before: "_Page | None"

    @property
    def whole(self) -> tuple[int, ...]:
        """The chain up to its end."""
        return (self.before.whole if self.before else ()) + self.names


@dataclass(frozen=True)
class _Tie:
    """To the first `blocks` names of a page, known by its last; 0 blocks of no page if to none."""

    page: int
    blocks: int


class PlainTextTable:
    """Dictionaries of pages and chunks."""

    def __init__(self, max_chunks: int, max_pages: int) -> None:
        self._max_chunks, self._max_pages = max_chunks, max_pages
        self._chunks: PlainLru[_Tie] = PlainLru(max_chunks)
        self._pages: PlainLru[_Page] = PlainLru(max_pages)

    def __len__(self) -> int:
        return len(self._chunks)

    def learn(self, keys: Names, blocks: npt.NDArray[np.int64], names: Names) -> None:
        wanted = [int(key) for key in keys[: self._max_chunks]]
        pages = self._keep([int(name) for name in names])
        chain = pages[-1].whole if pages else ()
        for key in reversed(wanted):
            if self._chunks.find(key) is not None:
                self._chunks.touch(key)
        for number, key in reversed(list(enumerate(wanted))):
            depth = self._shared(self._chunks.find(key), chain)
            if depth is None:
                depth = min(int(blocks[number]), len(chain))
            page = pages[(depth - 1) // PAGE_BLOCKS] if depth else None
            tie = _Tie(page.names[-1], (depth - 1) % PAGE_BLOCKS + 1) if page else _Tie(0, 0)
            self._chunks.put(key, tie)

    def predict(self, keys: Names) -> Names:
        known = list(takewhile(lambda key: self._chunks.find(key) is not None, map(int, keys)))
        for key in reversed(known):
            self._chunks.touch(key)
        for key in reversed(known):
            tie = self._chunks.find(key)
            assert tie is not None
            page = self._pages.find(tie.page) if tie.blocks else None
            if page is not None:
                self._touch(page)
                before = page.before.whole if page.before else ()
                return np.array(before + page.names[: tie.blocks], np.uint64)
            if not tie.blocks:
                break
        return np.empty(0, np.uint64)

    def _keep(self, names: Sequence[int]) -> list[_Page]:
        pages: list[_Page] = []
        for start in range(0, min(len(names), self._max_pages * PAGE_BLOCKS), PAGE_BLOCKS):
            page = _Page(tuple(names[start : start + PAGE_BLOCKS]), pages[-1] if pages else None)
            known = self._pages.find(page.names[-1])
            if known is None:
                self._pages.put(page.names[-1], page)
            elif known != page:
                break
            else:
                self._pages.touch(page.names[-1])
            pages.append(page)
        if pages:
            self._touch(pages[-1])
        return pages

    def _touch(self, last: _Page) -> None:
        page: _Page | None = last
        while page is not None:
            self._pages.touch(page.names[-1])
            page = page.before

    def _shared(self, tie: _Tie | None, chain: Sequence[int]) -> int | None:
        """How many blocks the chain has in common with what the chunk is tied to; None if that is not known."""
        if tie is None:
            return None
        if not tie.blocks:
            return 0
        page = self._pages.find(tie.page)
        if page is None:
            return None
        tied = (page.before.whole if page.before else ()) + page.names[: tie.blocks]
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tied, chain, strict=False)))
