"""One strided copy, repeated at many places: what moves scattered pieces of KV blocks. Values, checks, plain reference.

Gather, scatter, head slices, other block sizes and transposed keys are all this copy; layers are more offsets.
`block_copy_cpu` and `block_copy_triton` do the same, fast. Knows nothing of engines, models or dtypes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from vllm_llmd.errors import ConfigError

Bytes = npt.NDArray[np.uint8]
"""Flat memory, shape (bytes,)."""

Offsets = npt.NDArray[np.int64]
"""Where each copy begins, in bytes from the beginning of its memory, shape (n,)."""

Side = Literal["source", "destination"]

ITEM_BYTES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Strides:
    """Bytes from one head, token or channel to the next."""

    head: int
    token: int
    channel: int


@dataclass(frozen=True)
class Grid:
    """What is copied at each place: heads x tokens x channels items of `item_bytes`.

    Raises ConfigError for a count below 1 and an item size other than 1, 2, 4, 8 or 16.
    """

    heads: int
    tokens: int
    channels: int
    item_bytes: int
    source: Strides
    destination: Strides

    def __post_init__(self) -> None:
        if min(self.heads, self.tokens, self.channels) < 1:
            raise ConfigError(f"a grid has at least one head, token and channel; got {self}")
        if self.item_bytes not in ITEM_BYTES:
            raise ConfigError(f"item_bytes must be one of {ITEM_BYTES}; got {self.item_bytes}")

    @property
    def bytes(self) -> int:
        """What one copy moves."""
        return self.heads * self.tokens * self.channels * self.item_bytes

    @cached_property
    def reach(self) -> tuple["Reach", "Reach"]:
        """Of the source and of the destination."""
        return Reach.of(self, self.source, self.item_bytes), Reach.of(self, self.destination, self.item_bytes)


@dataclass(frozen=True)
class Reach:
    """What one copy touches on one side: from `low` to before `end`, in bytes from where it begins."""

    low: int
    end: int

    @classmethod
    def of(cls, grid: Grid, strides: Strides, item_bytes: int) -> "Reach":
        steps = (strides.head, strides.token, strides.channel)
        last = [(count - 1) * step for count, step in zip((grid.heads, grid.tokens, grid.channels), steps, strict=True)]
        return cls(sum(min(0, each) for each in last), sum(max(0, each) for each in last) + item_bytes)

    def check(self, side: Side, lowest: int, highest: int, memory_bytes: int) -> None:
        """Raises ConfigError if copies that begin at `lowest` to `highest` leave a memory of `memory_bytes`."""
        if lowest + self.low < 0 or highest + self.end > memory_bytes:
            raise ConfigError(
                f"{side} offsets {lowest} to {highest} are out of bounds: a copy touches bytes {self.low} to "
                f"{self.end} from its offset, and the memory has {memory_bytes}"
            )


def copy_blocks(
    source: Bytes, source_offsets: Offsets, destination: Bytes, destination_offsets: Offsets, grid: Grid
) -> None:
    """Copies item (h, t, c) of copy i, for all of them.

    It is read at `source_offsets[i] + h * head + t * token + c * channel`, with the source's strides, and written to
    the like at the destination. No two items may be written to the same byte, and none to a byte that is read.
    Raises ConfigError for what does not fit together or leaves its memory; nothing is copied then.
    """
    check_copy(source, source_offsets, destination, destination_offsets, grid.reach)
    shape = (grid.heads, grid.tokens, grid.channels, grid.item_bytes)
    for begin, end in zip(source_offsets, destination_offsets, strict=True):
        items_at(destination, end, grid.destination, shape)[:] = items_at(source, begin, grid.source, shape)


def items_at(memory: Bytes, offset: int, strides: Strides, shape: tuple[int, int, int, int]) -> Bytes:
    """The items of one copy, as a view of shape (heads, tokens, channels, item bytes)."""
    return np.ndarray(shape, np.uint8, memory, offset, (strides.head, strides.token, strides.channel, 1))


def check_copy(
    source: Bytes, source_offsets: Offsets, destination: Bytes, destination_offsets: Offsets, reach: tuple[Reach, Reach]
) -> None:
    """Raises ConfigError as `copy_blocks` says; `reach` is that of the source and that of the destination."""
    check_side("source", source, source_offsets, reach[0])
    check_side("destination", destination, destination_offsets, reach[1])
    if not destination.flags.writeable:
        raise ConfigError("the destination must be writable")
    check_pairs(len(source_offsets), len(destination_offsets))


def check_side(side: Side, memory: Bytes, offsets: Offsets, reach: Reach) -> None:
    """Raises ConfigError if `memory` or `offsets` are not what they should be, or a copy leaves the memory."""
    if memory.dtype != np.uint8 or memory.ndim != 1 or not memory.flags.c_contiguous:
        raise ConfigError(f"the {side} must be flat memory of uint8; got {memory.dtype} of shape {memory.shape}")
    if offsets.dtype != np.int64 or offsets.ndim != 1:
        raise ConfigError(f"{side} offsets must be int64 of shape (n,); got {offsets.dtype} of shape {offsets.shape}")
    if len(offsets):
        reach.check(side, int(offsets.min()), int(offsets.max()), len(memory))


def check_pairs(sources: int, destinations: int) -> None:
    """Raises ConfigError if there are not as many places on one side as on the other."""
    if sources != destinations:
        raise ConfigError(f"every source offset needs a destination offset; got {sources} and {destinations}")
