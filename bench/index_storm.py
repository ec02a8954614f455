"""Many engines' block changes at a steady rate, from a process of its own, over real sockets.

Run as a script, it joins engines that each hold so many blocks, waits for a line on its input, then changes them in
turn: each message takes the oldest blocks away and stores as many new ones. At the end it says when it sent what.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import zmq
from index_fleet import EPOCH, info

from vllm_llmd import wire
from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.names import EngineId

BLOCK_SIZE = 16
HEARTBEAT_EVERY_S = 0.5
NAP_S = 0.0005


@dataclass(frozen=True)
class Storm:
    """`events_per_s` are blocks stored and blocks removed, of all engines together."""

    router: str
    engines: int
    resident: int
    events_per_message: int
    events_per_s: int
    seconds: float

    @property
    def messages(self) -> int:
        """Of each engine."""
        return int(self.events_per_s * self.seconds / self.events_per_message / self.engines)


class Engine:
    """One engine's end: a DEALER socket, and the names that it holds one after another."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", number: int, storm: Storm) -> None:
        self.info = info(number, BLOCK_SIZE, storm.resident)
        self._each = storm.events_per_message // 2
        self._resident = storm.resident
        count = storm.resident + storm.messages * self._each
        self._names: Names = np.random.default_rng(number).integers(1, 2**64, count, np.uint64)
        self.seq = 0
        self._digest = int(np.bitwise_xor.reduce(self._names[: storm.resident]))
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, self.info.id.encode())
        self._socket.connect(storm.router)
        self._send(wire.Hello(self.info))

    def change(self) -> None:
        first, self.seq = self.seq * self._each, self.seq + 1
        removed = self._names[first : first + self._each]
        stored = self._names[first + self._resident : first + self._resident + self._each]
        self._digest ^= int(np.bitwise_xor.reduce(removed) ^ np.bitwise_xor.reduce(stored))
        self._send(wire.BlocksChanged(self.info.id, EPOCH, self.seq, False, removed.tobytes(), stored.tobytes()))

    def heartbeat(self) -> None:
        self._send(wire.Heartbeat(self.info.id, EPOCH, self.seq, self._resident, self._digest, wire.Load()))

    def answer(self) -> bool:
        """Takes in what has come. Whether the router has been told what the engine holds."""
        told = False
        while self._socket.poll(0):
            if isinstance(wire.decode_link(self._socket.recv()), wire.SnapshotWanted):
                first = self.seq * self._each
                held = self._names[first : first + self._resident]
                self._send(wire.Snapshot(self.info.id, EPOCH, self.seq, 0, 1, held.tobytes()))
                told = True
        return told

    def _send(self, message: wire.Message) -> None:
        self._socket.send(wire.encode(message))


class Sent:
    """When each engine's changes were sent, in nanoseconds of the monotonic clock, by sequence number from 1."""

    def __init__(self, engines: list[Engine]) -> None:
        self.at_ns: dict[EngineId, list[int]] = {engine.info.id: [] for engine in engines}

    def change(self, engine: Engine) -> None:
        self.at_ns[engine.info.id].append(time.monotonic_ns())
        engine.change()


def join(engines: list[Engine]) -> None:
    waiting = set(range(len(engines)))
    while waiting:
        waiting = {number for number in waiting if not engines[number].answer()}
        time.sleep(0.01)


def rage(engines: list[Engine], storm: Storm) -> Sent:
    """Sends every change when it is due, and heartbeats."""
    sent, began, done = Sent(engines), time.monotonic(), 0
    last, heartbeat_due_s = storm.messages * len(engines), 0.0
    while done < last:
        now_s = time.monotonic() - began
        due = min(int(now_s * storm.events_per_s / storm.events_per_message), last)
        for number in range(done, due):
            sent.change(engines[number % len(engines)])
        done = due
        if now_s >= heartbeat_due_s:
            heartbeat_due_s = now_s + HEARTBEAT_EVERY_S
            for engine in engines:
                engine.answer()
                engine.heartbeat()
        time.sleep(NAP_S)
    return sent


class Raging:
    """The other process, joined."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def start(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def sent(self) -> dict[EngineId, list[int]]:
        """Waits for the end."""
        assert self._process.stdout is not None
        said: dict[EngineId, list[int]] = json.loads(self._process.stdout.readline())
        return said


@contextmanager
def storm_apart(storm: Storm) -> Iterator[Raging]:
    """The engines in a fresh process, for as long as the context lasts."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    argv, environ = [sys.executable, __file__, json.dumps(asdict(storm))], os.environ | {"PYTHONPATH": paths}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ) as process:
        try:
            yield Raging(process)
        finally:
            process.communicate()


def main() -> None:
    storm = Storm(**json.loads(sys.argv[1]))
    with zmq.Context() as context:
        engines = [Engine(context, number, storm) for number in range(storm.engines)]
        join(engines)
        sys.stdin.readline()
        sent = rage(engines, storm)
        sys.stdout.write(json.dumps(sent.at_ns) + "\n")
        sys.stdout.flush()
        sys.stdin.read()
        context.destroy(linger=0)


if __name__ == "__main__":
    main()
