"""The router's end of the link to engines: one ROUTER socket, whose messages feed the fleet. Decides nothing.

Messages are taken by the turn rather than one by one through the event loop, which would cost as much as all the rest.
"""

import asyncio
import logging
from collections.abc import Iterable
from typing import Final

import zmq

from vllm_llmd import wire
from vllm_llmd.errors import ConfigError, UnknownVersionError, WireError
from vllm_llmd.router.fleet import Fleet, Reply, Sender
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.zmq_receive import receiver

log = logging.getLogger(__name__)

TICK_S: Final = 0.1
MESSAGES_PER_TURN: Final = 64
COMPLAINTS_KEPT: Final = 10_000


class Ingest:
    """Receives until cancelled. A message that cannot be used costs one log line per peer and kind."""

    def __init__(self, fleet: Fleet, metrics: Metrics, bind: str) -> None:
        """Binds at once. Raises ConfigError if it cannot."""
        self._fleet = fleet
        self._metrics = metrics
        self._complaints: dict[tuple[Sender, str], None] = {}
        self._readable = asyncio.Event()
        self._receiver = receiver()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # an engine that connects again is the same engine
        self._socket.setsockopt(zmq.RCVHWM, 100_000)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"bind must be a free endpoint like tcp://HOST:5557; got {bind!r} ({error})") from None

    @property
    def endpoint(self) -> str:
        """Where engines connect, with the port that was really taken."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def run(self) -> None:
        """Feeds the fleet for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._receive())
            tasks.create_task(self._tick())

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()

    async def _receive(self) -> None:
        loop, descriptor = asyncio.get_running_loop(), int(self._socket.getsockopt(zmq.FD))
        loop.add_reader(descriptor, self._readable.set)
        try:
            while True:
                self._readable.clear()
                if self._take_some() == MESSAGES_PER_TURN:
                    await asyncio.sleep(0)  # a flood of messages must not starve requests
                else:
                    await self._readable.wait()
        finally:
            loop.remove_reader(descriptor)

    def _take_some(self) -> int:
        """Takes in what has come, up to a turn's worth. Returns how many messages that were."""
        messages = self._receiver.receive_ends(self._socket, MESSAGES_PER_TURN)
        for frames, sender, body in messages:
            self._take(frames, sender, body)
        return len(messages)

    def _take(self, frames: int, sender: Sender, body: bytes) -> None:
        """`frames` counts the sender's name in; there are none of a message that is too large."""
        try:
            if frames != 2:
                raise WireError(f"a message is one frame; got {frames - 1}" if frames else "a message is too large")
            replies = self._fleet.on_message(sender, wire.decode_link(body))
        except WireError as error:
            self._complain(sender, type(error).__name__, str(error))
            if isinstance(error, UnknownVersionError):
                self._post(sender, wire.encode(wire.Refused(str(error))))
            return
        self._send(replies)

    async def _tick(self) -> None:
        while True:
            self._send(self._fleet.tick())
            self._send(self._fleet.members_to_publish())
            self._readable.set()  # sending may have swallowed the descriptor's word that something has come
            await asyncio.sleep(TICK_S)

    def _send(self, replies: Iterable[Reply]) -> None:
        """A message that goes to many is encoded once, and lies in memory once."""
        message, frame = None, b""
        for reply in replies:
            if reply.message is not message:
                message, frame = reply.message, wire.encode(reply.message)
            if isinstance(reply.message, wire.SnapshotWanted):
                self._metrics.snapshots_asked.labels(reply.message.reason).inc()
                log.info("engine %s: asked for a snapshot (%s)", _shown(reply.to), reply.message.reason)
            elif isinstance(reply.message, wire.Refused):
                self._complain(reply.to, "Refused", reply.message.reason)
            self._post(reply.to, frame)

    def _post(self, to: Sender, frame: bytes) -> None:
        """Never blocks: what an engine does not read in time is dropped, and it will ask or be asked again."""
        self._socket.send_multipart([to, frame], zmq.DONTWAIT, copy=False)

    def _complain(self, sender: Sender, kind: str, text: str) -> None:
        self._metrics.wire_errors.labels(kind).inc()
        if (sender, kind) in self._complaints:
            return
        self._complaints[sender, kind] = None
        if len(self._complaints) > COMPLAINTS_KEPT:
            del self._complaints[next(iter(self._complaints))]
        log.warning("engine %s: message refused: %s", _shown(sender), text)


def _shown(sender: Sender) -> str:
    return sender.decode("utf-8", "backslashreplace")
