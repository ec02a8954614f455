"""Which blocks another connector of the engine has offloaded, by our names and tier. Pure.

Such a connector tells of blocks by vLLM's hashes alone. They have come from the GPU, so that their names are known.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from vllm_llmd.kernels.block_names import NetChange
from vllm_llmd.names import BlockName, Tier


@dataclass(frozen=True)
class Offloaded:
    """These are in the tier too, once more if they were."""

    tier: Tier
    hashes: tuple[Hashable, ...]


@dataclass(frozen=True)
class Dropped:
    """One copy of each of these is gone from the tier."""

    tier: Tier
    hashes: tuple[Hashable, ...]


@dataclass
class _Entry:
    name: BlockName
    copies: int = 0


NameOf = Callable[[Hashable], BlockName | None]
"""The name of a block by vLLM's hash, if it is known."""


class OffloadedBlocks:
    """Follows every tier below the GPU. `name_of` is asked for the name of a block.

    Several chunks of a tier may tell of one block: a name is removed with its last.
    """

    def __init__(self, name_of: NameOf) -> None:
        self._name_of = name_of
        self._held: dict[Tier, dict[Hashable, _Entry]] = {}
        self.unnamed = 0
        """Blocks whose name is unknown, which routers are not told of."""

    def apply(
        self, events: Iterable[Offloaded | Dropped], before: dict[Tier, NetChange] | None = None
    ) -> dict[Tier, NetChange]:
        """The net change of every tier that `events` concern, in order, after the changes `before` if there are any."""
        changes: dict[Tier, NetChange] = {} if before is None else before
        for event in events:
            change = changes.setdefault(event.tier, NetChange())
            held = self._held.setdefault(event.tier, {})
            if isinstance(event, Offloaded):
                self._store(event.hashes, held, change)
            else:
                _drop(event.hashes, held, change)
        return changes

    def clear(self) -> dict[Tier, NetChange]:
        """Nothing is offloaded any more."""
        tiers, self._held = self._held, {}
        return {tier: NetChange(cleared=True) for tier, held in tiers.items() if held}

    def _store(self, hashes: Iterable[Hashable], held: dict[Hashable, _Entry], change: NetChange) -> None:
        for block_hash in hashes:
            entry = held.get(block_hash)
            if entry is None:
                name = self._name_of(block_hash)
                if name is None:
                    self.unnamed += 1
                    continue
                entry = held[block_hash] = _Entry(name)
                change.store(name)
            entry.copies += 1


def _drop(hashes: Iterable[Hashable], held: dict[Hashable, _Entry], change: NetChange) -> None:
    for block_hash in hashes:
        entry = held.get(block_hash)
        if entry is None:
            continue
        entry.copies -= 1
        if not entry.copies:
            change.remove(held.pop(block_hash).name)
