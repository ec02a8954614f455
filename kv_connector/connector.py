"""The facade that vLLM sees: translates its hooks to the scheduler side and the worker side, and nothing else."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from vllm_llmd.kv_connector import vllm_compat
from vllm_llmd.kv_connector.metrics import Counters
from vllm_llmd.kv_connector.report import WorkerReport
from vllm_llmd.kv_connector.scheduler_side import RankIntroduction, SchedulerSide
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.steps import StepPlan
from vllm_llmd.kv_connector.worker_side import CacheMemory, RankFacts, Results, WorkerSide, draw_epoch
from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.settings import read_engine_settings


@dataclass
class StepMetadata(KVConnectorMetadata):
    """A StepPlan on its way to the workers."""

    plan: StepPlan = field(default_factory=StepPlan)


@dataclass
class ReportMetadata(KVConnectorWorkerMetadata):
    """A WorkerReport on its way to the scheduler."""

    report: WorkerReport

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        return ReportMetadata(self.report.merge(other.report))


@dataclass
class HandshakeMetadata(KVConnectorHandshakeMetadata):
    """A rank's introduction on its way to the scheduler."""

    introduction: RankIntroduction


class TransferStats(KVConnectorStats):
    """TransferCounts on their way to the API server; `data` is `TransferCounts.to_data()`."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        if not self.data or not other.data:
            return self if self.data else other
        merged = {key: self.data[key] + other.data[key] for key in self.data if key != "fallbacks"}
        fallbacks = dict(self.data["fallbacks"])
        for reason, count in other.data["fallbacks"].items():
            fallbacks[reason] = fallbacks.get(reason, 0) + count
        return TransferStats(data={**merged, "fallbacks": fallbacks})

    def reduce(self) -> dict[str, int | float]:
        return {key: value for key, value in self.data.items() if key != "fallbacks" and value}

    def is_empty(self) -> bool:
        return not self.data


class TransferMetrics(KVConnectorPromMetrics):
    """Puts TransferStats into the engine's `/metrics`."""

    def __init__(self, config: Any, metric_types: Any, labelnames: list[str], values: dict[int, list[object]]) -> None:
        super().__init__(config, metric_types, labelnames, values)
        self._counters = Counters(self._counter_cls, labelnames, values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        self._counters.observe(transfer_stats_data, engine_idx)


class LlmdConnector(KVConnectorBase_V1):
    """Joins a vLLM engine to the fleet. Configured by `--kv-transfer-config`; see README.md."""

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        vllm_compat.spin_briefly()
        self._settings = read_engine_settings(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._facts = vllm_compat.read_facts(vllm_config, kv_cache_config, self._settings)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._results = Results()
        if role == KVConnectorRole.SCHEDULER:
            vllm_compat.warn_of_what_should_differ(vllm_config)
            http = vllm_compat.own_http(self._settings)
            self._scheduler = SchedulerSide(self._facts, self._settings, http)

    @property
    def requires_kv_delivery(self) -> bool:
        """A preempted source request may end: what was announced is pinned, and its destination recomputes the rest."""
        return False

    # --- scheduler side ---------------------------------------------------------------------------------------

    @property
    def _scheduling(self) -> SchedulerSide:
        assert self._scheduler is not None, "a scheduler-side hook was called on a worker's connector"
        return self._scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._scheduling.bind(vllm_compat.BlockPoolView(kv_cache_manager))

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        self._scheduling.introduce([metadata[rank].introduction for rank in sorted(metadata)])

    def on_new_request(self, request: Any) -> None:
        self._scheduling.new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens = self._scheduling.tokens_to_load(request, num_computed_tokens)
        return tokens, tokens > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._scheduling.allocated(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return StepMetadata(self._scheduling.plan_step(scheduler_output.num_scheduled_tokens))

    def update_connector_output(self, connector_output: Any) -> None:
        metadata = connector_output.kv_connector_worker_meta
        report = metadata.report if isinstance(metadata, ReportMetadata) else None
        self._scheduling.take_report(report, connector_output.finished_recving or ())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduling.request_finished(request)

    def take_events(self) -> Iterable[Any]:
        return self._scheduling.take_events()

    def has_pending_push_work(self) -> bool:
        return self._scheduling.keep_stepping

    # --- worker side ------------------------------------------------------------------------------------------

    @property
    def _working(self) -> WorkerSide:
        assert self._worker is not None, "a worker-side hook was called before register_kv_caches"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        caches = list(kv_caches.values())
        memory, device_id = vllm_compat.device_of(caches[0])
        cache = CacheMemory(
            views=tuple(vllm_compat.tensor_view(tensor) for tensor in caches),
            spans=tuple(vllm_compat.storage_spans(caches)),
            memory=memory,
            device_id=device_id,
        )
        facts = RankFacts(
            engine=EngineId(self._facts.id),
            rank=vllm_compat.tensor_rank(),
            epoch=Epoch(vllm_compat.agree(draw_epoch())),
            fingerprint=self._facts.fingerprint,
            host=vllm_compat.own_host(self._settings),
            num_blocks=self._facts.num_blocks,
        )
        mark_step = vllm_compat.step_marker(memory)
        self._worker = WorkerSide(facts, cache, Seal(self._settings.secret), mark_step)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return HandshakeMetadata(RankIntroduction(self._working.endpoint, self._working.epoch))

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        self._working.begin_step(connector_metadata.plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: loads start in `bind_connector_metadata`, before the forward."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request runs only when all its KV is there."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are read from where they are."""

    def wait_for_save(self) -> None:
        """Nothing: blocks stay where they are."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        self._results = self._working.end_step()
        return KVConnectorTransferResults(finished_recving=set(self._results.received))

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._results.missing_blocks

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = self._results.report
        return None if report is None else ReportMetadata(report)

    # --- both -------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        counts = None if self._scheduler is None else self._scheduler.take_counts()
        return None if counts is None else TransferStats(data=counts.to_data())

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return TransferStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return TransferMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()
