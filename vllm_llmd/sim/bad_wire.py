"""A ZeroMQ context whose sockets lose, double, delay and reorder what passes through them, when told to.

Sits below the engine's end of the link, which knows nothing of it. By number of messages rather than by time, so that
a seed decides what happens to which message.
"""

import random
from collections import Counter, deque
from typing import Any

import zmq

from vllm_llmd.sim.failures import WireFaults

DELAYED_MESSAGES = 8
"""A message that is delayed lets up to so many others pass."""


class Lane:
    """One direction of a connection: messages go in, and come out as the faults will have it. Pure."""

    def __init__(self, rng: random.Random, happened: Counter[str]) -> None:
        self._rng = rng
        self._happened = happened
        self._held: list[tuple[int, bytes]] = []

    def pass_on(self, frame: bytes, faults: WireFaults) -> list[bytes]:
        """What comes out after this frame has gone in."""
        out: list[bytes] = []
        match self._fault(faults):
            case "drop":
                pass
            case "duplicate":
                out += [frame, frame]
            case "delay":
                self._held.append((self._rng.randint(2, DELAYED_MESSAGES), frame))
            case "reorder":
                self._held.append((1, frame))
            case _:
                out.append(frame)
        due = [held for left, held in self._held if left <= 1] if out else []
        if out:
            self._held = [(left - 1, held) for left, held in self._held if left > 1]
        return out + due

    def _fault(self, faults: WireFaults) -> str | None:
        at = self._rng.random()
        for name in ("drop", "duplicate", "delay", "reorder"):
            at -= getattr(faults, name)
            if at < 0:
                self._happened[name] += 1
                return name
        return None


class _BadSocket(zmq.Socket[bytes]):
    _wire: "BadWire | None" = None
    _out: Lane | None = None
    _into: Lane | None = None
    _arrived: "deque[bytes] | None" = None

    def __init__(self, wire: "BadWire", socket_type: int) -> None:
        super().__init__(wire, socket_type)
        assert wire.rng is not None and wire.happened is not None
        self._wire = wire
        self._out, self._into = Lane(wire.rng, wire.happened), Lane(wire.rng, wire.happened)
        self._arrived = deque()

    def send(self, data: Any, flags: int = 0, *args: Any, **more: Any) -> Any:
        assert self._wire is not None and self._out is not None
        for frame in self._out.pass_on(data, self._wire.faults):
            super().send(frame, flags, *args, **more)

    def recv(self, flags: int = 0, *args: Any, **more: Any) -> Any:
        assert self._wire is not None and self._into is not None and self._arrived is not None
        while not self._arrived:
            frame = super().recv(flags, *args, **more)
            self._arrived.extend(self._into.pass_on(frame, self._wire.faults))
        return self._arrived.popleft()


class BadWire(zmq.Context[zmq.Socket[bytes]]):
    """Shares everything with the context that it is made of. `faults` may change at any time, from any thread."""

    # What is not an attribute of the class counts as an option of ZeroMQ's.
    faults: WireFaults = WireFaults()
    happened: Counter[str] | None = None
    rng: random.Random | None = None
    _socket_class = _BadSocket

    def __init__(self, shared: "zmq.Context[zmq.Socket[bytes]]", rng: random.Random) -> None:
        super().__init__(shadow=shared)
        self.rng = rng
        self.happened = Counter()
