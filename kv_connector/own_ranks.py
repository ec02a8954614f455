"""A way from the engine core to its own worker ranks that waits for no step."""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import zmq

from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.wire import EngineInfo, Members, encode

logger = logging.getLogger(__name__)

NUDGE = b""
"""The frame that ends the wait of a rank."""


@dataclass(frozen=True)
class RankIntroduction:
    """What a worker rank tells the scheduler side at start; by `key` it knows this engine's own words."""

    endpoint: str
    epoch: Epoch
    key: bytes = field(repr=False)


class OwnRanks:
    """Callable from any thread: sockets are made at first use and guarded by a lock. Nothing here blocks."""

    def __init__(self, ranks: Sequence[RankIntroduction]) -> None:
        self._ranks = ranks
        self._lock = threading.Lock()
        self._sockets: list[zmq.Socket[bytes]] = []

    def members_changed(self, members: Mapping[EngineId, EngineInfo]) -> None:
        """Pass the membership on, so that the ranks connect before the first request. An idle engine runs no hook."""
        if self._tell(encode(Members(list(members.values())))):
            logger.warning("llmd worker does not take the membership; it will connect when needed")

    def nudge(self) -> None:
        """Something is here that a step has to take up: ranks that wait for I/O shall end their step now."""
        self._tell(NUDGE)

    def close(self) -> None:
        with self._lock:
            for socket in self._sockets:
                socket.close()
            self._ranks, self._sockets = (), []

    def _tell(self, frame: bytes) -> int:
        """Returns how many ranks did not take it."""
        with self._lock:
            if not self._sockets:
                self._sockets = [_connect(rank) for rank in self._ranks]
            return sum(not _send(socket, frame) for socket in self._sockets)


def _connect(rank: RankIntroduction) -> "zmq.Socket[bytes]":
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, rank.key)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 16)
    socket.connect(rank.endpoint)
    return socket


def _send(socket: "zmq.Socket[bytes]", frame: bytes) -> bool:
    try:
        socket.send(frame, zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True
