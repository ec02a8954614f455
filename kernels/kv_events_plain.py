"""Follows one engine's KV events, in plain Python: what `kv_events_cpu.Follower` must be equal to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_llmd.errors import MalformedMessageError
from vllm_llmd.kernels.block_names import BlockNamer, Cleared, Removed, Stored
from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.kv_events import Reported, decode

NO_SIZE = 0
NO_GROUP = -1


@dataclass(frozen=True)
class Change:
    """Net change of what an engine holds: clear if `cleared`, then remove, then store."""

    cleared: bool
    removed: Names
    stored: Names


@dataclass
class Tally:
    """What came and was of no use, in payloads (`malformed`), events or, for `unnamed`, blocks."""

    malformed: int = 0
    unknown: int = 0
    other_tier: int = 0
    other_group: int = 0
    other_size: int = 0
    unnamed: int = 0


class PlainFollower:
    """One stream of payloads, in order. The first event that could name blocks decides their group and size."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.block_size: int | None = None
        self._group: int | None = None
        self._namer = BlockNamer(0)
        self._cleared = False

    @property
    def blocks(self) -> int:
        return len(self._namer)

    def forget(self) -> None:
        self.block_size = self._group = None
        self._namer = BlockNamer(0)
        self._cleared = True

    def follow(self, payloads: Sequence[bytes]) -> Change:
        events = [event for payload in payloads for event in self._wanted(payload)]
        change = self._namer.apply(events)
        self.tally.unnamed += self._namer.unnamed
        self._namer.unnamed = 0
        cleared, self._cleared = self._cleared or change.cleared, False
        names = (np.array(sorted(some), np.uint64) for some in (change.removed, change.stored))
        return Change(cleared, *names)

    def _wanted(self, payload: bytes) -> list[Stored | Removed | Cleared]:
        try:
            decoded = decode(payload)
        except MalformedMessageError:
            self.tally.malformed += 1
            return []
        self.tally.unknown += decoded.unknown
        return [reported.event for reported in decoded.events if self._is_wanted(reported)]

    def _is_wanted(self, reported: Reported) -> bool:
        if isinstance(reported.event, Cleared):
            return True
        if reported.tier != "gpu":
            self.tally.other_tier += 1
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
