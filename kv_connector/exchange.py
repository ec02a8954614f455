"""Pure post office of one worker rank: which order an event belongs to, and whom an action addresses.

Owns every `Destination` and `Source` of the rank. No sockets, no threads, no clock.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import NewType

from vllm_llmd.kv_connector.lifecycle import (
    LEASE_EXPIRED,
    Destination,
    Drained,
    OrderSpec,
    Outcome,
    Send,
    Source,
    StartRead,
    Unpin,
)
from vllm_llmd.names import EngineId, Epoch, OrderId
from vllm_llmd.wire import Ack, Announce, Done, Dropped, PeerMessage, Renew, Renewed

SourceEndpoint = NewType("SourceEndpoint", str)
"""The ZeroMQ endpoint of the rank we read from."""

EARLY_ORDERS = 1024
"""Announcements that overtook their own order's load are kept for at most this many orders."""

LINGER_MS = 600_000.0
"""How long a source helps reads that may have outlived their lease, unless the destination says that it is done."""

ENDED_ORDERS = 4096
"""Served orders that are remembered, so that a late renewal is told what became of its order."""


@dataclass(frozen=True)
class Caller:
    """The rank that reads from us: one life of one rank of one engine."""

    engine: EngineId
    epoch: Epoch
    rank: int


def same_rank(one: Caller, other: Caller) -> bool:
    """Whether both are lives of the same rank of the same engine."""
    return (one.engine, one.rank) == (other.engine, other.rank)


@dataclass(frozen=True)
class ToSource:
    endpoint: SourceEndpoint
    message: PeerMessage


@dataclass(frozen=True)
class ToDestination:
    caller: Caller
    message: PeerMessage


@dataclass(frozen=True)
class ReadFrom:
    endpoint: SourceEndpoint
    read: StartRead


Act = ToSource | ToDestination | ReadFrom | Outcome | Drained | Unpin


