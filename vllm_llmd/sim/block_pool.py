"""The blocks of one engine's KV cache: reference counts, prefix caching by name, eviction of the least recently used.

Pure, and as vLLM does it: two blocks may hold the same content; a block that is let go keeps its name until it is
taken for something else; blocks without a name are taken first, then those that were let go longest ago, the last
blocks of a request before its first ones.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NewType

from vllm_llmd.names import BlockName
from vllm_llmd.sim.cache_change import ChangeLog

BlockId = NewType("BlockId", int)


class BlockPool:
    """`size` blocks, all of them usable (vLLM keeps one back)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._refs = [0] * size
        self._names: list[BlockName | None] = [None] * size
        self._free: OrderedDict[BlockId, None] = OrderedDict.fromkeys(map(BlockId, range(size)))
        self._holder: dict[BlockName, BlockId] = {}
        self._twins: dict[BlockName, list[BlockId]] = {}
        self.changes = ChangeLog()

    @property
    def free(self) -> int:
        """Blocks that nobody holds. Their content may be cached still."""
        return len(self._free)

    @property
    def names(self) -> Iterable[BlockName]:
        """Everything that the prefix cache holds."""
        return self._holder.keys()

    def cached(self, names: Sequence[BlockName], most: int) -> list[BlockId]:
        """The blocks of the longest cached prefix of `names`, `most` at the most."""
        found: list[BlockId] = []
        holder = self._holder
        for at in range(min(most, len(names))):
            block = holder.get(names[at])
            if block is None:
                break
            found.append(block)
        return found

    def unheld(self, blocks: Sequence[BlockId]) -> int:
        """How many of them count as free."""
        refs = self._refs
        return sum(1 for block in blocks if not refs[block])

    def hold(self, blocks: Iterable[BlockId]) -> None:
        """One more holds each of these blocks."""
        refs, free = self._refs, self._free
        for block in blocks:
            if not refs[block]:
                del free[block]
            refs[block] += 1

    def take(self, count: int) -> list[BlockId]:
        """So many free blocks, held once, for new content; what was cached in them is gone."""
        assert count <= len(self._free), "take no more than are free"
        free, names, refs = self._free, self._names, self._refs
        taken = []
        for _ in range(count):
            block, _ = free.popitem(last=False)
            if names[block] is not None:
                self._evict(block)
            refs[block] = 1
            taken.append(block)
        return taken

    def name(self, block: BlockId, name: BlockName) -> None:
        """A held block is full, and others may use it by its name from now on."""
        if self._names[block] is not None:
            return
        self._names[block] = name
        if name in self._holder:
            self._twins.setdefault(name, []).append(block)
            return
        self._holder[name] = block
        self.changes.stored(name)

    def release(self, blocks: Sequence[BlockId]) -> None:
        """One fewer holds each of these blocks of a request, in the order of its tokens."""
        unnamed = []
        for block in reversed(blocks):
            refs = self._refs[block] = self._refs[block] - 1
            assert refs >= 0, "let go of more often than held"
            if not refs:
                self._free[block] = None
                if self._names[block] is None:
                    unnamed.append(block)
        for block in reversed(unnamed):
            self._free.move_to_end(block, last=False)

    def clear(self) -> None:
        """Forgets every name: nothing is cached any more. Who holds blocks keeps them."""
        self._names = [None] * self.size
        self._holder.clear()
        self._twins.clear()
        self.changes.cleared()

    def _evict(self, block: BlockId) -> None:
        name = self._names[block]
        assert name is not None
        self._names[block] = None
        twins = self._twins.get(name)
        if twins is not None:
            if self._holder[name] == block:
                self._holder[name] = twins.pop(0)
            else:
                twins.remove(block)
            if not twins:
                del self._twins[name]
            return
        del self._holder[name]
        self.changes.removed(name)
