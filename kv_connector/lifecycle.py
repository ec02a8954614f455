"""Pure life of a remote prefill order, at both ends. No sockets, no threads, no clock: events in, actions out.

A worker rank keeps one `Destination` per order it placed and one `Source` per order it serves.
"""

from dataclasses import dataclass, field
from enum import Enum

from vllm_llmd.kv_connector.layout import BlockPair
from vllm_llmd.kv_connector.lease import LeaseView
from vllm_llmd.names import OrderId, RequestId
from vllm_llmd.wire import Ack, Announce, Done, Dropped, PeerMessage, Renew, Renewed


@dataclass(frozen=True)
class OrderSpec:
    """An order as its destination placed it: prompt blocks `first_block ...` go into `local_blocks`, in order."""

    order: OrderId
    request: RequestId
    first_block: int
    local_blocks: tuple[int, ...]
    lease_ms: float


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
    """Read range `seq`; answer with `read_finished`."""

    order: OrderId
    seq: int
    pairs: tuple[BlockPair, ...]


@dataclass(frozen=True)
class Outcome:
    """How an order ended at this rank.

    `reason` is None if all `blocks` arrived. `missing` blocks hold nothing valid; `quarantined` ones among them may
    still change, until a `Drained` follows.
    """

    order: OrderId
    request: RequestId
    reason: str | None
    blocks: int
    missing: tuple[int, ...]
    quarantined: tuple[int, ...]
    ranges: int
    ranges_before_end: int


@dataclass(frozen=True)
class Drained:
    """A read that outlived its order has ended: its blocks change no more."""

    order: OrderId
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Unpin:
    """The destination will not read these ranges any more."""

    order: OrderId
    seqs: tuple[int, ...]


DestinationAction = Send | StartRead | Outcome | Drained
SourceAction = Send | Unpin


# --- destination ----------------------------------------------------------------------------------------------


class DestinationState(Enum):
    OPEN = "open"
    """Ranges are announced and read."""
    CLOSING = "closing"
    """Nothing new is read; reads that have started run out."""
    CLOSED = "closed"
    """The outcome has been reported."""


@dataclass
class _Range:
    pairs: tuple[BlockPair, ...]
    before_end: bool = False
    read_at_ms: float | None = None
    accepted: bool = False


class Destination:
    """One order seen from the rank that reads. Each method takes an event and returns what to do.

    OPEN --complete, nothing in flight--> CLOSED
    OPEN --failed | cancelled | stalled--> CLOSING --reads ended | gave up waiting--> CLOSED
    """

    def __init__(self, spec: OrderSpec, now_ms: float) -> None:
        self.spec = spec
        self.state = DestinationState.OPEN
        self._lease = LeaseView(spec.lease_ms)
        self._heard_ms = now_ms
        self._deadline_ms: float | None = None
        self._ranges: dict[int, _Range] = {}
        self._reading: set[int] = set()
        self._wanted = set(spec.local_blocks)
        self._end_announced = False
        self._reason: str | None = None

    @property
    def forgettable(self) -> bool:
        return self.state is DestinationState.CLOSED and not self._reading

    def announced(self, message: Announce, now_ms: float) -> list[DestinationAction]:
        """The source says that a range is ready. A range seen before, or not asked for, changes nothing."""
        self._heard_ms = now_ms
        if self.state is not DestinationState.OPEN or message.seq in self._ranges:
            return []
        pairs = self._pairs(message)
        if not pairs:
            return []
        self._end_announced |= message.last
        self._ranges[message.seq] = _Range(pairs)
        self._reading.add(message.seq)
        actions: list[DestinationAction] = [StartRead(self.spec.order, message.seq, pairs)]
        if not self._lease.covers(now_ms + self.spec.lease_ms / 4):
            actions.append(Send(Renew(self.spec.order, self._lease.renew(now_ms))))
        return actions

    def read_finished(self, seq: int, ok: bool, now_ms: float) -> list[DestinationAction]:
        """The read of range `seq` ended."""
        self._reading.discard(seq)
        entry = self._ranges[seq]
        if self.state is DestinationState.CLOSED:
            drained = Drained(self.spec.order, tuple(pair.local for pair in entry.pairs))
            return [drained] if self._reading else [drained, Send(Done(self.spec.order))]
        if ok:
            entry.read_at_ms = now_ms
            entry.before_end = not self._end_announced
        if self.state is DestinationState.CLOSING:
            self._accept()
            return self._finish_if_drained(now_ms)
        return self._go_on(now_ms) if ok else self._close("read failed", now_ms)

    def renewed(self, message: Renewed, now_ms: float) -> list[DestinationAction]:
        """The source is alive, and holds the order's blocks if `held`."""
        self._heard_ms = now_ms
        self._lease.answered(message.n, message.held)
        return self._go_on(now_ms) if self.state is DestinationState.OPEN else []

    def failed(self, reason: str, now_ms: float) -> list[DestinationAction]:
        """The source refused or dropped the order, died, or the request was cancelled here."""
        return self._close(reason, now_ms) if self.state is DestinationState.OPEN else []

    def source_finished(self, now_ms: float) -> list[DestinationAction]:
        """The source's request is over: what it has not announced by now must be on its way."""
        if self.state is DestinationState.OPEN and self._deadline_ms is None:
            self._deadline_ms = now_ms + self.spec.lease_ms
        return []

    def tick(self, now_ms: float) -> list[DestinationAction]:
        """Time has passed."""
        if self.state is DestinationState.OPEN:
            if now_ms - self._heard_ms > self.spec.lease_ms:
                return self._close("source stalled", now_ms)
            if self._deadline_ms is not None and now_ms > self._deadline_ms:
                return self._close("source announced too little", now_ms)
            if self._lease.renewal_due(now_ms):
                return [Send(Renew(self.spec.order, self._lease.renew(now_ms)))]
        if self.state is DestinationState.CLOSING:
            return self._finish_if_drained(now_ms)
        return []

    def _pairs(self, message: Announce) -> tuple[BlockPair, ...]:
        taken = {pair.local for entry in self._ranges.values() for pair in entry.pairs}
        pairs = []
        for offset, remote in enumerate(message.blocks):
            index = message.first_block + offset - self.spec.first_block
            if 0 <= index < len(self.spec.local_blocks) and self.spec.local_blocks[index] not in taken:
                pairs.append(BlockPair(remote=remote, local=self.spec.local_blocks[index]))
        return tuple(pairs)

    def _accept(self) -> list[int]:
        """Accept every range that was read under the lease as far as it is known; returns which."""
        accepted = []
        for seq, entry in self._ranges.items():
            if not entry.accepted and entry.read_at_ms is not None and self._lease.covers(entry.read_at_ms):
                entry.accepted = True
                accepted.append(seq)
                self._wanted.difference_update(pair.local for pair in entry.pairs)
        return accepted

    def _go_on(self, now_ms: float) -> list[DestinationAction]:
        accepted = self._accept()
        if not self._wanted:
            return self._close(None, now_ms)
        return [Send(Ack(self.spec.order, accepted))] if accepted else []

    def _close(self, reason: str | None, now_ms: float) -> list[DestinationAction]:
        self.state = DestinationState.CLOSING
        self._reason = reason
        self._deadline_ms = now_ms + self.spec.lease_ms / 2
        return self._finish_if_drained(now_ms)

    def _finish_if_drained(self, now_ms: float) -> list[DestinationAction]:
        assert self._deadline_ms is not None
        if self._reading and now_ms < self._deadline_ms:
            return []
        self.state = DestinationState.CLOSED
        quarantined = [pair.local for seq in sorted(self._reading) for pair in self._ranges[seq].pairs]
        accepted = [entry for entry in self._ranges.values() if entry.accepted]
        outcome = Outcome(
            order=self.spec.order,
            request=self.spec.request,
            reason=self._reason if self._wanted else None,
            blocks=len(self.spec.local_blocks),
            missing=tuple(block for block in self.spec.local_blocks if block in self._wanted),
            quarantined=tuple(quarantined),
            ranges=len(accepted),
            ranges_before_end=sum(entry.before_end for entry in accepted),
        )
        return [outcome] if self._reading else [Send(Done(self.spec.order)), outcome]


