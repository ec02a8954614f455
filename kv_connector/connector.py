"""The facade that vLLM sees: translates its hooks to the scheduler side and the worker side, and nothing else."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from vllm_llmd.kv_connector import device_memory, vllm_compat
from vllm_llmd.kv_connector.addresses import own_host, own_http
from vllm_llmd.kv_connector.layout import Memory
from vllm_llmd.kv_connector.metrics import Metrics, MetricTypes
from vllm_llmd.kv_connector.own_ranks import RankIntroduction
from vllm_llmd.kv_connector.report import WorkerReport
from vllm_llmd.kv_connector.scheduler_side import SchedulerSide
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.stats import merge
from vllm_llmd.kv_connector.steps import StepPlan
from vllm_llmd.kv_connector.vllm_facts import read_facts, warn_of_what_should_differ
from vllm_llmd.kv_connector.worker_side import NOTHING, CacheMemory, RankFacts, WorkerSide, draw_epoch
from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.settings import read_engine_settings


@dataclass
class StepMetadata(KVConnectorMetadata):
    """A StepPlan on its way to the workers; None if there is nothing to tell."""

    plan: StepPlan | None = None


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
        return TransferStats(data=merge(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        return {key: value for key, value in self.data.items() if isinstance(value, int | float) and value}

    def is_empty(self) -> bool:
        return not self.data


class TransferMetrics(KVConnectorPromMetrics):
    """Puts TransferStats into the engine's `/metrics`."""

    def __init__(self, config: Any, metric_types: Any, labelnames: list[str], values: dict[int, list[object]]) -> None:
        super().__init__(config, metric_types, labelnames, values)
        types = MetricTypes(self._counter_cls, self._gauge_cls, self._histogram_cls)
        self._metrics = Metrics(types, labelnames, values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        self._metrics.observe(transfer_stats_data, engine_idx)


class LlmdConnector(KVConnectorBase_V1, SupportsHMA):
    """Joins a vLLM engine to the fleet. Configured by `--kv-transfer-config`; see README.md."""

    _cache_hit_source = vllm_compat.CACHE_HIT_SOURCE

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            warn_of_what_should_differ(vllm_config)
            vllm_compat.remember_manager()
        vllm_compat.spin_briefly()
        self._settings = read_engine_settings(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._facts = read_facts(vllm_config, kv_cache_config, self._settings)
        self._one_group = len(self._facts.geometry.groups) == 1
        self._layer_numbers = {layer.name: number for number, layer in enumerate(self._facts.layers)}
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._results = NOTHING
        if role == KVConnectorRole.SCHEDULER:
            http = own_http(self._settings)
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
        self._scheduling.bind(vllm_compat.BlockPoolView(kv_cache_manager))

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """What vLLM 0.29 calls in place of `bind_kv_cache_manager`."""
        self.bind_kv_cache_manager(vllm_compat.manager_of(gpu_block_pool))

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        self._scheduling.introduce([metadata[rank].introduction for rank in sorted(metadata)])

    def on_new_request(self, request: Any) -> None:
        self._scheduling.new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens = self._scheduling.tokens_to_load(request, num_computed_tokens)
        return tokens, bool(tokens)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """All groups: a request's own blocks are what is moved."""
        return tuple(range(len(self._facts.geometry.groups)))

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._scheduling.allocated(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return StepMetadata(self._scheduling.plan_step(scheduler_output.num_scheduled_tokens) or None)

    def update_connector_output(self, connector_output: Any) -> None:
        metadata = connector_output.kv_connector_worker_meta
        report = metadata.report if isinstance(metadata, ReportMetadata) else None
        self._scheduling.take_report(report, connector_output.finished_recving or ())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduling.request_finished(request)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduling.request_finished(request)

    def take_events(self) -> Iterable[Any]:
        return self._scheduling.take_events()

    def reset_cache(self) -> bool:
        """This connector keeps no cache of its own; one beside it may."""
        self._scheduling.offloaded_cleared()
        return True

    def has_pending_push_work(self) -> bool:
        return self._scheduling.keep_stepping

    # --- worker side ------------------------------------------------------------------------------------------

    @property
    def _working(self) -> WorkerSide:
        assert self._worker is not None, "a worker-side hook was called before register_kv_caches"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        facts = self._facts
        layers = vllm_compat.layer_views(kv_caches, facts.layers, facts.num_blocks)
        caches = [kv_caches[layer.name] for layer in facts.layers]
        kind, device_id = device_memory.device_of(caches[0])
        new_staging, prepare_staging = device_memory.staging_for(caches)
        cache = CacheMemory(
            layers=tuple(layers),
            spans=tuple(device_memory.storage_spans(caches)),
            memory=Memory(facts.num_blocks, kind, device_id),
            mark_step=device_memory.step_marker(kind),
            new_staging=new_staging,
            prepare_staging=prepare_staging,
        )
        rank = RankFacts(
            engine=EngineId(facts.id),
            rank=vllm_compat.tensor_rank(),
            epoch=Epoch(vllm_compat.agree(draw_epoch())),
            fingerprint=facts.fingerprint,
            geometry=facts.geometry,
            host=own_host(self._settings),
        )
        self._worker = WorkerSide(rank, cache, Seal(self._settings.secret))

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return HandshakeMetadata(self._working.introduction())

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        if connector_metadata.plan is not None:
            self._working.begin_step(connector_metadata.plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: loads start in `bind_connector_metadata`, before the forward."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request runs only when all its KV is there."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are read from where they are; only that the layer is written is of interest, if layers stream."""
        self._working.layer_done(self._layer_numbers[layer_name])

    def wait_for_save(self) -> None:
        """Nothing: blocks stay where they are."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        _, received = self.get_finished(finished_req_ids)
        failed: set[str] = set() if self._one_group else set(self._results.failed)
        return vllm_compat.transfer_results(received, failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str]]:
        """What vLLM 0.29 calls in place of `get_transfer_results`."""
        self._results = self._working.end_step()
        return None, set(self._results.received)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """What has not arrived, block by block; with several groups vLLM can only be told of whole requests."""
        return self._results.missing_blocks if self._one_group else set()

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
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """All layers of a block side by side: a block is then one run to read, whatever the number of layers.

        MLA keeps vLLM's own choice: on CPU its kernel takes no other.
        """
        settings = read_engine_settings(vllm_config.kv_transfer_config.kv_connector_extra_config)
        return None if vllm_config.model_config.use_mla or settings.layout == "any" else settings.layout

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Layers are told of one by one from within the forward, which a whole graph would skip."""
        return extra_config.get("stream") == "layers"

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