class Exchange:
    """Dispatches events to the orders of this rank; every method returns what to do next."""

    def __init__(self) -> None:
        self._destinations: dict[OrderId, tuple[SourceEndpoint, Destination]] = {}
        self._early: OrderedDict[OrderId, list[Announce]] = OrderedDict()
        self._sources: dict[OrderId, tuple[Caller, Source]] = {}
        self._ended: OrderedDict[OrderId, str] = OrderedDict()
        self._lingering: dict[OrderId, tuple[Caller, float]] = {}
        self._greeted: set[Caller] = set()
        self._undelivered: dict[Caller, list[PeerMessage]] = {}

    # --- we read ----------------------------------------------------------------------------------------------

    def load(self, endpoint: SourceEndpoint, spec: OrderSpec, now_ms: float) -> list[Act]:
        """This rank expects `spec` from the rank at `endpoint`."""
        destination = Destination(spec, now_ms)
        self._destinations[spec.order] = (endpoint, destination)
        acts = self._of_destination(spec.order, destination.tick(now_ms))
        for announce in self._early.pop(spec.order, ()):
            acts += self._of_destination(spec.order, destination.announced(announce, now_ms))
        return acts

    def from_source(self, endpoint: SourceEndpoint, message: PeerMessage, now_ms: float) -> list[Act]:
        """A message of the rank at `endpoint`. What it says of orders that others serve is ignored."""
        if not isinstance(message, Announce | Renewed | Dropped):
            return []
        order = message.order
        if order not in self._destinations:
            return self._keep_early(message) if isinstance(message, Announce) else []
        theirs, destination = self._destinations[order]
        if theirs != endpoint:
            return []
        match message:
            case Announce():
                return self._of_destination(order, destination.announced(message, now_ms))
            case Renewed():
                return self._of_destination(order, destination.renewed(message, now_ms))
            case Dropped(reason=reason):
                return self._of_destination(order, destination.failed(reason, now_ms))

    def failed(self, order: OrderId, reason: str, now_ms: float) -> list[Act]:
        """An order we placed will not be served, or is not wanted any more. Unknown orders change nothing."""
        if order not in self._destinations:
            return []
        acts = self._of_destination(order, self._destinations[order][1].failed(reason, now_ms))
        self._forget(order)
        return acts

    def source_lost(self, endpoint: SourceEndpoint, reason: str, now_ms: float) -> list[Act]:
        """Nothing that the rank at `endpoint` announced or will announce can be read."""
        orders = [order for order, (theirs, _) in self._destinations.items() if theirs == endpoint]
        return [act for order in orders for act in self.failed(order, reason, now_ms)]

    def source_finished(self, order: OrderId, now_ms: float) -> list[Act]:
        """The source's request for our order is over."""
        if order not in self._destinations:
            return []
        return self._of_destination(order, self._destinations[order][1].source_finished(now_ms))

    def read_finished(self, order: OrderId, seq: int, ok: bool, now_ms: float) -> list[Act]:
        """A read that `ReadFrom` asked for has ended."""
        acts = self._of_destination(order, self._destinations[order][1].read_finished(seq, ok, now_ms))
        self._forget(order)
        return acts

    # --- we are read ------------------------------------------------------------------------------------------

    def greeted(self, caller: Caller) -> list[Act]:
        """A rank that wants to read from us is connected: earlier lives of its engine are over."""
        acts: list[Act] = []
        for order, (theirs, source) in list(self._sources.items()):
            if same_rank(theirs, caller) and theirs != caller:
                acts += self._of_source(order, source.done("destination restarted"))
        self._lingering = {
            order: late
            for order, late in self._lingering.items()
            if late[0] == caller or not same_rank(late[0], caller)
        }
        self._greeted = {c for c in self._greeted if not same_rank(c, caller)} | {caller}
        acts += [ToDestination(caller, message) for message in self._undelivered.pop(caller, ())]
        return acts

    def ready(self, caller: Caller, message: Announce, lease_ms: float, now_ms: float) -> list[Act]:
        """Blocks for an order of `caller` are computed and pinned."""
        if message.order not in self._sources:
            if message.order in self._ended:
                return [Unpin(message.order, (message.seq,))]
            self._sources[message.order] = (caller, Source(message.order, lease_ms))
        return self._of_source(message.order, self._sources[message.order][1].ready(message, now_ms))

    def withdrawn(self, caller: Caller, order: OrderId, reason: str) -> list[Act]:
        """Our own request for an order ended early, or the order was refused."""
        if order in self._sources:
            return self._of_source(order, self._sources[order][1].withdrawn(reason))
        self._remember(order, reason)
        return [ToDestination(caller, Dropped(order, reason))] if caller in self._greeted else []

    def from_destination(self, caller: Caller, message: PeerMessage, now_ms: float) -> list[Act]:
        """A message of `caller`. What it says of other callers' orders is ignored."""
        if not isinstance(message, Renew | Ack | Done):
            return []
        order = message.order
        if order not in self._sources:
            return self._about_unknown(caller, message)
        theirs, source = self._sources[order]
        if theirs != caller:
            return []
        match message:
            case Renew():
                return self._of_source(order, source.renew(message, now_ms))
            case Ack():
                return self._of_source(order, source.acked(message))
            case Done():
                return self._of_source(order, source.done())

    def _about_unknown(self, caller: Caller, message: Renew | Ack | Done) -> list[Act]:
        if isinstance(message, Done):
            self._lingering.pop(message.order, None)
            self._remember(message.order, "done")
        if not isinstance(message, Renew):
            return []
        if message.order in self._ended:
            return [ToDestination(caller, Dropped(message.order, self._ended[message.order]))]
        return [ToDestination(caller, Renewed(message.order, message.n, held=False))]

    # --- both -------------------------------------------------------------------------------------------------

    def tick(self, now_ms: float) -> list[Act]:
        """Time has passed."""
        acts: list[Act] = []
        for order, (_, destination) in list(self._destinations.items()):
            acts += self._of_destination(order, destination.tick(now_ms))
            self._forget(order)
        for order, (_, source) in list(self._sources.items()):
            acts += self._of_source(order, source.tick(now_ms))
        for order, (caller, until_ms) in list(self._lingering.items()):
            if now_ms > until_ms:
                del self._lingering[order]
            else:
                self._lingering[order] = (caller, min(until_ms, now_ms + LINGER_MS))
        return acts

    @property
    def busy(self) -> bool:
        """Whether any order is alive at this rank."""
        return bool(self._destinations or self._sources)

    def reads_from(self, endpoint: SourceEndpoint) -> bool:
        """Whether any order of ours is still with the rank at `endpoint`."""
        return any(theirs == endpoint for theirs, _ in self._destinations.values())

    @property
    def lingering(self) -> bool:
        """Whether a read from this rank may have outlived its lease: it needs our help to end."""
        return bool(self._lingering)

    @property
    def being_read(self) -> bool:
        """Whether a destination may be reading from this rank right now."""
        return any(source.unread for _, source in self._sources.values())

    def _of_destination(self, order: OrderId, actions: Sequence[Send | StartRead | Outcome | Drained]) -> list[Act]:
        endpoint, _ = self._destinations[order]
        acts: list[Act] = []
        for action in actions:
            match action:
                case Send(message):
                    acts.append(ToSource(endpoint, message))
                case StartRead():
                    acts.append(ReadFrom(endpoint, action))
                case _:
                    acts.append(action)
        return acts

    def _of_source(self, order: OrderId, actions: Iterable[Send | Unpin]) -> list[Act]:
        caller, source = self._sources[order]
        acts: list[Act] = []
        for action in actions:
            acts += self._deliver(caller, action.message) if isinstance(action, Send) else [action]
        if source.ended is not None:
            del self._sources[order]
            self._remember(order, source.ended)
            if source.ended == LEASE_EXPIRED:
                self._lingering[order] = (caller, inf)
            if caller not in self._greeted and not any(theirs == caller for theirs, _ in self._sources.values()):
                self._undelivered.pop(caller, None)
        return acts

    def _deliver(self, caller: Caller, message: PeerMessage) -> list[Act]:
        if caller in self._greeted:
            return [ToDestination(caller, message)]
        self._undelivered.setdefault(caller, []).append(message)
        return []

    def _keep_early(self, message: Announce) -> list[Act]:
        self._early.setdefault(message.order, []).append(message)
        while len(self._early) > EARLY_ORDERS:
            self._early.popitem(last=False)
        return []

    def _forget(self, order: OrderId) -> None:
        if order in self._destinations and self._destinations[order][1].forgettable:
            del self._destinations[order]

    def _remember(self, order: OrderId, reason: str) -> None:
        self._ended[order] = reason
        while len(self._ended) > ENDED_ORDERS:
            self._ended.popitem(last=False)