# --- source ---------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """One order seen from the rank that is read. Its lease starts with the first announcement.

    serving --withdrawn--> dropped: nothing more is announced, but what is pinned stays pinned under the lease
    serving | dropped --acknowledged to the last | done | lease expired--> ended: nothing is pinned for it any more
    """

    order: OrderId
    lease_ms: float
    ended: str | None = None
    dropped: str | None = None
    _until_ms: float | None = None
    _pinned: set[int] = field(default_factory=set)
    _last_announced: bool = False

    @property
    def unread(self) -> bool:
        """Whether the destination may be reading right now."""
        return bool(self._pinned)

    def ready(self, message: Announce, now_ms: float) -> list[SourceAction]:
        """A finished step has made a range ready, and the scheduler has pinned it."""
        if self.ended is not None or self.dropped is not None:
            return [Unpin(self.order, (message.seq,))]
        self._pinned.add(message.seq)
        self._last_announced |= message.last
        if self._until_ms is None:
            self._until_ms = now_ms + self.lease_ms
        return [Send(message)]

    def renew(self, message: Renew, now_ms: float) -> list[SourceAction]:
        """The destination asks for more time, which a dropped order does not get."""
        actions = self.tick(now_ms)
        if self.ended is not None:
            return actions or [Send(Dropped(self.order, self.ended))]
        if self.dropped is not None:
            return [Send(Dropped(self.order, self.dropped))]
        if self._until_ms is not None:
            self._until_ms = now_ms + self.lease_ms
        return [Send(Renewed(self.order, message.n, held=self._until_ms is not None))]

    def acked(self, message: Ack) -> list[SourceAction]:
        """The destination has read and accepted ranges."""
        seqs = tuple(seq for seq in message.seqs if seq in self._pinned)
        self._pinned.difference_update(seqs)
        if (self._last_announced or self.dropped is not None) and not self._pinned and self.ended is None:
            self.ended = self.dropped or "served"
        return [Unpin(self.order, seqs)] if seqs else []

    def done(self, reason: str = "done") -> list[SourceAction]:
        """The destination wants no more, or is gone."""
        self.ended = self.ended or reason
        return self._release()

    def withdrawn(self, reason: str) -> list[SourceAction]:
        """The source's own request ended before it had announced everything, or the order was refused."""
        if self.ended is not None or self.dropped is not None:
            return []
        self.dropped = reason
        if not self._pinned:
            self.ended = reason
        return [Send(Dropped(self.order, reason))]

    def tick(self, now_ms: float) -> list[SourceAction]:
        """Time has passed."""
        if self.ended is not None or self._until_ms is None or now_ms <= self._until_ms:
            return []
        self.ended = LEASE_EXPIRED
        return [*self._release(), Send(Dropped(self.order, self.ended))]

    def _release(self) -> list[SourceAction]:
        seqs = tuple(sorted(self._pinned))
        self._pinned.clear()
        return [Unpin(self.order, seqs)] if seqs else []
