"""Passes the fleet's membership on to this engine's own worker ranks."""

import logging
from collections.abc import Mapping, Sequence

import zmq

from vllm_llmd.names import EngineId
from vllm_llmd.wire import EngineInfo, Members, encode

logger = logging.getLogger(__name__)


class Warmer:
    """Passes the membership on to this engine's own ranks, so that they connect before the first request.

    Lives in the link thread: an idle engine core runs no hook.
    """

    def __init__(self, workers: Sequence[str]) -> None:
        self._workers = workers
        self._sockets: list[zmq.Socket[bytes]] = []

    def members_changed(self, members: Mapping[EngineId, EngineInfo]) -> None:
        if not self._sockets:
            self._sockets = [self._connect(endpoint) for endpoint in self._workers]
        frame = encode(Members(list(members.values())))
        for socket in self._sockets:
            try:
                socket.send(frame, zmq.NOBLOCK)
            except zmq.Again:
                logger.warning("llmd worker does not take the membership; it will connect when needed")

    def _connect(self, endpoint: str) -> "zmq.Socket[bytes]":
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, b"link")
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 16)
        socket.connect(endpoint)
        return socket
