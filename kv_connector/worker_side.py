"""The connector inside a worker: hands each step's plan to the I/O thread, and its reports to vLLM."""

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_llmd.clock import MonotonicClock
from vllm_llmd.kv_connector.exchange import Caller
from vllm_llmd.kv_connector.layout import TensorView, pack_regions, regions_of
from vllm_llmd.kv_connector.lifecycle import CANCELLED
from vllm_llmd.kv_connector.nixl_transport import NixlTransport
from vllm_llmd.kv_connector.peer_io import Command, PeerIo
from vllm_llmd.kv_connector.peer_sockets import PeerSettings
from vllm_llmd.kv_connector.report import WorkerReport
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.steps import LoadOrder, Ready, StepPlan
from vllm_llmd.names import EngineId, Epoch, RequestId

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankFacts:
    """Who this rank is."""

    engine: EngineId
    rank: int
    epoch: Epoch
    fingerprint: str
    host: str
    num_blocks: int


@dataclass(frozen=True)
class CacheMemory:
    """The rank's KV cache: one view per layer, the storages below them, and where they are."""

    views: tuple[TensorView, ...]
    spans: tuple[tuple[int, int], ...]
    memory: str
    device_id: int


@dataclass
class Results:
    """What vLLM wants to know after a step."""

    received: set[RequestId] = field(default_factory=set)
    missing_blocks: set[int] = field(default_factory=set)
    report: WorkerReport | None = None


def draw_epoch() -> Epoch:
    return Epoch(secrets.randbits(63))


class WorkerSide:
    """One rank. `begin_step` runs before the forward, `end_step` after it has been launched."""

    def __init__(self, facts: RankFacts, cache: CacheMemory, seal: Seal, mark_step: Callable[[], Callable[[], bool]]):
        regions = [region for view in cache.views for region in regions_of(view, facts.num_blocks)]
        packed = pack_regions(regions, facts.num_blocks, cache.device_id, cache.memory)
        transport = NixlTransport(f"{facts.engine}:{facts.epoch}:{facts.rank}")
        transport.register(packed, list(cache.spans))
        me = Caller(facts.engine, facts.epoch, facts.rank)
        settings = PeerSettings(me, facts.fingerprint, facts.host, seal)
        self.epoch = facts.epoch
        self._rank = facts.rank
        self._mark_step = mark_step
        self._io = PeerIo(settings, transport, packed, MonotonicClock())
        self._io.start()
        self._plan = StepPlan()
        logger.info("llmd worker %s rank %d at %s", facts.engine, facts.rank, self._io.endpoint)

    @property
    def endpoint(self) -> str:
        return self._io.endpoint

    def begin_step(self, plan: StepPlan) -> None:
        """Loads start before the forward does, so that reads and compute overlap."""
        self._plan = plan
        commands: list[Command] = [LoadOrder(load.endpoints[self._rank], load.epoch, load.spec) for load in plan.loads]
        commands += [*plan.withdrawals, *plan.failures, *plan.finishes]
        if commands:
            self._io.submit(commands)

    def end_step(self) -> Results:
        """Announces what this step makes ready; waits a moment for I/O if the step computed nothing."""
        plan, self._plan = self._plan, StepPlan()
        if plan.ranges:
            self._io.submit([Ready(tuple(plan.ranges), self._mark_step())])
        report = self._io.take()
        if report is None and plan.wait_ms:
            self._io.wait(plan.wait_ms)
            report = self._io.take()
        self._io.check()
        return Results() if report is None else _results(report)

    def close(self) -> None:
        self._io.close()


def _results(report: WorkerReport) -> Results:
    results = Results(report=report)
    for outcome in report.outcomes:
        results.received.add(outcome.request)
        if outcome.reason != CANCELLED:
            results.missing_blocks.update(outcome.missing)
    return results
