"""The ZeroMQ sockets between worker ranks. Used by the I/O thread alone; they decide nothing about orders.

A rank that reads dials the rank it reads from; announcements come back on that connection. So no message can name
an address that this rank would then connect to: endpoints come from the membership alone.
"""

import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import zmq

from vllm_llmd.errors import WireError
from vllm_llmd.kv_connector.delivery import SourceEndpoint
from vllm_llmd.kv_connector.exchange import Caller
from vllm_llmd.kv_connector.own_ranks import NUDGE
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.topology import edges, objection, sources_of
from vllm_llmd.kv_connector.transport import PeerName
from vllm_llmd.wire import (
    EngineInfo,
    Geometry,
    Greet,
    Greeting,
    Members,
    PeerMessage,
    Refused,
    Regions,
    decode_link,
    decode_peer,
    encode,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeerSettings:
    """Who this rank is and where it listens."""

    me: Caller
    fingerprint: str
    geometry: Geometry
    host: str
    seal: Seal


@dataclass
class Peer:
    """A rank we read from. What it says of itself is known once it has greeted back."""

    endpoint: SourceEndpoint
    socket: zmq.Socket[bytes]
    name: PeerName | None = None
    regions: Regions | None = None
    epoch: int | None = None


@dataclass(frozen=True)
class Greeted:
    """A rank that wants to read from us has said who it is."""

    caller: Caller


@dataclass(frozen=True)
class Heard:
    """A message of a rank that has greeted."""

    caller: Caller
    message: PeerMessage


@dataclass(frozen=True)
class FleetChanged:
    """The ranks that we may read from: those that hold heads of ours, in every other engine that we understand.

    `reorders`: blocks of one of them are cut to another size, and may have to be reordered on the way.
    """

    endpoints: frozenset[SourceEndpoint]
    reorders: bool = False


@dataclass(frozen=True)
class Nudged:
    """This rank's own engine core has something for the next step."""


class Callers:
    """The ROUTER socket on which other ranks reach this one, and its own engine core under the identity `own_key`."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", settings: PeerSettings) -> None:
        self._settings = settings
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        port = self.socket.bind_to_random_port(f"tcp://{settings.host}")
        self.endpoint = f"tcp://{settings.host}:{port}"
        self.own_key = secrets.token_hex(16).encode()
        self.greeting: Greeting | None = None
        self._identities: dict[Caller, bytes] = {}
        self._callers: dict[bytes, Caller] = {}

    def hear(self) -> Iterator[Greeted | Heard | FleetChanged | Nudged]:
        """Everything that has arrived. What is unusable is refused and logged."""
        while True:
            try:
                identity, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                event = self._read(identity, frames[-1] if frames else b"")
            except WireError as error:
                logger.error("llmd peer message refused: %s", error)
                post(self.socket, [identity, encode(Refused(str(error)))])
                continue
            if event is not None:
                yield event

    def send(self, caller: Caller, message: PeerMessage) -> None:
        """Send to a rank that has greeted; one whose later life has greeted since hears nothing."""
        if caller in self._identities:
            post(self.socket, [self._identities[caller], encode(message)])

    def _read(self, identity: bytes, frame: bytes) -> Greeted | Heard | FleetChanged | Nudged | None:
        if identity == self.own_key:
            return Nudged() if frame == NUDGE else self._fleet(frame)
        message = decode_peer(frame)
        if isinstance(message, Greet):
            return self._greet(identity, message)
        if identity in self._callers:
            return Heard(self._callers[identity], message)
        post(self.socket, [identity, encode(Refused("greet first: this engine has restarted"))])
        return None

    def _fleet(self, frame: bytes) -> FleetChanged | None:
        message = decode_link(frame)
        if not isinstance(message, Members):
            return None
        endpoints = {engine.id: self._of_interest(engine) for engine in message.engines}
        mine = self._settings.geometry.groups
        return FleetChanged(
            endpoints=frozenset(endpoint for each in endpoints.values() for endpoint in each),
            reorders=any(endpoints[engine.id] and engine.geometry.groups != mine for engine in message.engines),
        )

    def _of_interest(self, engine: EngineInfo) -> list[SourceEndpoint]:
        mine, theirs = self._settings.geometry, engine.geometry
        if engine.id == self._settings.me.engine or engine.fingerprint != self._settings.fingerprint:
            return []
        if objection(mine, theirs) is not None or len(engine.workers) != theirs.tp:
            return []
        between = sources_of(self._settings.me.rank, edges(theirs.tp, mine.tp, mine.kv_heads))
        return [SourceEndpoint(engine.workers[edge.source]) for edge in between]

    def _greet(self, identity: bytes, message: Greet) -> Greeted | None:
        objection = self._objection(message)
        if objection is not None:
            post(self.socket, [identity, encode(Refused(objection))])
            return None
        assert self.greeting is not None
        caller = Caller(message.engine, message.epoch, message.rank)
        self._forget(caller)
        self._identities[caller] = identity
        self._callers[identity] = caller
        post(self.socket, [identity, encode(self.greeting)])
        return Greeted(caller)

    def _forget(self, newcomer: Caller) -> None:
        """Drop earlier lives of the same rank."""
        for caller, identity in list(self._identities.items()):
            if (caller.engine, caller.rank) == (newcomer.engine, newcomer.rank):
                del self._identities[caller]
                del self._callers[identity]

    def _objection(self, message: Greet) -> str | None:
        if message.fingerprint != self._settings.fingerprint:
            return f"engine {self._settings.me.engine} holds KV blocks of another kind than {message.engine}"
        if not self._settings.seal.verifies(message.mac, _greet_text(message)):
            return f"engine {message.engine} does not know this fleet's secret"
        return None


class Sources:
    """One DEALER socket per rank that we read from."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", poller: zmq.Poller, settings: PeerSettings) -> None:
        self._context = context
        self._poller = poller
        me = settings.me
        self._identity = f"{me.engine}:{me.epoch}:{me.rank}".encode()
        greet = Greet(me.engine, me.epoch, me.rank, settings.fingerprint)
        self._greet = msgspec.structs.replace(greet, mac=settings.seal.sign(_greet_text(greet)))
        self._peers: dict[SourceEndpoint, Peer] = {}

    @property
    def endpoints(self) -> frozenset[SourceEndpoint]:
        return frozenset(self._peers)

    def reach(self, endpoint: SourceEndpoint) -> Peer:
        """The peer at `endpoint`; dials and greets it if it is new."""
        if endpoint in self._peers:
            return self._peers[endpoint]
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self._identity)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        socket.connect(endpoint)
        self._poller.register(socket, zmq.POLLIN)
        post(socket, [encode(self._greet)])
        peer = self._peers[endpoint] = Peer(endpoint, socket)
        return peer

    def leave(self, endpoint: SourceEndpoint) -> PeerName | None:
        """Hang up; returns the transport's name of the peer, if it has one."""
        peer = self._peers.pop(endpoint)
        self._poller.unregister(peer.socket)
        peer.socket.close()
        return peer.name

    def hear(self, ready: dict[object, int]) -> Iterator[tuple[SourceEndpoint, PeerMessage | WireError]]:
        """Everything that has arrived on the sockets that are `ready`."""
        for endpoint, peer in list(self._peers.items()):
            while peer.socket in ready and endpoint in self._peers:
                try:
                    frame = peer.socket.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                try:
                    yield endpoint, decode_peer(frame)
                except WireError as error:
                    yield endpoint, error

    def send(self, endpoint: SourceEndpoint, message: PeerMessage) -> None:
        post(self._peers[endpoint].socket, [encode(message)])


def post(socket: "zmq.Socket[bytes]", frames: list[bytes]) -> None:
    """Send without blocking. What a full queue loses, its order's lease finds out."""
    try:
        socket.send_multipart(frames, zmq.NOBLOCK)
    except zmq.Again:
        logger.warning("llmd peer queue is full; a message is lost")


def _greet_text(message: Greet) -> str:
    return f"greet {message.engine} {message.epoch} {message.rank} {message.fingerprint}"
