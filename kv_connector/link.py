"""The engine's end of the link to every router: hello, heartbeats, block events, snapshots.

Runs inside the engine core process. Owns one DEALER socket per router and the mirror of what the prefix cache
holds; both belong to the link thread alone. Never blocks the engine thread, never raises into it, and never
imports vLLM.
"""

import logging
import math
import socket
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from types import MappingProxyType
from typing import Final

import zmq

from vllm_llmd import wire
from vllm_llmd.clock import Clock, MonotonicClock
from vllm_llmd.errors import ConfigError, WireError
from vllm_llmd.kv_connector.mirror import Change, Mirror
from vllm_llmd.names import BlockName, EngineId, Tier
from vllm_llmd.wire import EngineInfo, Load

log = logging.getLogger(__name__)

HELLO_EVERY_MS: Final = 1000.0
UNSENT_HELLO_EVERY_MS: Final = 100.0
REFUSED_HELLO_EVERY_MS: Final = 5000.0
SEND_QUEUE_MESSAGES: Final = 10_000
GOODBYE_LINGER_MS: Final = 200
IDLE_POLL_MS: Final = 1000.0


@dataclass(frozen=True)
class LinkSettings:
    """What a link needs. How often to send heartbeats is for the router to say (`Welcome.heartbeat_ms`).

    `read_load` is called in the link thread at every heartbeat. `peers` are engines known without a router.
    `on_members` is called in the link thread with the new `members()` whenever they change.
    """

    info: EngineInfo
    routers: tuple[str, ...]
    read_load: Callable[[], Load]
    peers: tuple[EngineInfo, ...] = ()
    on_members: Callable[[Mapping[EngineId, EngineInfo]], None] | None = None


# --- pure: what to say to one router ----------------------------------------------------------------------------


class Say(Enum):
    """What the link may owe a router."""

    HELLO = auto()
    HEARTBEAT = auto()
    SNAPSHOT = auto()


@dataclass
class Dialogue:
    """One router's side of the conversation: what is owed to it, and when. No sockets."""

    info: EngineInfo
    router: str | None = None
    refused: str | None = None
    heartbeat_every_ms: float = 500.0
    hello_due_ms: float = 0.0
    heartbeat_due_ms: float = 0.0

    @property
    def welcomed(self) -> bool:
        """Whether the router knows this engine, so that it should hear of changes."""
        return self.router is not None

    @property
    def next_due_ms(self) -> float:
        return self.heartbeat_due_ms if self.welcomed else self.hello_due_ms

    def due(self, now_ms: float) -> set[Say]:
        """What time alone makes due. Reckons each as said."""
        if now_ms < self.next_due_ms:
            return set()
        if self.welcomed:
            self.heartbeat_due_ms = now_ms + self.heartbeat_every_ms
            return {Say.HEARTBEAT}
        self.hello_due_ms = now_ms + (REFUSED_HELLO_EVERY_MS if self.refused else HELLO_EVERY_MS)
        return {Say.HELLO}

    def hello_unsent(self, now_ms: float) -> None:
        """Nobody is connected yet: the next try comes soon."""
        self.hello_due_ms = now_ms + UNSENT_HELLO_EVERY_MS

    def on(self, message: wire.LinkMessage, now_ms: float) -> set[Say]:
        """What `message` makes due now. Members are the link's own affair and make nothing due."""
        match message:
            case wire.Welcome():
                self.router, self.refused = message.router, None
                self.heartbeat_every_ms = max(float(message.heartbeat_ms), 1.0)
                self.heartbeat_due_ms = now_ms
            case wire.HelloWanted():
                self.router, self.refused = None, None
                self.hello_due_ms = now_ms + HELLO_EVERY_MS
                return {Say.HELLO}
            case wire.SnapshotWanted() if message.epoch == self.info.epoch:
                return {Say.SNAPSHOT}
            case wire.Refused():
                self.router, self.refused = None, message.reason
                self.hello_due_ms = now_ms + REFUSED_HELLO_EVERY_MS
        return set()


def merge_members(peers: Iterable[EngineInfo], lists: Iterable[Sequence[EngineInfo]]) -> Mapping[EngineId, EngineInfo]:
    """Static peers, overridden by every router's latest list; of two that disagree, the later in `lists` counts."""
    members = {peer.id: peer for peer in peers}
    for engines in lists:
        members.update((engine.id, engine) for engine in engines)
    return MappingProxyType(members)


