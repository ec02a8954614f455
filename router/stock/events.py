"""The thread that receives the KV events of all stock engines and names their blocks.

It owns its sockets and the followers. What changes is put into an outbox, which the event loop applies to the index in
its own time; while the outbox is full the thread waits, and ZeroMQ keeps what comes.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import zmq

from vllm_llmd.clock import Clock
from vllm_llmd.kernels.kv_events_plain import Change
from vllm_llmd.names import EngineId
from vllm_llmd.router.stock.settings import Rank
from vllm_llmd.router.stock.stream import Stream
from vllm_llmd.router.zmq_receive import Socket, receiver

log = logging.getLogger(__name__)

POLL_MS: Final = 50
OUTBOX_NAMES: Final = 1_000_000
OUTBOX_WAIT_S: Final = 0.0005


@dataclass(frozen=True)
class Posted:
    """What changed at an engine. `block_size` is None until an event has told it."""

    engine: EngineId
    change: Change
    block_size: int | None

    @property
    def names(self) -> int:
        return len(self.change.removed) + len(self.change.stored)


class Outbox:
    """From the events thread to the event loop. `wake` is called, by the thread, when something lies in it."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._posted: deque[Posted] = deque()
        self._lock = threading.Lock()
        self._names = 0

    @property
    def full(self) -> bool:
        return self._names >= OUTBOX_NAMES

    def put(self, posted: Posted) -> None:
        with self._lock:
            self._posted.append(posted)
            self._names += posted.names
        self._wake()

    def take(self) -> Posted | None:
        """The oldest, or None."""
        with self._lock:
            if not self._posted:
                return None
            posted = self._posted.popleft()
            self._names -= posted.names
            return posted


class StockEvents:
    """Started at once, ended by `close`. Every method but those of the thread itself may be called from the loop."""

    def __init__(self, outbox: Outbox, clock: Clock) -> None:
        self._outbox = outbox
        self._clock = clock
        self._context: zmq.Context[Socket] = zmq.Context()
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._poller = zmq.Poller()
        self._receiver = receiver()
        self._listening: dict[Socket, Stream] = {}
        self.streams: dict[EngineId, Stream] = {}
        self._thread = threading.Thread(target=self._run, name="stock-events", daemon=True)
        self._thread.start()

    def follow(self, rank: Rank, blocks: int) -> None:
        """From an empty cache of so many blocks on: whatever the engine remembers of its events is asked for."""
        self._orders.put(lambda: self._follow(rank, blocks))

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._turn()
        except Exception:
            log.exception("the thread that follows stock engines has failed: their blocks are not indexed any more")
        finally:
            for stream in self.streams.values():
                stream.close()
            self._context.term()

    def _turn(self) -> None:
        while not self._orders.empty():
            self._orders.get()()
        self._listen()
        ready = self._poller.poll(POLL_MS)
        now_ms = self._clock.now_ms()
        for socket, _ in ready:
            stream = self._listening[socket]
            self._post(stream, stream.receive(now_ms))
        for stream in self.streams.values():
            self._post(stream, stream.tick(now_ms))
        while self._outbox.full and not self._closing.is_set():
            time.sleep(OUTBOX_WAIT_S)

    def _follow(self, rank: Rank, blocks: int) -> None:
        stream = self.streams.get(rank.id)
        if stream is None:
            stream = self.streams[rank.id] = Stream(rank, self._context, self._receiver)
        stream.follower.expect(blocks)
        stream.resync(self._clock.now_ms())

    def _listen(self) -> None:
        """Polls the sockets that matter now."""
        wanted = {stream.listening: stream for stream in self.streams.values()}
        if wanted.keys() == self._listening.keys():
            return
        for socket in self._listening.keys() - wanted.keys():
            self._poller.unregister(socket)
        for socket in wanted.keys() - self._listening.keys():
            self._poller.register(socket, zmq.POLLIN)
        self._listening = wanted

    def _post(self, stream: Stream, changes: Iterable[Change]) -> None:
        for change in changes:
            self._outbox.put(Posted(stream.rank.id, change, stream.follower.block_size))
