"""The connector inside a worker: hands each step's plan to the I/O thread, and its reports to vLLM."""

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from vllm_llmd.clock import MonotonicClock
from vllm_llmd.kv_connector.exchange import Caller, Expect
from vllm_llmd.kv_connector.layout import LayerView, Memory, pack_regions
from vllm_llmd.kv_connector.nixl_transport import NixlTransport
from vllm_llmd.kv_connector.own_ranks import RankIntroduction
from vllm_llmd.kv_connector.peer_io import CacheAccess, Command, PeerIo
from vllm_llmd.kv_connector.peer_sockets import PeerSettings
from vllm_llmd.kv_connector.report import WorkerReport
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.staging import Staging
from vllm_llmd.kv_connector.steps import Load, PlannedOrder, PlannedRange, Ready, StepPlan
from vllm_llmd.kv_connector.topology import edges, sources_of
from vllm_llmd.names import EngineId, Epoch, RequestId
from vllm_llmd.wire import Geometry

logger = logging.getLogger(__name__)

STEPS_AFTER_LOAD = 2
STEPS_AFTER_NUDGE = 3
"""How many steps wait for nothing, from the one that tells of a load's end, or in which a nudge arrives: vLLM plans a
step ahead, so the one that takes up what has come is the next but one. A nudge may come while that one is planned."""


@dataclass(frozen=True)
class RankFacts:
    """Who this rank is."""

    engine: EngineId
    rank: int
    epoch: Epoch
    fingerprint: str
    geometry: Geometry
    host: str


@dataclass(frozen=True)
class CacheMemory:
    """The rank's KV cache: a view per layer, the storages below them, where they are, and what is peculiar to there.

    `mark_step` marks this point of the device's stream; its answer tells whether the device has passed it.
    """

    layers: tuple[LayerView, ...]
    spans: tuple[tuple[int, int], ...]
    memory: Memory
    mark_step: Callable[[], Callable[[], bool]]
    new_staging: Callable[[], Staging]
    prepare_staging: Callable[[], None]


@dataclass
class Results:
    """What vLLM wants to know after a step. `failed` are requests of which something is missing."""

    received: set[RequestId] = field(default_factory=set)
    failed: set[RequestId] = field(default_factory=set)
    missing_blocks: set[int] = field(default_factory=set)
    report: WorkerReport | None = None


NOTHING = Results()


def draw_epoch() -> Epoch:
    return Epoch(secrets.randbits(63))


class WorkerSide:
    """One rank. `begin_step` runs before the forward, `layer_done` within it, `end_step` after it has been launched."""

    def __init__(self, facts: RankFacts, cache: CacheMemory, seal: Seal):
        regions = pack_regions(cache.layers, cache.memory)
        transport = NixlTransport(f"{facts.engine}:{facts.epoch}:{facts.rank}")
        transport.register(regions, list(cache.spans))
        me = Caller(facts.engine, facts.epoch, facts.rank)
        settings = PeerSettings(me, facts.fingerprint, facts.geometry, facts.host, seal)
        self.epoch = facts.epoch
        self._rank = facts.rank
        self._geometry = facts.geometry
        self._mark_step = cache.mark_step
        access = CacheAccess(transport, regions, cache.new_staging, cache.prepare_staging)
        self._io = PeerIo(settings, access, MonotonicClock())
        self._io.start()
        self._ranges: list[PlannedRange] = []
        self._wait_ms = 0.0
        self._haste = 0
        logger.info("llmd worker %s rank %d at %s", facts.engine, facts.rank, self._io.endpoint)

    def introduction(self) -> RankIntroduction:
        return RankIntroduction(self._io.endpoint, self.epoch, self._io.own_key)

    def begin_step(self, plan: StepPlan) -> None:
        """Loads start before the forward does, so that reads and compute overlap."""
        commands: list[Command] = [Load(self._expected(orders)) for orders in plan.loads]
        commands += [*plan.withdrawals, *plan.failures, *plan.finishes]
        if plan.cached:
            commands.append(Ready(tuple(plan.cached), self._mark_step()))
        if commands:
            self._io.submit(commands)
        self._ranges = sorted(plan.ranges, key=lambda planned: planned.message.end_layer or inf)
        self._wait_ms = plan.wait_ms

    def layer_done(self, layer: int) -> None:
        """The forward has written one layer: announce what became ready with it."""
        ready = 0
        while ready < len(self._ranges) and 0 < self._ranges[ready].message.end_layer <= layer + 1:
            ready += 1
        if ready:
            self._announce(ready)

    def end_step(self) -> Results:
        """Announces what this step makes ready; waits for I/O if the step computes nothing and there is no haste."""
        if self._ranges:
            self._announce(len(self._ranges))
        report = self._take()
        if report is None and self._wait_ms and not self._haste:
            self._io.wait(self._wait_ms)
            report = self._take()
        self._haste = max(self._haste - 1, 0)
        self._wait_ms = 0.0
        self._io.check()
        return NOTHING if report is None else _results(report)

    def _take(self) -> WorkerReport | None:
        report = self._io.take()
        if self._io.take_nudge():
            self._haste = STEPS_AFTER_NUDGE
        elif report is not None and report.outcomes:
            self._haste = max(self._haste, STEPS_AFTER_LOAD)
        return report

    def _announce(self, count: int) -> None:
        ready, self._ranges = self._ranges[:count], self._ranges[count:]
        self._io.submit([Ready(tuple(ready), self._mark_step())])

    def _expected(self, orders: Sequence[PlannedOrder]) -> tuple[Expect, ...]:
        """What of a request's orders comes to this rank, and from which ranks."""
        expected = []
        for part, order in enumerate(orders):
            between = edges(len(order.endpoints), self._geometry.tp, self._geometry.kv_heads)
            for edge in sources_of(self._rank, between):
                spec = replace(order.spec, heads=edge.heads)
                expected.append(Expect(order.endpoints[edge.source], order.epoch, part, spec))
        return tuple(expected)

    def close(self) -> None:
        self._io.close()


def _results(report: WorkerReport) -> Results:
    results = Results(report=report)
    for outcome in report.outcomes:
        results.received.add(outcome.request)
        if outcome.failed:
            results.failed.add(outcome.request)
            results.missing_blocks.update(outcome.missing)
    return results
