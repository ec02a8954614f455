"""Follows one life of one engine through its stream of block changes, and asks for a snapshot when it lost track.

Pure. The contract: whatever is dropped, doubled or reordered, once a snapshot and what follows it have come
through, the changes returned here make the index equal to what the engine holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from vllm_llmd.kernels.prefix_table import Contents
from vllm_llmd.names import TIERS, Tier
from vllm_llmd.wire import BlocksChanged, Heartbeat, Snapshot, check_packed

CHANGES_KEPT: Final = 10_000

VERIFY: Final = "verify"
"""Why a snapshot is asked for that heals nothing."""


class Outcome(NamedTuple):
    """What to do to the index, in this order, and why to ask for a snapshot (None: no need).

    `replace` are packed names by tier, `again` if this is not the first time in the engine's life. `compare` are packed
    names that the index should have.
    """

    compare: Mapping[Tier, bytes] | None = None
    replace: Mapping[Tier, bytes] | None = None
    again: bool = False
    changes: tuple[BlocksChanged, ...] = ()
    snapshot_wanted: str | None = None


@dataclass
class _Parts:
    """A snapshot on its way in."""

    seq: int
    parts: int
    received: dict[int, Snapshot] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return len(self.received) == self.parts

    @property
    def names(self) -> Mapping[Tier, bytes]:
        """All names by tier, packed."""
        every = [self.received[part] for part in range(self.parts)]
        return {tier: b"".join(part.names for part in every if part.tier == tier) for tier in TIERS}


class Cursor:
    """`exact` from a full snapshot on until something is missed; `seq` is the last change taken in."""

    def __init__(self, retry_ms: float) -> None:
        self._retry_ms = retry_ms
        self._asked_ms: float | None = None
        self._later: dict[int, BlocksChanged] = {}
        self._parts: _Parts | None = None
        self._told = False
        self._verifying = False
        self.seq = 0
        self.exact = False

    def verify(self) -> Outcome:
        """Asks for a snapshot to compare the index with. If it has to be healed meanwhile, nothing comes of it."""
        if not self.exact:
            return Outcome()
        self._verifying = True
        self._parts = None
        return Outcome(snapshot_wanted=VERIFY)

    def lose(self, reason: str, now_ms: float) -> Outcome:
        """Stops believing the index and asks for a snapshot."""
        self.exact = self._verifying = False
        self._parts = None
        self._asked_ms = now_ms
        return Outcome(snapshot_wanted=reason)

    def on_changed(self, changed: BlocksChanged, now_ms: float) -> Outcome:
        if not self.exact:
            self._keep(changed)
            return self.tick(now_ms)
        if changed.seq <= self.seq:
            return Outcome()
        if changed.seq == self.seq + 1:
            self.seq = changed.seq
            return Outcome(changes=(changed,))
        self._keep(changed)
        return self.lose("gap", now_ms)

    def on_heartbeat(self, heartbeat: Heartbeat, held: Mapping[Tier, Contents] | None, now_ms: float) -> Outcome:
        """`held` is what the index has for the engine in every tier; None if it has no room for all."""
        if not self.exact:
            return self.tick(now_ms)
        if heartbeat.seq > self.seq:
            return self.lose("lost tail", now_ms)
        if heartbeat.seq == self.seq and held is not None and held != _contents(heartbeat):
            return self.lose("drift", now_ms)
        return Outcome()

    def on_snapshot(self, snapshot: Snapshot, now_ms: float) -> Outcome:
        """Raises MalformedMessageError if the names are not whole."""
        check_packed(snapshot.names)
        if (self.exact and not self._verifying) or snapshot.seq < self.seq or not 0 <= snapshot.part < snapshot.parts:
            return Outcome()
        if self._parts is None or self._parts.seq < snapshot.seq or self._parts.parts != snapshot.parts:
            self._parts = _Parts(snapshot.seq, snapshot.parts)
        elif self._parts.seq > snapshot.seq:
            return Outcome()
        self._parts.received[snapshot.part] = snapshot
        if not self._parts.whole:
            return Outcome()
        return self._complete(self._parts, now_ms)

    def tick(self, now_ms: float) -> Outcome:
        """Asks again if the snapshot asked for does not come."""
        if self.exact or (self._asked_ms is not None and now_ms - self._asked_ms < self._retry_ms):
            return Outcome()
        return self.lose("no snapshot yet", now_ms)

    def _complete(self, parts: _Parts, now_ms: float) -> Outcome:
        names = parts.names
        self._verifying = False
        if self.exact and parts.seq == self.seq:
            self._parts = None
            return Outcome(compare=names)
        self.seq = parts.seq
        again, self._told = self._told, True
        changes = []
        while (following := self._later.get(self.seq + 1)) is not None:
            changes.append(following)
            self.seq += 1
        self._later = {seq: changed for seq, changed in self._later.items() if seq > self.seq}
        if self._later:
            self.lose("gap after snapshot", now_ms)
            return Outcome(None, names, again, tuple(changes), "gap after snapshot")
        self.exact = True
        self._parts = None
        return Outcome(None, names, again, tuple(changes))

    def _keep(self, changed: BlocksChanged) -> None:
        if changed.seq > self.seq:
            self._later[changed.seq] = changed
        while len(self._later) > CHANGES_KEPT:
            del self._later[min(self._later)]


def _contents(heartbeat: Heartbeat) -> Mapping[Tier, Contents]:
    """What the engine says it holds, in every tier."""
    offloaded = {held.tier: Contents(held.blocks, held.digest) for held in heartbeat.offloaded}
    nowhere = dict.fromkeys(TIERS, Contents(0, 0))
    return {**nowhere, **offloaded, "gpu": Contents(heartbeat.blocks, heartbeat.digest)}