# --- what the engine thread hands over --------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    request: str
    prompt_tokens: int
    names: Sequence[BlockName]


# --- the edge ---------------------------------------------------------------------------------------------------


@dataclass
class _Connection:
    endpoint: str
    socket: "zmq.Socket[bytes]"
    dialogue: Dialogue
    logged: set[str] = field(default_factory=set)

    def send(self, message: wire.Message) -> bool:
        """Sends unless the queue is full or nobody is connected: the sequence shows the gap, a snapshot heals it."""
        try:
            self.socket.send(wire.encode(message), zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def log_once(self, kind: str, text: str, *args: object) -> None:
        if kind not in self.logged:
            self.logged.add(kind)
            log.warning("router %s: " + text, self.endpoint, *args)


class EngineLink:
    """Tells every router what this engine holds and how loaded it is, and learns from them who else there is.

    `publish` and `seen` are for the engine thread: they cost an append, and `publish` a wake-up. `members` is for any
    thread.
    """

    def __init__(
        self,
        settings: LinkSettings,
        clock: Clock | None = None,
        sockets: "zmq.Context[zmq.Socket[bytes]] | None" = None,
    ) -> None:
        """`sockets` is where they come from, and stays open; by default there is one for this link alone.

        Raises ConfigError if a router's endpoint is not one that ZeroMQ can connect to.
        """
        self._settings = settings
        self._clock = clock or MonotonicClock()
        self._queue: deque[Change | Seen] = deque()
        self._lists: dict[str, Sequence[EngineInfo]] = {}
        self._members = merge_members(settings.peers, ())
        self._mirror = Mirror(settings.info)
        self._closing = self._dead = self._draining = self._told_draining = False
        self._context: zmq.Context[zmq.Socket[bytes]] = sockets or zmq.Context()
        self._owns_context = sockets is None
        self._connections: list[_Connection] = []
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        try:
            self._connections.extend(self._connect(endpoint) for endpoint in settings.routers)
        except ConfigError:
            self._release(0)
            raise
        self._poller = zmq.Poller()
        self._poller.register(self._wake_in, zmq.POLLIN)
        for connection in self._connections:
            self._poller.register(connection.socket, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="llmd-link", daemon=True)

    def start(self) -> None:
        """Starts the link thread. Routers may come later."""
        self._thread.start()

    def publish(
        self, cleared: bool, removed: Sequence[BlockName], stored: Sequence[BlockName], tier: Tier = "gpu"
    ) -> None:
        """Tells of a net change of a tier of the prefix cache: clear, then remove, then store. Does not block."""
        if cleared or removed or stored:
            self._hand_over(Change(cleared, removed, stored, tier))
            self._wake()

    def seen(self, request: str, prompt_tokens: int, names: Sequence[BlockName]) -> None:
        """Tells of the block names of a prompt, under the router's name for the request. Does not block.

        It goes with the next change, which the end of the prompt's last step brings, or else the next heartbeat.
        """
        self._hand_over(Seen(request, prompt_tokens, names))

    def members(self) -> Mapping[EngineId, EngineInfo]:
        """Every engine known now: static peers and what the routers published. A value; safe from any thread."""
        return self._members

    def drain(self) -> None:
        """Tells that this engine is about to leave and wants no more requests. Safe in a signal's handler."""
        self._draining = True
        self._wake()

    def close(self) -> None:
        """Says goodbye and stops the thread. Waits a moment at most; a second call does nothing."""
        if self._closing:
            return
        self._closing = True
        if not self._thread.is_alive():
            if not self._dead:
                self._release(0)
            return
        self._wake()
        self._thread.join(timeout=5)

    def _hand_over(self, item: Change | Seen) -> None:
        if not (self._closing or self._dead):
            self._queue.append(item)

    def _wake(self) -> None:
        try:
            self._wake_out.send(b"\0")
        except OSError:  # full: the thread is being woken already; closed: it has ended
            return

    # Everything below runs in the link thread.

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except Exception:
            log.exception("engine %s: the link to the routers has failed", self._settings.info.id)
        finally:
            self._dead = True
            self._queue.clear()
            self._say_goodbye()
            self._release(GOODBYE_LINGER_MS)

    def _turn(self) -> None:
        readable = self._wait()
        now_ms = self._clock.now_ms()
        self._drain_queue()
        if self._draining and not self._told_draining:
            self._told_draining = True
            for connection in self._connections:
                connection.dialogue.heartbeat_due_ms = now_ms
        for connection in self._connections:
            heard = self._receive(connection, now_ms) if connection.socket in readable else set()
            self._pay(connection, heard | connection.dialogue.due(now_ms))

    def _wait(self) -> Collection[object]:
        """Until something is to be done. Which sockets have something to read."""
        now_ms = self._clock.now_ms()
        due_in_ms = [connection.dialogue.next_due_ms - now_ms for connection in self._connections]
        ready = self._poller.poll(math.ceil(max(min([IDLE_POLL_MS, *due_in_ms]), 0.0)))
        readable = [end for end, _ in ready]
        if self._wake_in.fileno() in readable:
            self._wake_in.recv(4096)
        return readable

    def _drain_queue(self) -> None:
        while self._queue:
            item = self._queue.popleft()
            message = self._mirror.change(item) if isinstance(item, Change) else self._seen_message(item)
            for connection in self._connections:
                if connection.dialogue.welcomed:
                    connection.send(message)

    def _seen_message(self, seen: Seen) -> wire.RequestSeen:
        info = self._settings.info
        names = wire.pack_names(seen.names)
        return wire.RequestSeen(info.id, info.epoch, seen.request, seen.prompt_tokens, names)

    def _receive(self, connection: _Connection, now_ms: float) -> set[Say]:
        owed: set[Say] = set()
        while True:
            try:
                frame = connection.socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return owed
            try:
                message = wire.decode_link(frame)
            except WireError as error:
                connection.log_once(type(error).__name__, "message refused: %s", error)
                continue
            if isinstance(message, wire.Refused):
                connection.log_once("Refused", "refuses this engine: %s", message.reason)
            elif isinstance(message, wire.Members):
                self._replace_members(connection.endpoint, message.engines)
            owed |= connection.dialogue.on(message, now_ms)

    def _pay(self, connection: _Connection, owed: set[Say]) -> None:
        info, mirror = self._settings.info, self._mirror
        if Say.HELLO in owed and not connection.send(wire.Hello(info)):
            connection.dialogue.hello_unsent(self._clock.now_ms())
        if Say.SNAPSHOT in owed:
            for part in mirror.snapshot():
                connection.send(part)
        if Say.HEARTBEAT in owed:
            connection.send(mirror.heartbeat(self._settings.read_load(), self._draining))

    def _replace_members(self, endpoint: str, engines: Sequence[EngineInfo]) -> None:
        self._lists.pop(endpoint, None)
        self._lists[endpoint] = engines
        members = merge_members(self._settings.peers, self._lists.values())
        if members == self._members:
            return
        self._members = members
        if self._settings.on_members is not None:
            self._settings.on_members(members)

    def _connect(self, endpoint: str) -> _Connection:
        info = self._settings.info
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.IDENTITY, f"{info.id}#{info.epoch}".encode()[-255:])
        dealer.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues up for a router that is away
        dealer.setsockopt(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
        dealer.setsockopt(zmq.RECONNECT_IVL, 100)
        dealer.setsockopt(zmq.TCP_KEEPALIVE, 1)
        dealer.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        dealer.setsockopt(zmq.LINGER, 0)
        try:
            dealer.connect(endpoint)
        except zmq.ZMQError as error:
            dealer.close()
            raise ConfigError(f"router must be an endpoint like tcp://HOST:5557; got {endpoint!r} ({error})") from None
        return _Connection(endpoint, dealer, Dialogue(info))

    def _say_goodbye(self) -> None:
        for connection in self._connections:
            if connection.dialogue.welcomed:
                connection.send(wire.Goodbye(self._settings.info.id, self._settings.info.epoch))

    def _release(self, linger_ms: int) -> None:
        for connection in self._connections:
            connection.socket.close(linger=linger_ms)
        self._wake_in.close()
        self._wake_out.close()
        if self._owns_context:
            self._context.term()
