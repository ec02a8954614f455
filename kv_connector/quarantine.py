"""Blocks that reads which outlived their order may still write: nobody else may have them. Engine thread."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class Pool(Protocol):
    """The block pool, as far as quarantine needs it."""

    def blocks_by_id(self, block_ids: Iterable[int]) -> list[Any]: ...
    def pin(self, blocks: Sequence[Any]) -> None: ...
    def unpin(self, blocks: Sequence[Any]) -> None: ...


class Quarantine:
    """Pins a block once for every read that may still write it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._held = 0

    def __len__(self) -> int:
        return self._held

    def hold(self, block_ids: Sequence[int]) -> None:
        """These blocks may still change; a block may be named more than once."""
        for block in self._pool.blocks_by_id(block_ids):
            self._pool.pin([block])
            self._held += 1

    def let_go(self, block_ids: Sequence[int]) -> None:
        """One read of each of these has ended."""
        for block in self._pool.blocks_by_id(block_ids):
            self._pool.unpin([block])
            self._held -= 1
