"""What became of blocks that caches evicted: were they asked for again? So much is a block worth that will be evicted.

Names of evicted blocks are kept for about as long as the caches take to be filled anew; of large fleets, those of a
sample. Pure; not to be called from two threads at once.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.memory_cpu import compiled_with
from vllm_llmd.kernels.prefix_table import BANK_ENGINES

compiled = compiled_with(__file__)

SLOTS: Final = 1 << 16
"""Names that are kept at most, in half a megabyte. Of two with the same slot the later one stays, so old ones fade."""

NO_NAME: Final = np.uint64(0)
SLOT_SHIFT: Final = np.uint64(24)
"""The bits of a name that say where it is kept are others than those that say whether it is."""


class Evictions:
    """Of all engines together. What counts fades: by half each time that as much is evicted as the caches hold."""

    def __init__(self) -> None:
        self._blocks = 0
        self._slots: Names = np.zeros(1, np.uint64)
        self._sample = np.uint64(0)
        self._evicted = self._wanted = 0.0

    def sized(self, blocks: int) -> None:
        """The caches hold so many blocks together. Once more have been, it is as many as then."""
        if blocks <= self._blocks:
            return
        self._blocks = blocks
        sampled = max((blocks - 1).bit_length() - SLOTS.bit_length() + 1, 0)
        self._sample = np.uint64((1 << sampled) - 1)
        slots = 1 << ((blocks >> sampled) - 1).bit_length()
        if slots != len(self._slots):
            self._slots = np.zeros(slots, np.uint64)

    def evicted(self, names: Names) -> None:
        """These blocks are in a cache no more."""
        count = _keep(self._slots, self._sample, names)
        if count and self._blocks:
            kept = 0.5 ** (count / self._turnover)
            self._evicted = kept * self._evicted + count
            self._wanted *= kept

    def asked(self, names: Names, depths: npt.NDArray[np.int32]) -> None:
        """A prompt's blocks are asked for, of which engines have the first so many: what nobody has is wanted again."""
        self._wanted += _take(self._slots, self._sample, names, depths)

    def wanted_again(self, hit_share: float) -> float:
        """The share of evicted blocks that is asked for again while no engine has it.

        Until as many have been evicted as caches hold, less than that is known; `hit_share`, of blocks that are asked
        for, counts as much as that. It is too high by itself: a few blocks may be hit all the time.
        """
        if not self._blocks:
            return hit_share
        return min((self._turnover * hit_share + self._wanted) / (self._turnover + self._evicted), 1.0)

    @property
    def _turnover(self) -> float:
        """As many of those whose names are kept as the caches hold."""
        return self._blocks / float(self._sample + np.uint64(1))


@compiled
def _keep(slots: Names, sample: np.uint64, names: Names) -> int:
    count, last = 0, np.uint64(len(slots) - 1)
    for name in names:
        if name & sample == NO_NAME:
            slots[(name >> SLOT_SHIFT) & last] = name
            count += 1
    return count


@compiled
def _take(slots: Names, sample: np.uint64, names: Names, depths: npt.NDArray[np.int32]) -> int:
    """How many of the names after the deepest depth are kept; they are no more."""
    deepest = int(depths.max()) if depths.size else 0
    count, last = 0, np.uint64(len(slots) - 1)
    for i in range(deepest, len(names)):
        at = (names[i] >> SLOT_SHIFT) & last
        if names[i] != NO_NAME and slots[at] == names[i]:
            slots[at] = NO_NAME
            count += 1
    return count


def compile_ahead() -> None:
    """Compiles the kernels or loads them from numba's cache, so that no message has to wait for that."""
    names = np.ones(1, np.uint64)
    names.flags.writeable = False
    for some in (names, names.copy()):
        evictions = Evictions()
        evictions.evicted(some)
        evictions.asked(some, np.zeros((1, BANK_ENGINES), np.int32))
