"""What an engine's prefix cache holds, tier by tier, as routers are told of it. Pure; belongs to the link thread."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import xor
from typing import Final

from vllm_llmd import wire
from vllm_llmd.names import TIERS, BlockName, Tier
from vllm_llmd.wire import EngineInfo, Load

NAMES_PER_PART: Final = 65_536
"""Of a snapshot."""


@dataclass(frozen=True)
class Change:
    """Net change of a tier: clear, then remove, then store."""

    cleared: bool
    removed: Sequence[BlockName]
    stored: Sequence[BlockName]
    tier: Tier = "gpu"


@dataclass
class TierMirror:
    """What one tier holds. `digest` is the exclusive or of the names held: a router that has it too holds the same."""

    held: set[BlockName] = field(default_factory=set)
    digest: int = 0

    def change(self, change: Change) -> None:
        if change.cleared:
            self.held.clear()
            self.digest = 0
        removed = self.held.intersection(change.removed)
        self.held -= removed
        stored = set(change.stored) - self.held
        self.held |= stored
        self.digest = reduce(xor, (*removed, *stored), self.digest)

    def parts(self) -> list[bytes]:
        """The names held, packed, in as many parts as they take."""
        names = list(self.held)
        return [wire.pack_names(names[at : at + NAMES_PER_PART]) for at in range(0, len(names), NAMES_PER_PART)]


@dataclass
class Mirror:
    """What the engine's prefix cache holds, as told so far, and the number of the last change."""

    info: EngineInfo
    seq: int = 0
    tiers: dict[Tier, TierMirror] = field(default_factory=lambda: {tier: TierMirror() for tier in TIERS})

    def change(self, change: Change) -> wire.BlocksChanged:
        """Applies a net change and returns the message that tells of it."""
        self.tiers[change.tier].change(change)
        self.seq += 1
        packed = wire.pack_names(change.removed), wire.pack_names(change.stored)
        return wire.BlocksChanged(self.info.id, self.info.epoch, self.seq, change.cleared, *packed, change.tier)

    def snapshot(self) -> list[wire.Snapshot]:
        """Everything held as of `seq`, in at least one part."""
        parts = [(tier, names) for tier, mirror in self.tiers.items() for names in mirror.parts()]
        parts = parts or [("gpu", b"")]
        return [
            wire.Snapshot(
                engine=self.info.id,
                epoch=self.info.epoch,
                seq=self.seq,
                part=part,
                parts=len(parts),
                names=names,
                tier=tier,
            )
            for part, (tier, names) in enumerate(parts)
        ]

    def heartbeat(self, load: Load, draining: bool = False) -> wire.Heartbeat:
        """What is held as of `seq`, without names."""
        gpu, *offloaded = [wire.Held(tier, len(mirror.held), mirror.digest) for tier, mirror in self.tiers.items()]
        used = [held for held in offloaded if held.blocks]
        sums = self.seq, gpu.blocks, gpu.digest
        return wire.Heartbeat(self.info.id, self.info.epoch, *sums, load, used, draining)
