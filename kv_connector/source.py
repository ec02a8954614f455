"""Pure life of an order at a rank that is read. Decides how long blocks stay pinned; pins nothing itself."""

from dataclasses import dataclass, field

from vllm_llmd.kv_connector.lifecycle import LEASE_EXPIRED, Send, SourceAction, Unpin
from vllm_llmd.names import OrderId
from vllm_llmd.wire import Ack, Announce, Dropped, Renew, Renewed


@dataclass
class Source:
    """One order seen from the rank that is read, by one that reads. Its lease starts with the first announcement.

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
        seqs = tuple(seq for seq in dict.fromkeys(message.seqs) if seq in self._pinned)
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
