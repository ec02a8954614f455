"""Pure post office of one worker rank: which order an event belongs to, and whom an action addresses.

Owns every `Destination`, `Delivery` and `Source` of the rank. No sockets, no threads, no clock.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from vllm_llmd.kv_connector.delivery import Delivery, SourceEndpoint, Strand
from vllm_llmd.kv_connector.destination import Destination
from vllm_llmd.kv_connector.lifecycle import (
    LEASE_EXPIRED,
    DestinationAction,
    Drained,
    OrderSpec,
    Outcome,
    Send,
    SourceAction,
    StartRead,
    Unpin,
)
from vllm_llmd.kv_connector.source import Source
from vllm_llmd.names import EngineId, Epoch, OrderId
from vllm_llmd.wire import Ack, Announce, Done, Dropped, PeerMessage, Renew, Renewed

EARLY_ORDERS = 1024
"""Announcements that overtook their own order's load are kept for at most this many strands."""

EARLY_RANGES = 4096
"""So many of each; an order of a million tokens has fewer."""

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
class Expect:
    """One strand of a delivery: `spec` from the rank at `endpoint`, in its life `epoch`, for one part of the prompt."""

    endpoint: SourceEndpoint
    epoch: Epoch
    part: int
    spec: OrderSpec


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

    @property
    def strand(self) -> Strand:
        return Strand(self.read.order, self.endpoint)


Act = ToSource | ToDestination | ReadFrom | Outcome | Drained | Unpin


