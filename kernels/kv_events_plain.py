"""Follows one engine's KV events, in plain Python: what `kv_events_cpu.Follower` must be equal to."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_llmd.errors import MalformedMessageError
from vllm_llmd.kernels.block_names import BlockNamer, Cleared, NetChange, Removed
from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.kv_events import Decoded, Reported, decode
from vllm_llmd.kernels.offloaded_blocks import NameOf, OffloadedBlocks
from vllm_llmd.names import BlockName, Tier

NO_SIZE = 0
NO_GROUP = -1


@dataclass(frozen=True)
class Change:
    """Net change of what an engine holds: clear if `cleared`, then remove, then store. `offloaded` is that of tiers."""

    cleared: bool
    removed: Names
    stored: Names
    offloaded: Mapping[Tier, NetChange] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.cleared or len(self.removed) or len(self.stored) or any(self.offloaded.values()))


@dataclass
class Tally:
    """What came and was of no use, in payloads (`malformed`), events or, for `unnamed`, blocks."""

    malformed: int = 0
    unknown: int = 0
    other_tier: int = 0
    other_group: int = 0
    other_size: int = 0
    unnamed: int = 0


def names_known(decoded: Decoded, cached_name: NameOf) -> Mapping[Hashable, BlockName]:
    """Names of blocks that a payload tells to be offloaded, before it: it may first tell that they left the GPU."""
    found = {block_hash: cached_name(block_hash) for block_hash in decoded.offloaded()}
    return {block_hash: name for block_hash, name in found.items() if name is not None}


class PlainFollower:
    """One stream of payloads, in order. The first event that could name blocks decides their group and size."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.block_size: int | None = None
        self._group: int | None = None
        self._namer = BlockNamer(0)
        self._offloaded = OffloadedBlocks(self._name_of)
        self._known: Mapping[Hashable, BlockName] = {}
        self._cleared = False

    @property
    def blocks(self) -> int:
        return len(self._namer)

    def forget(self) -> None:
        self.block_size = self._group = None
        self._namer = BlockNamer(0)
        self._offloaded.clear()
        self._cleared = True

    def follow(self, payloads: Sequence[bytes]) -> Change:
        change, elsewhere = NetChange(), dict[Tier, NetChange]()
        for payload in payloads:
            try:
                decoded = decode(payload)
            except MalformedMessageError:
                self.tally.malformed += 1
                continue
            self.tally.unknown += decoded.unknown
            self._known = names_known(decoded, self._namer.cached_name)
            for reported in decoded.events:
                if self._is_wanted(reported):
                    change = self._namer.apply([reported.event], change)
                elif (told := reported.elsewhere) is not None and reported.group == self._group:
                    self._offloaded.apply([told], elsewhere)
                if isinstance(reported.event, Cleared):
                    self._offloaded.clear()
                    elsewhere.clear()
        self.tally.unnamed += self._namer.unnamed + self._offloaded.unnamed
        self._namer.unnamed = self._offloaded.unnamed = 0
        cleared, self._cleared = self._cleared or change.cleared, False
        removed, stored = (np.array(sorted(some), np.uint64) for some in (change.removed, change.stored))
        return Change(cleared, removed, stored, elsewhere)

    def _name_of(self, block_hash: Hashable) -> BlockName | None:
        return self._known.get(block_hash) or self._namer.cached_name(block_hash)

    def _count_elsewhere(self, reported: Reported) -> None:
        if reported.tier is None:
            self.tally.other_tier += 1
        elif reported.group != self._group:
            self.tally.other_group += 1

    def _is_wanted(self, reported: Reported) -> bool:
        if isinstance(reported.event, Cleared):
            return True
        if reported.tier != "gpu":
            self._count_elsewhere(reported)
            return False
        if isinstance(reported.event, Removed):
            return reported.group == self._group
        if self._group is None and reported.keeps_all:
            self._group = reported.group
        if reported.group != self._group:
            self.tally.other_group += 1
            return False
        if self.block_size is None and reported.block_size:
            self.block_size = reported.block_size
            self._namer = BlockNamer(self.block_size)
        full = len(reported.event.token_ids) == len(reported.event.hashes) * (reported.block_size or 0)
        if reported.block_size != self.block_size or not full:
            self.tally.other_size += 1
            return False
        return True
