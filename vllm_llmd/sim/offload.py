"""A second, slower tier of blocks: what the prefix cache stores is copied here, and outlives its eviction there.

Pure. Keeps names alone, the least recently used of which gives way.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from vllm_llmd.names import BlockName
from vllm_llmd.sim.cache_change import ChangeLog


class OffloadTier:
    """Room for `size` blocks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: OrderedDict[BlockName, None] = OrderedDict()
        self.changes = ChangeLog()

    @property
    def names(self) -> Iterable[BlockName]:
        return self._held.keys()

    def store(self, names: Iterable[BlockName]) -> None:
        """Copies of these blocks come in, unless they are here: then they count as just used."""
        for name in names:
            if name in self._held:
                self._held.move_to_end(name)
                continue
            if len(self._held) >= self.size:
                self._evict()
            self._held[name] = None
            self.changes.stored(name)

    def held_from(self, names: Sequence[BlockName], first: int, end: int) -> int:
        """How many successive blocks from number `first` on, up to `end`, are held; they count as just used."""
        at = first
        end = min(end, len(names))
        while at < end and names[at] in self._held:
            self._held.move_to_end(names[at])
            at += 1
        return at - first

    def clear(self) -> None:
        self._held.clear()
        self.changes.cleared()

    def _evict(self) -> None:
        name, _ = self._held.popitem(last=False)
        self.changes.removed(name)
