"""The staging area: where blocks land that must be reordered before they can be put in place.

Slots of registered memory, and the copy from a slot into the cache. Decides nothing about orders or slots.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels.block_copy import Grid

SLOTS = 4
SLOT_BYTES = 8 << 20
ALIGNMENT = 64


@dataclass(frozen=True)
class Placement:
    """Pieces that stand in a slot at `offsets`; `grid` copies each to our address in `addresses`."""

    offsets: npt.NDArray[np.int64]
    addresses: npt.NDArray[np.uint64]
    grid: Grid


class Staging(Protocol):
    """`SLOTS` slots of `SLOT_BYTES` each, one after another from `address` on."""

    @property
    def address(self) -> int: ...

    def place(self, slot: int, placements: Sequence[Placement]) -> Callable[[], bool]:
        """Begin to copy from a slot into the cache; the answer tells whether that is done."""
        ...


class HostStaging:
    """Of host memory; a copy is done when `place` returns, and does not hold the GIL."""

    def __init__(self) -> None:
        self._memory = np.zeros(SLOTS * SLOT_BYTES + ALIGNMENT, dtype=np.uint8)
        self._skip = -int(self._memory.ctypes.data) % ALIGNMENT

    @property
    def address(self) -> int:
        return int(self._memory.ctypes.data) + self._skip

    def place(self, slot: int, placements: Sequence[Placement]) -> Callable[[], bool]:
        from vllm_llmd.kernels.block_copy_cpu import copy_at

        begin = self.address + slot * SLOT_BYTES
        for placement in placements:
            copy_at(begin + placement.offsets, placement.addresses.astype(np.int64), placement.grid)
        return lambda: True


def prepare_host_staging() -> None:
    """Compile what copies from a slot, which takes seconds the first time on a machine."""
    from vllm_llmd.kernels.block_copy_cpu import compile_ahead

    compile_ahead()
