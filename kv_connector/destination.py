"""Pure life of an order at a rank that reads. Decides what to read and what to believe; does neither itself."""

from dataclasses import dataclass
from enum import Enum

from vllm_llmd.kv_connector.layout import CellCopy
from vllm_llmd.kv_connector.lease import LeaseView
from vllm_llmd.kv_connector.lifecycle import (
    Arrival,
    DestinationAction,
    Drained,
    OrderSpec,
    Outcome,
    Send,
    StartRead,
)
from vllm_llmd.wire import Ack, Announce, Done, Renew, Renewed


class DestinationState(Enum):
    OPEN = "open"
    """Ranges are announced and read."""
    CLOSING = "closing"
    """Nothing new is read; reads that have started run out."""
    CLOSED = "closed"
    """The outcome has been reported."""


_Cell = tuple[int, int]
"""A cell by its group and its number."""


@dataclass
class _Range:
    copies: tuple[CellCopy, ...]
    cells: dict[_Cell, int]
    """The layers, as a bit mask, that each cell gets."""
    announced_ms: float
    bytes: int = 0
    before_end: bool = False
    read_at_ms: float | None = None
    accepted: bool = False

    @property
    def blocks(self) -> tuple[int, ...]:
        """Our blocks that the range is read into, each once."""
        return tuple(dict.fromkeys(copy.local for copy in self.copies))


class Destination:
    """One order seen from a rank that reads, from one rank of the source. Methods take an event, return what to do.

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
        self._unaccepted: set[int] = set()
        self._groups = {wanted.group: wanted for wanted in spec.wanted}
        self._unannounced = {(w.group, cell): w.layers for w in spec.wanted for cell in w.cells}
        self._wanted = dict(self._unannounced)
        self._prefill_ended_ms: float | None = None
        self._reason: str | None = None

    @property
    def forgettable(self) -> bool:
        return self.state is DestinationState.CLOSED and not self._reading

    def announced(self, message: Announce, now_ms: float) -> list[DestinationAction]:
        """The source says that a range is ready. A range seen before, or not asked for, changes nothing."""
        self._heard_ms = now_ms
        if self.state is not DestinationState.OPEN or message.seq in self._ranges:
            return []
        if message.last and self._prefill_ended_ms is None:
            self._prefill_ended_ms = now_ms
        entry = self._range(message, now_ms)
        if not entry.copies:
            return []
        self._ranges[message.seq] = entry
        self._reading.add(message.seq)
        layers = message.first_layer, message.end_layer
        read = StartRead(self.spec.order, message.seq, entry.copies, *layers, heads=self.spec.heads)
        actions: list[DestinationAction] = [read]
        if not self._lease.covers(now_ms + self.spec.lease_ms / 4):
            actions.append(Send(Renew(self.spec.order, self._lease.renew(now_ms))))
        return actions

    def read_finished(self, seq: int, size: int, ok: bool, now_ms: float) -> list[DestinationAction]:
        """The read of range `seq`, of `size` bytes, ended."""
        self._reading.discard(seq)
        entry = self._ranges[seq]
        if self.state is DestinationState.CLOSED:
            drained = Drained(self.spec.order, entry.blocks)
            return [drained] if self._reading else [drained, Send(Done(self.spec.order))]
        if ok:
            entry.read_at_ms, entry.bytes = now_ms, size
            entry.before_end = self._prefill_ended_ms is None
            self._unaccepted.add(seq)
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

    def _range(self, message: Announce, now_ms: float) -> _Range:
        """What of an announcement is wanted and has not been announced before."""
        layers = layer_mask(message.first_layer, message.end_layer)
        copies: list[CellCopy] = []
        cells: dict[_Cell, int] = {}
        for strip in message.strips:
            wanted = self._groups.get(strip.group)
            mask = 0 if wanted is None else layers & wanted.layers
            if wanted is None or not mask:
                continue
            for number, remote, remote_part in wanted.remote(strip):
                cell = (strip.group, number)
                if self._unannounced.get(cell, 0) & mask != mask:
                    continue
                self._unannounced[cell] ^= mask
                local, local_part = wanted.local(number)
                cells[cell] = mask
                copies.append(CellCopy(strip.group, remote, remote_part, local, local_part))
        return _Range(tuple(copies), cells, now_ms)

    def _accept(self) -> list[int]:
        """Accept every range that was read under the lease as far as it is known; returns which."""
        accepted = []
        for seq in sorted(self._unaccepted):
            entry = self._ranges[seq]
            assert entry.read_at_ms is not None
            if self._lease.covers(entry.read_at_ms):
                entry.accepted = True
                accepted.append(seq)
                for cell, mask in entry.cells.items():
                    self._wanted[cell] ^= mask
                    if not self._wanted[cell]:
                        del self._wanted[cell]
        self._unaccepted.difference_update(accepted)
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
        outcome = self._outcome()
        return [outcome] if self._reading else [Send(Done(self.spec.order)), outcome]

    def _outcome(self) -> Outcome:
        missing = {self._groups[group].local(cell)[0] for group, cell in self._wanted}
        blocks = tuple(block for wanted in self.spec.wanted for block in wanted.blocks)
        return Outcome(
            order=self.spec.order,
            request=self.spec.request,
            reason=self._reason if self._wanted else None,
            blocks=blocks,
            missing=tuple(block for block in blocks if block in missing),
            quarantined=tuple(block for seq in sorted(self._reading) for block in self._ranges[seq].blocks),
            arrivals=tuple(
                Arrival(self.spec.order, entry.announced_ms, entry.read_at_ms, entry.bytes, entry.before_end)
                for entry in self._ranges.values()
                if entry.accepted and entry.read_at_ms is not None
            ),
            prefill_ended_ms=self._prefill_ended_ms,
        )


MAX_LAYERS = 4096
"""More than any model has."""


def layer_mask(first: int, end: int) -> int:
    """The layers `first` to `end` (exclusive; 0: all there may be) as a bit mask; none where there is no such range."""
    last = end or MAX_LAYERS
    if not 0 <= first < last <= MAX_LAYERS:
        return 0
    return (1 << last) - (1 << first)
