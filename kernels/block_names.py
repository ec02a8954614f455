"""From an engine's block events to our block names, and to the net change of its prefix cache. Pure.

vLLM's own hash is only a key here: it is not reproducible across processes in every case. `block_names_cpu` is the
same, compiled.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_llmd.kernels.hash_chain import ROOT, Names, digest, salt_of, token_bytes
from vllm_llmd.kernels.hash_chain_cpu import UNSALTED, chain_names
from vllm_llmd.names import BlockName

FORMER_KEPT = 10_000
"""Names of blocks that left the GPU, for who tells of them later: that they are offloaded, say."""


@dataclass(frozen=True)
class Stored:
    """One or more blocks are cached, `parent` being the one before the first."""

    hashes: tuple[Hashable, ...]
    parent: Hashable | None
    token_ids: Sequence[int]
    salts: Sequence[Sequence[object] | None] | None


@dataclass(frozen=True)
class Removed:
    """One cached copy of each of these is gone."""

    hashes: tuple[Hashable, ...]


@dataclass(frozen=True)
class Cleared:
    """Nothing is cached any more."""


BlockEvent = Stored | Removed | Cleared


@dataclass
class NetChange:
    """Clear if `cleared`, then remove, then store. `removed` and `stored` have nothing in common."""

    cleared: bool = False
    removed: set[BlockName] = field(default_factory=set)
    stored: set[BlockName] = field(default_factory=set)

    def __bool__(self) -> bool:
        return self.cleared or bool(self.removed) or bool(self.stored)

    def store(self, name: BlockName) -> None:
        """A block that was not there is."""
        if name in self.removed:
            self.removed.discard(name)
        else:
            self.stored.add(name)

    def remove(self, name: BlockName) -> None:
        """A block that was there is not."""
        if name in self.stored:
            self.stored.discard(name)
        else:
            self.removed.add(name)


class BlockNamer:
    """Follows one engine's block pool.

    The pool may cache the same content in several blocks, and tells of each copy: a name is removed with its last.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._names: dict[Hashable, BlockName] = {}
        self._copies: dict[Hashable, int] = {}
        self._former: OrderedDict[Hashable, BlockName] = OrderedDict()
        self.unnamed = 0
        """Blocks whose parent is unknown, so that they could not be named."""

    def __len__(self) -> int:
        """How many different blocks are cached and have a name."""
        return len(self._names)

    def name_of(self, block_hash: Hashable) -> BlockName | None:
        """The name of a cached block, by vLLM's hash; also of one that is gone since lately."""
        return self._names.get(block_hash) or self._former.get(block_hash)

    def cached_name(self, block_hash: Hashable) -> BlockName | None:
        """The same of a block that is cached now."""
        return self._names.get(block_hash)

    def apply(self, events: Iterable[BlockEvent], before: NetChange | None = None) -> NetChange:
        """The net change of `events`, in order, after the change `before` if there is one."""
        change = NetChange() if before is None else before
        for event in events:
            match event:
                case Stored():
                    self._store(event, change)
                case Removed():
                    self._remove(event, change)
                case Cleared():
                    for block_hash, name in self._names.items():
                        self._remember(block_hash, name)
                    self._names.clear()
                    self._copies.clear()
                    change = NetChange(cleared=True)
        return change

    def _store(self, event: Stored, change: NetChange) -> None:
        size = self._block_size
        if len(event.token_ids) != size * len(event.hashes):
            return  # a partial block: reachable inside vLLM, but not by name
        parent, first = self._parent_of(event)
        if parent is None:
            return
        tokens = np.frombuffer(token_bytes(event.token_ids[first * size :]), np.uint32)
        names = chain_names(tokens, size, parent, digests_of(event.salts, first)).tolist()
        for block_hash, name in zip(event.hashes[first:], names, strict=True):
            if block_hash not in self._names:
                self._names[block_hash] = name
                change.store(name)
            self._copies[block_hash] = self._copies.get(block_hash, 0) + 1

    def _remember(self, block_hash: Hashable, name: BlockName) -> None:
        self._former[block_hash] = name
        if len(self._former) > FORMER_KEPT:
            self._former.popitem(last=False)

    def _parent_of(self, event: Stored) -> tuple[BlockName | None, int]:
        """The parent's name, and the first block after it: further on in the event if the real parent is unknown."""
        if event.parent is None:
            return ROOT, 0
        parent = self._names.get(event.parent)
        first = 0
        while parent is None and first < len(event.hashes):
            block_hash = event.hashes[first]
            parent = self._names.get(block_hash)
            if parent is None:
                self.unnamed += 1
            else:
                self._copies[block_hash] += 1
            first += 1
        return parent, first

    def _remove(self, event: Removed, change: NetChange) -> None:
        for block_hash in event.hashes:
            copies = self._copies.get(block_hash, 0)
            if copies > 1:
                self._copies[block_hash] = copies - 1
            elif copies == 1:
                del self._copies[block_hash]
                name = self._names.pop(block_hash)
                self._remember(block_hash, name)
                change.remove(name)


def digests_of(salts: Sequence[Sequence[object] | None] | None, first: int) -> Names:
    """What the salts of the blocks from `first` on contribute to their names."""
    if not salts or not any(salts[first:]):
        return UNSALTED
    return np.array([digest(salt_of(keys)) for keys in salts[first:]], np.uint64)
