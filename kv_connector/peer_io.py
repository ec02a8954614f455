"""The I/O thread of one worker rank: owns its peer sockets and every call of the transport.

Worker-to-worker ZeroMQ sockets carry announcements and renewals and block without polling; the transport carries
bytes alone and is polled only while a read is in flight. The worker's own thread talks to it by `submit`, `take`
and `wait`. It decides nothing: `Exchange` does.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import zmq

from vllm_llmd.clock import Clock
from vllm_llmd.errors import ConfigError, TransferError, WireError
from vllm_llmd.kv_connector.bridge import Bridge, one_run
from vllm_llmd.kv_connector.delivery import SourceEndpoint
from vllm_llmd.kv_connector.exchange import Act, Caller, Exchange, ReadFrom, ToDestination, ToSource
from vllm_llmd.kv_connector.layout import ADDRESSES, check_regions
from vllm_llmd.kv_connector.lifecycle import Drained, Outcome, Unpin
from vllm_llmd.kv_connector.peer_sockets import (
    Callers,
    FleetChanged,
    Greeted,
    Heard,
    Nudged,
    Peer,
    PeerSettings,
    Sources,
)
from vllm_llmd.kv_connector.reads import Ended, Reads
from vllm_llmd.kv_connector.report import WorkerReport
from vllm_llmd.kv_connector.staging import Staging
from vllm_llmd.kv_connector.steps import Fail, Finish, Load, Reader, Ready, Withdraw
from vllm_llmd.kv_connector.topology import HeadSlice, edges, readers_of
from vllm_llmd.kv_connector.transport import SCRATCH_BYTES, PeerName, ReadId, ReadPlan, ReadState, Transport
from vllm_llmd.wire import Greeting, PeerMessage, Refused, Regions

logger = logging.getLogger(__name__)

READ_POLL_S = 0.0005
"""How often a running read is polled: often enough not to show, rarely enough to leave the cores to the model."""

STUCK_READ_MS = 1000.0
"""Reads are stuck if none has started for so long."""

STUCK_POLL_MS = 20
"""How often reads are polled, or helped along, that are stuck: their source is stalled or gone, or was so."""

SERVE_POLL_MS = 1
"""How often reads by others are helped along, and step events polled."""

WARM_UP_MS = 1000.0
"""How long a source helps a new peer to make its connection."""

IDLE_POLL_MS = 1000
BUSY_TICK_MS = 50
"""How often deadlines are looked at while any order is alive."""

Command = Load | Ready | Withdraw | Fail | Finish


@dataclass(frozen=True)
class CacheAccess:
    """How this rank's cache is read and written: the transport it is registered with, where it lies, and staging.

    `prepare_staging` does what would delay the first use of the staging area; it may take seconds.
    """

    transport: Transport
    regions: Regions
    new_staging: Callable[[], Staging]
    prepare_staging: Callable[[], None]


class PeerIo:
    """Start it once; `endpoint` is where other ranks find this one."""

    def __init__(self, settings: PeerSettings, cache: CacheAccess, clock: Clock) -> None:
        self._me = settings.me
        self._geometry = settings.geometry
        self._transport = cache.transport
        self._regions = cache.regions
        self._clock = clock
        self._exchange = Exchange()
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._report = WorkerReport()
        self._report_lock = threading.Lock()
        self._something = threading.Event()
        self._nudged = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._callers = Callers(self._context, settings)
        self._callers.greeting = Greeting(
            engine=settings.me.engine,
            epoch=settings.me.epoch,
            fingerprint=settings.fingerprint,
            agent=cache.transport.metadata(),
            regions=cache.regions,
            scratch=cache.transport.scratch(),
        )
        self.endpoint = self._callers.endpoint
        self.own_key = self._callers.own_key
        self._sources = Sources(self._context, self._poller, settings)
        self._reads = Reads(cache.transport, cache.regions, cache.new_staging)
        self._bridges: dict[tuple[SourceEndpoint, HeadSlice | None], Bridge] = {}
        self._warming: dict[ReadId, PeerName] = {}
        self._prepare_staging = cache.prepare_staging
        self._preparing = False
        self._leaving: set[SourceEndpoint] = set()
        self._retired: set[PeerName] = set()
        self._help_until_ms = 0.0
        self._read_started_ms = 0.0
        self._unfinished_steps: list[Ready] = []
        self._poller.register(self._callers.socket, zmq.POLLIN)
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="llmd-peer-io", daemon=True)

    # --- called from the worker's thread ----------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, commands: Iterable[Command]) -> None:
        """Hand work over; returns at once."""
        for command in commands:
            self._commands.put(command)
        os.eventfd_write(self._wake_fd, 1)

    def take(self) -> WorkerReport | None:
        """What has happened since the last call, or None."""
        if not self._something.is_set():
            return None
        with self._report_lock:
            report, self._report = self._report, WorkerReport()
            self._something.clear()
        return report or None

    def take_nudge(self) -> bool:
        """Whether the engine core has asked for haste since the last call."""
        if not self._nudged.is_set():
            return False
        self._nudged.clear()
        return True

    def wait(self, timeout_ms: float) -> None:
        """Block until there is something to take, or the engine core asks for haste, or for `timeout_ms`."""
        self._something.wait(timeout_ms / 1000)

    def check(self) -> None:
        """Raises TransferError if the thread has died: nothing that waits for it would ever end."""
        if not self._thread.is_alive():
            raise TransferError("the KV transfer thread died; its last words are in the log above")

    def close(self) -> None:
        self._commands.put(None)
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join(timeout=2)

    # --- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception:
            logger.exception("llmd peer I/O of %s rank %d died", self._me.engine, self._me.rank)
        finally:
            self._context.destroy(linger=0)
            self._transport.close()

    def _turn(self) -> bool:
        ready = dict(self._poller.poll(self._poll_ms()))
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
        if not self._obey():
            return False
        if self._callers.socket in ready:
            self._hear_callers()
        for endpoint, message in self._sources.hear(ready):
            self._hear_source(endpoint, message)
        self._announce_finished_steps()
        self._poll_reads()
        if self._exchange.being_read or self._exchange.lingering or self._helping():
            self._transport.progress()
        if self._exchange.busy or self._exchange.lingering:
            self._tick()
        if self._leaving or self._retired:
            self._part()
        return True

    def _tick(self) -> None:
        before = self._exchange.expired
        self._do(self._exchange.tick(self._now()))
        if self._exchange.expired > before:
            with self._report_lock:
                self._report.leases_expired += self._exchange.expired - before
            self._something.set()

    def _poll_ms(self) -> int:
        if self._reads.active or self._warming:
            if self._now() - self._read_started_ms > STUCK_READ_MS:
                return STUCK_POLL_MS
            time.sleep(READ_POLL_S)
            return 0
        if self._exchange.being_read or self._unfinished_steps or self._helping():
            return SERVE_POLL_MS
        if self._exchange.lingering:
            return STUCK_POLL_MS
        return BUSY_TICK_MS if self._exchange.busy else IDLE_POLL_MS

    def _helping(self) -> bool:
        """Whether a peer is warming its connection to us, which needs our help."""
        return self._now() < self._help_until_ms

    def _now(self) -> float:
        return self._clock.now_ms()

    def _obey(self) -> bool:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return True
            match command:
                case None:
                    return False
                case Load():
                    self._load(command)
                case Ready():
                    self._unfinished_steps.append(command)
                case Withdraw(reader=reader, order=order, reason=reason):
                    for caller in self._ranks_of(reader):
                        self._do(self._exchange.withdrawn(caller, order, reason))
                case Fail(order=order, reason=reason):
                    self._do(self._exchange.failed(order, reason, self._now()))
                case Finish(order=order):
                    self._do(self._exchange.source_finished(order, self._now()))

    def _ranks_of(self, reader: Reader) -> list[Caller]:
        """The ranks of an engine that read from this one."""
        between = edges(self._geometry.tp, reader.tp, self._geometry.kv_heads)
        return [Caller(reader.engine, reader.epoch, rank) for rank in readers_of(self._me.rank, between)]

    def _load(self, command: Load) -> None:
        peers = [(each, self._sources.reach(each.endpoint)) for each in command.expected]
        self._do(self._exchange.load(command.expected, self._now()))
        for each, peer in peers:
            if peer.epoch is not None and peer.epoch != each.epoch:
                self._do(self._exchange.failed(each.spec.order, "source restarted", self._now()))

    # --- messages ---------------------------------------------------------------------------------------------

    def _hear_callers(self) -> None:
        for event in self._callers.hear():
            match event:
                case Greeted(caller):
                    self._help_until_ms = self._now() + WARM_UP_MS
                    self._do(self._exchange.greeted(caller))
                case Heard(caller, message):
                    self._do(self._exchange.from_destination(caller, message, self._now()))
                case FleetChanged(endpoints, reorders):
                    if reorders and not self._preparing:
                        self._preparing = True
                        threading.Thread(target=self._prepare_staging, name="llmd-prepare", daemon=True).start()
                    for endpoint in endpoints:
                        self._sources.reach(endpoint)
                    self._leaving = set(self._sources.endpoints - endpoints)
                case Nudged():
                    self._nudged.set()
                    self._something.set()

    def _hear_source(self, endpoint: SourceEndpoint, message: PeerMessage | WireError) -> None:
        match message:
            case Greeting():
                try:
                    self._connect(self._sources.reach(endpoint), message)
                except (TransferError, ConfigError) as error:
                    self._lose(endpoint, str(error))
            case Refused(reason=reason):
                self._lose(endpoint, reason)
                self._leaving.add(endpoint)
            case WireError():
                self._lose(endpoint, str(message))
            case _:
                self._do(self._exchange.from_source(endpoint, message, self._now()))

    def _connect(self, peer: Peer, greeting: Greeting) -> None:
        """Learn how to read from a peer, and read a few bytes: the first read of all makes the wire ready."""
        check_regions(greeting.regions)
        if not 0 <= greeting.scratch < ADDRESSES:
            raise ConfigError(f"impossible address: {greeting.scratch}")
        if peer.name is not None and peer.epoch != greeting.epoch:
            self._lose(peer.endpoint, "source restarted")
            self._retired.add(peer.name)
        peer.name = self._transport.connect(greeting.agent)
        peer.regions, peer.epoch = greeting.regions, greeting.epoch
        self._forget_bridges(peer.endpoint)
        local, remote = one_run(self._transport.scratch(), SCRATCH_BYTES), one_run(greeting.scratch, SCRATCH_BYTES)
        self._read_started_ms = self._now()
        self._warming[self._transport.start_read(ReadPlan(peer.name, local, remote, "DRAM", "DRAM"))] = peer.name

    def _lose(self, endpoint: SourceEndpoint, reason: str) -> None:
        logger.error("llmd peer %s: %s", endpoint, reason)
        self._do(self._exchange.source_lost(endpoint, reason, self._now()))

    def _part(self) -> None:
        """Forget ranks that are gone, have restarted or refuse us, once nothing is read from them any more.

        The next order to such a rank starts afresh.
        """
        for endpoint in [endpoint for endpoint in self._leaving if not self._exchange.reads_from(endpoint)]:
            self._leaving.discard(endpoint)
            if endpoint in self._sources.endpoints:
                name = self._sources.leave(endpoint)
                self._forget_bridges(endpoint)
                self._retired |= set() if name is None else {name}
        reading = self._reads.peers | set(self._warming.values())
        for name in self._retired - reading:
            self._retired.discard(name)
            self._transport.disconnect(name)

    def _forget_bridges(self, endpoint: SourceEndpoint) -> None:
        self._bridges = {key: bridge for key, bridge in self._bridges.items() if key[0] != endpoint}

    # --- steps and reads --------------------------------------------------------------------------------------

    def _announce_finished_steps(self) -> None:
        """Announce in order; a range is announced only after the step that wrote it has passed on its stream."""
        while self._unfinished_steps and self._unfinished_steps[0].step_done():
            step = self._unfinished_steps.pop(0)
            for planned in step.ranges:
                for caller in self._ranks_of(planned.reader):
                    self._do(self._exchange.ready(caller, planned.message, planned.lease_ms, self._now()))

    def _poll_reads(self) -> None:
        for read in list(self._warming):
            if self._transport.poll(read) is not ReadState.RUNNING:
                del self._warming[read]
        if self._reads.active:
            for ended in self._reads.poll(self._now()):
                self._read_ended(ended)

    def _read_ended(self, ended: Ended) -> None:
        if ended.ok:
            with self._report_lock:
                self._report.read(ended.bytes, ended.read_ms - ended.started_ms)
            self._something.set()
        act = ended.act
        self._do(self._exchange.read_finished(act.strand, act.read.seq, ended.bytes, ended.ok, ended.read_ms))

    def _start_read(self, act: ReadFrom) -> None:
        peer = self._sources.reach(act.endpoint)
        self._read_started_ms = self._now()
        try:
            if peer.name is None or peer.regions is None:
                raise TransferError(f"{act.endpoint} announced blocks before it greeted")
            work = self._bridge(act, peer.regions).plan(act.read.cells, act.read.first_layer, act.read.end_layer)
            self._reads.start(act, peer.name, peer.regions.memory, work, self._read_started_ms)
        except (TransferError, ConfigError) as error:
            logger.error("llmd order %s: %s", act.read.order, error)
            self._do(self._exchange.read_finished(act.strand, act.read.seq, 0, False, self._now()))

    def _bridge(self, act: ReadFrom, theirs: Regions) -> Bridge:
        key = (act.endpoint, act.read.heads)
        if key not in self._bridges:
            self._bridges[key] = Bridge(self._regions, theirs, act.read.heads)
        return self._bridges[key]

    def _do(self, acts: list[Act]) -> None:
        for act in acts:
            match act:
                case ToSource(endpoint, message):
                    self._sources.send(endpoint, message)
                case ToDestination(caller, message):
                    self._callers.send(caller, message)
                case ReadFrom():
                    self._start_read(act)
                case Outcome() | Drained() | Unpin():
                    with self._report_lock:
                        self._report.add(act)
                    self._something.set()
