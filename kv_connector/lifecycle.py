"""What an order is, and what its two ends may do about it. Values only.

A worker rank keeps one `destination.Destination` per order it placed and source rank it reads from, and one
`source.Source` per order it serves and destination rank that reads; `delivery.Delivery` ties together what belongs to
one request. All are pure: events in, actions out; no sockets, no threads, no clock.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_llmd.kv_connector.layout import CellCopy
from vllm_llmd.kv_connector.topology import HeadSlice
from vllm_llmd.names import OrderId, RequestId
from vllm_llmd.wire import PeerMessage, Strip


@dataclass(frozen=True)
class Wanted:
    """What is wanted of one KV cache group: prompt tokens `first_token` to `end_token`, in the `layers` of a bit mask.

    They go into `blocks`, whose first holds the tokens from `first_block * block_size` on.
    """

    group: int
    layers: int
    block_size: int
    source_block_size: int
    first_token: int
    end_token: int
    first_block: int
    blocks: tuple[int, ...]

    @property
    def cell(self) -> int:
        """Tokens that are contiguous on both sides: the smaller block size."""
        return min(self.block_size, self.source_block_size)

    @property
    def cells(self) -> range:
        """The cells wanted, counted from the prompt's beginning."""
        return range(self.first_token // self.cell, -(-self.end_token // self.cell))

    def local(self, cell: int) -> tuple[int, int]:
        """The block that a cell goes into, and which part of it."""
        index, within = divmod(cell * self.cell, self.block_size)
        return self.blocks[index - self.first_block], within // self.cell

    def remote(self, strip: Strip) -> Iterator[tuple[int, int, int]]:
        """The cells wanted of a strip of the source's: (cell, block of the source, which part of it)."""
        parts = self.source_block_size // self.cell
        first = strip.first_block * parts
        for cell in range(max(first, self.cells.start), min(first + len(strip.blocks) * parts, self.cells.stop)):
            offset, part = divmod(cell - first, parts)
            yield cell, strip.blocks[offset], part


@dataclass(frozen=True)
class OrderSpec:
    """An order as its destination placed it; `heads` are those to read along one strand, None for whole blocks."""

    order: OrderId
    request: RequestId
    wanted: tuple[Wanted, ...]
    lease_ms: float
    heads: HeadSlice | None = None


CANCELLED = "cancelled"
"""Why an order ended whose request is gone: nobody needs to know which of its blocks are missing."""


LEASE_EXPIRED = "lease expired"
"""Why an order ended whose destination has not been heard for a lease: it may be reading all the same."""


# --- actions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Send:
    """Send to the other end of the order."""

    message: PeerMessage


@dataclass(frozen=True)
class StartRead:
    """Read range `seq`, of layers `first_layer` to `end_layer` (0: all); answer with `read_finished`."""

    order: OrderId
    seq: int
    cells: tuple[CellCopy, ...]
    first_layer: int = 0
    end_layer: int = 0
    heads: HeadSlice | None = None


@dataclass(frozen=True)
class Arrival:
    """A range that was read and accepted. `before_end`: before the source announced its last one."""

    order: OrderId
    announced_ms: float
    read_ms: float
    bytes: int
    before_end: bool


@dataclass(frozen=True)
class Outcome:
    """How an order ended, at one rank.

    `reason` is None if all `blocks` arrived. `missing` blocks hold nothing valid; `quarantined` ones among them may
    still change, until as many `Drained` follow as they are listed here. `prefill_ended_ms` is when the last range was
    announced, if it was.
    """

    order: OrderId
    request: RequestId
    reason: str | None
    blocks: tuple[int, ...]
    missing: tuple[int, ...]
    quarantined: tuple[int, ...]
    arrivals: tuple[Arrival, ...]
    prefill_ended_ms: float | None

    @property
    def failed(self) -> bool:
        """Whether anybody has to compute what is missing."""
        return bool(self.missing) and self.reason != CANCELLED


@dataclass(frozen=True)
class Drained:
    """A read that outlived its order has ended: its blocks change no more."""

    order: OrderId
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Unpin:
    """A destination rank will not read these ranges any more."""

    order: OrderId
    seqs: tuple[int, ...]


DestinationAction = Send | StartRead | Outcome | Drained
SourceAction = Send | Unpin