class Exchange:
    """Dispatches events to the orders of this rank; every method returns what to do next."""

    def __init__(self) -> None:
        self._destinations: dict[Strand, tuple[Destination, Delivery]] = {}
        self._early: OrderedDict[Strand, list[Announce]] = OrderedDict()
        self._sources: dict[tuple[OrderId, Caller], Source] = {}
        self._ended: OrderedDict[tuple[OrderId, Caller], str] = OrderedDict()
        self._lingering: dict[tuple[OrderId, Caller], float] = {}
        self._greeted: set[Caller] = set()
        self._undelivered: dict[Caller, list[PeerMessage]] = {}
        self.expired = 0
        """Leases that have run out at this end since start."""

    # --- we read ----------------------------------------------------------------------------------------------

    def load(self, expected: Sequence[Expect], now_ms: float) -> list[Act]:
        """This rank expects a delivery, made of these strands."""
        strands = {Strand(each.spec.order, each.endpoint): each for each in expected}
        delivery = Delivery({strand: each.part for strand, each in strands.items()})
        acts: list[Act] = []
        for strand, each in strands.items():
            self._destinations[strand] = (Destination(each.spec, now_ms), delivery)
        for strand in strands:
            acts += self._tell(strand, self._destinations[strand][0].tick(now_ms), now_ms)
            for announce in self._early.pop(strand, ()):
                acts += self._tell(strand, self._destinations[strand][0].announced(announce, now_ms), now_ms)
        return acts

    def from_source(self, endpoint: SourceEndpoint, message: PeerMessage, now_ms: float) -> list[Act]:
        """A message of the rank at `endpoint`. What it says of orders that others serve is ignored."""
        if not isinstance(message, Announce | Renewed | Dropped):
            return []
        strand = Strand(message.order, endpoint)
        if strand not in self._destinations:
            return self._keep_early(strand, message) if isinstance(message, Announce) else []
        destination = self._destinations[strand][0]
        match message:
            case Announce():
                return self._tell(strand, destination.announced(message, now_ms), now_ms)
            case Renewed():
                return self._tell(strand, destination.renewed(message, now_ms), now_ms)
            case Dropped(reason=reason):
                return self._tell(strand, destination.failed(reason, now_ms), now_ms)

    def failed(self, order: OrderId, reason: str, now_ms: float) -> list[Act]:
        """An order we placed will not be served, or is not wanted any more. Unknown orders change nothing."""
        strands = [strand for strand in self._destinations if strand.order == order]
        return self._fail(strands, reason, now_ms)

    def source_lost(self, endpoint: SourceEndpoint, reason: str, now_ms: float) -> list[Act]:
        """Nothing that the rank at `endpoint` announced or will announce can be read."""
        strands = [strand for strand in self._destinations if strand.endpoint == endpoint]
        return self._fail(strands, reason, now_ms)

    def source_finished(self, order: OrderId, now_ms: float) -> list[Act]:
        """The source's request for our order is over."""
        acts: list[Act] = []
        for strand, (destination, _) in list(self._destinations.items()):
            if strand.order == order:
                acts += self._tell(strand, destination.source_finished(now_ms), now_ms)
        return acts

    def read_finished(self, strand: Strand, seq: int, size: int, ok: bool, now_ms: float) -> list[Act]:
        """A read that `ReadFrom` asked for, of `size` bytes, has ended."""
        destination = self._destinations[strand][0]
        return self._tell(strand, destination.read_finished(seq, size, ok, now_ms), now_ms)

    def _fail(self, strands: Iterable[Strand], reason: str, now_ms: float) -> list[Act]:
        acts: list[Act] = []
        for strand in strands:
            if strand in self._destinations:
                acts += self._tell(strand, self._destinations[strand][0].failed(reason, now_ms), now_ms)
        return acts

    # --- we are read ------------------------------------------------------------------------------------------

    def greeted(self, caller: Caller) -> list[Act]:
        """A rank that wants to read from us is connected: earlier lives of its engine are over."""
        acts: list[Act] = []
        for key, source in list(self._sources.items()):
            if same_rank(key[1], caller) and key[1] != caller:
                acts += self._of_source(key, source.done("destination restarted"))
        self._lingering = {
            key: until_ms
            for key, until_ms in self._lingering.items()
            if key[1] == caller or not same_rank(key[1], caller)
        }
        self._greeted = {c for c in self._greeted if not same_rank(c, caller)} | {caller}
        acts += [ToDestination(caller, message) for message in self._undelivered.pop(caller, ())]
        return acts

    def ready(self, caller: Caller, message: Announce, lease_ms: float, now_ms: float) -> list[Act]:
        """Blocks for an order of `caller` are computed and pinned."""
        key = (message.order, caller)
        if key not in self._sources:
            if key in self._ended:
                return [Unpin(message.order, (message.seq,))]
            self._sources[key] = Source(message.order, lease_ms)
        return self._of_source(key, self._sources[key].ready(message, now_ms))

    def withdrawn(self, caller: Caller, order: OrderId, reason: str) -> list[Act]:
        """Our own request for an order ended early, or the order was refused."""
        key = (order, caller)
        if key in self._sources:
            return self._of_source(key, self._sources[key].withdrawn(reason))
        self._remember(key, reason)
        return [ToDestination(caller, Dropped(order, reason))] if caller in self._greeted else []

    def from_destination(self, caller: Caller, message: PeerMessage, now_ms: float) -> list[Act]:
        """A message of `caller`, about its own orders."""
        if not isinstance(message, Renew | Ack | Done):
            return []
        key = (message.order, caller)
        if key not in self._sources:
            return self._about_unknown(key, message)
        source = self._sources[key]
        match message:
            case Renew():
                return self._of_source(key, source.renew(message, now_ms))
            case Ack():
                return self._of_source(key, source.acked(message))
            case Done():
                return self._of_source(key, source.done())

    def _about_unknown(self, key: tuple[OrderId, Caller], message: Renew | Ack | Done) -> list[Act]:
        if isinstance(message, Done):
            self._lingering.pop(key, None)
            self._remember(key, "done")
        if not isinstance(message, Renew):
            return []
        if key in self._ended:
            return [ToDestination(key[1], Dropped(message.order, self._ended[key]))]
        return [ToDestination(key[1], Renewed(message.order, message.n, held=False))]

    # --- both -------------------------------------------------------------------------------------------------

    def tick(self, now_ms: float) -> list[Act]:
        """Time has passed."""
        acts: list[Act] = []
        for strand, (destination, _) in list(self._destinations.items()):
            if strand in self._destinations:
                acts += self._tell(strand, destination.tick(now_ms), now_ms)
        for key, source in list(self._sources.items()):
            acts += self._of_source(key, source.tick(now_ms))
        for key, until_ms in list(self._lingering.items()):
            if now_ms > until_ms:
                del self._lingering[key]
            else:
                self._lingering[key] = min(until_ms, now_ms + LINGER_MS)
        return acts

    @property
    def busy(self) -> bool:
        """Whether any order is alive at this rank."""
        return bool(self._destinations or self._sources)

    def reads_from(self, endpoint: SourceEndpoint) -> bool:
        """Whether any order of ours is still with the rank at `endpoint`."""
        return any(strand.endpoint == endpoint for strand in self._destinations)

    @property
    def lingering(self) -> bool:
        """Whether a read from this rank may have outlived its lease: it needs our help to end."""
        return bool(self._lingering)

    @property
    def being_read(self) -> bool:
        """Whether a destination may be reading from this rank right now."""
        return any(source.unread for source in self._sources.values())

    def _tell(self, strand: Strand, actions: Sequence[DestinationAction], now_ms: float) -> list[Act]:
        """What the actions of one strand's destination come to."""
        destination, delivery = self._destinations[strand]
        acts: list[Act] = []
        for action in actions:
            match action:
                case Send(message):
                    acts.append(ToSource(strand.endpoint, message))
                case StartRead():
                    acts.append(ReadFrom(strand.endpoint, action))
                case Outcome():
                    acts += self._ended_strand(strand, action, now_ms)
                case Drained():
                    told = delivery.drained(action)
                    acts += [] if told is None else [told]
        if destination.forgettable:
            self._destinations.pop(strand, None)
        return acts

    def _ended_strand(self, strand: Strand, outcome: Outcome, now_ms: float) -> list[Act]:
        delivery = self._destinations[strand][1]
        whole = delivery.ended(strand, outcome)
        if whole is not None:
            return [whole]
        return [] if outcome.reason is None else self._fail(delivery.doomed_with(strand), outcome.reason, now_ms)

    def _of_source(self, key: tuple[OrderId, Caller], actions: Iterable[SourceAction]) -> list[Act]:
        caller, source = key[1], self._sources[key]
        acts: list[Act] = []
        for action in actions:
            acts += self._deliver(caller, action.message) if isinstance(action, Send) else [action]
        if source.ended is not None:
            del self._sources[key]
            self._remember(key, source.ended)
            if source.ended == LEASE_EXPIRED:
                self.expired += 1
                if caller in self._greeted:
                    self._lingering[key] = inf
            if caller not in self._greeted and not any(theirs == caller for _, theirs in self._sources):
                self._undelivered.pop(caller, None)
        return acts

    def _deliver(self, caller: Caller, message: PeerMessage) -> list[Act]:
        if caller in self._greeted:
            return [ToDestination(caller, message)]
        self._undelivered.setdefault(caller, []).append(message)
        return []

    def _keep_early(self, strand: Strand, message: Announce) -> list[Act]:
        early = self._early.setdefault(strand, [])
        if len(early) < EARLY_RANGES:
            early.append(message)
        while len(self._early) > EARLY_ORDERS:
            self._early.popitem(last=False)
        return []

    def _remember(self, key: tuple[OrderId, Caller], reason: str) -> None:
        self._ended[key] = reason
        while len(self._ended) > ENDED_ORDERS:
            self._ended.popitem(last=False)
