"""The router's metrics. Owns its own registry, so that several routers can live in one process."""

from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from vllm_llmd.names import TIERS
from vllm_llmd.router.autoscaling.observe import ReplicasCollector
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.learning.truth import Trust
from vllm_llmd.router.members.health import Circuit
from vllm_llmd.router.members.membership import Engine, State
from vllm_llmd.router.slo import Band, band
from vllm_llmd.router.waiting.bodies import Bodies
from vllm_llmd.router.waiting.flow import Flow

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_ERROR_BUCKETS = (-16_384, -4096, -1024, -256, -64, -1, 0, 64, 256, 1024, 4096, 16_384)
"""What is between -1 and 0 was predicted exactly."""

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class _FleetCollector(Collector):
    """Reads the fleet when scraped."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        engines = self._fleet.membership.all()
        states = Tally(engine.state for engine in engines)
        by_state = GaugeMetricFamily("vllm_llmd_engines", "Engines by state", labels=["state"])
        for state in State:
            if state is not State.GONE:
                by_state.add_metric([state.value], states[state])
        yield by_state
        yield from self._health()
        yield from self._index(engines)
        yield from self._truth(engines)
        yield from self._models(engines)
        yield GaugeMetricFamily(
            "vllm_llmd_sessions", "Sessions named by clients and remembered", value=float(len(self._fleet.sessions))
        )
        yield GaugeMetricFamily(
            "vllm_llmd_text_chunks", "Entries in the text index", value=float(len(self._fleet.texts))
        )

    def _index(self, engines: Sequence[Engine]) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        blocks = GaugeMetricFamily("vllm_llmd_index_blocks", "Blocks in the prefix index", labels=["engine", "tier"])
        for engine, tier in product(engines, TIERS):
            held = self._fleet.index.contents(engine.info.id, tier).blocks
            if held or tier == "gpu":
                blocks.add_metric([engine.info.id, tier], held)
        yield blocks
        without = GaugeMetricFamily(
            "vllm_llmd_index_blocks_without_room", "Blocks that the prefix index has no room for", labels=["engine"]
        )
        for engine in engines:
            without.add_metric([engine.info.id], self._fleet.index.without_room(engine.info.id))
        yield without
        repaired = CounterMetricFamily(
            "vllm_llmd_index_blocks_repaired", "Blocks that a snapshot put right in the index", labels=["engine"]
        )
        for engine_id, count in self._fleet.repaired.items():
            repaired.add_metric([engine_id], count)
        yield repaired

    def _truth(self, engines: Sequence[Engine]) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        untold = CounterMetricFamily(
            "vllm_llmd_answers_without_cached_tokens",
            "Answers that did not say how much of the prompt was cached",
            labels=["engine"],
        )
        trusted = GaugeMetricFamily(
            "vllm_llmd_index_trusted", "Whether the index is believed as it is for the engine", labels=["engine"]
        )
        for engine in engines:
            standing = self._fleet.truth.standing(engine.info.id)
            if standing is not None:
                untold.add_metric([engine.info.id], standing.untold)
                trusted.add_metric([engine.info.id], float(standing.state is not Trust.OBSERVED))
        yield untold
        yield trusted
        names = CounterMetricFamily(
            "vllm_llmd_exact_names",
            "Prompts whose names were computed here and told by an engine",
            labels=["result"],
        )
        for result, count in self._fleet.agreement.counts.items():
            names.add_metric([result], count)
        yield names

    def _models(self, engines: Sequence[Engine]) -> Iterator[GaugeMetricFamily]:
        wrong = GaugeMetricFamily(
            "vllm_llmd_model_error",
            "Mean absolute natural logarithm of expected over measured time; 0.1 is about a tenth off",
            labels=["engine", "what", "by"],
        )
        for engine in engines:
            for believed in self._fleet.models.believed(engine.info.id):
                wrong.add_metric([engine.info.id, believed.what, believed.by], believed.errors[believed.by])
        yield wrong

    def _health(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        draining = GaugeMetricFamily(
            "vllm_llmd_engine_draining", "Whether the engine gets no new requests", labels=["engine"]
        )
        closed = GaugeMetricFamily(
            "vllm_llmd_engine_circuit_closed", "Whether the engine's circuit is closed", labels=["engine"]
        )
        for engine in self._fleet.membership.all():
            draining.add_metric([engine.info.id], float(engine.draining))
            circuit = self._fleet.health.standing(engine.info.id).circuit
            closed.add_metric([engine.info.id], float(circuit is Circuit.CLOSED))
        yield draining
        yield closed
        opened = CounterMetricFamily(
            "vllm_llmd_circuits_opened", "Circuits of engines opened", labels=["engine", "reason"]
        )
        for (engine_id, reason), count in self._fleet.health.opened.items():
            opened.add_metric([engine_id, reason.value], count)
        yield opened


def _queued(flow: Flow, label: Band) -> float:
    return sum(count for priority, count in flow.by_priority().items() if band(priority) == label)


class Metrics:
    """Every counter that the router's edges raise."""

    def __init__(self, fleet: Fleet) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_FleetCollector(fleet))
        self._registry.register(ReplicasCollector(fleet))
        self._counter = partial(Counter, registry=self._registry)
        self._gauge = partial(Gauge, registry=self._registry)
        self._histogram = partial(Histogram, registry=self._registry)
        self._count_answers()
        self._count_failures()
        self._count_waiting()
        self._count_records()

    def _count_answers(self) -> None:
        """What clients got, and what was thought of it before."""
        self.requests = self._counter("vllm_llmd_requests", "Requests answered", ["engine", "code"])
        self.inflight = self._gauge("vllm_llmd_inflight_requests", "Requests being served")
        self.ttft_seconds = self._histogram(
            "vllm_llmd_ttft_seconds",
            "Time from a request's arrival to the first byte of its answer",
            buckets=_TTFT_BUCKETS,
        )
        self.objectives = self._counter(
            "vllm_llmd_objectives",
            "Objectives that clients named for streams, and whether they were kept",
            ["objective", "kept"],
        )
        self.predicted_cached_tokens = self._counter(
            "vllm_llmd_predicted_cached_tokens", "Prompt tokens expected in the cache of the chosen engine"
        )
        self.prediction_error_tokens = self._histogram(
            "vllm_llmd_prediction_error_tokens",
            "Prompt tokens predicted to be cached less those that were; negative where too few were predicted",
            ["engine", "by"],
            buckets=_ERROR_BUCKETS,
        )
        self.source_hints = self._counter(
            "vllm_llmd_source_hints", "Requests whose KV another engine should supply", ["source"]
        )
        self.cancelled = self._counter("vllm_llmd_cancelled_requests", "Requests whose client went away")
        self.exact_prompts = self._counter(
            "vllm_llmd_exact_prompts", "Prompts given as text that were to be tokenized", ["result"]
        )

    def _count_failures(self) -> None:
        """What engines have failed at."""
        self.retries = self._counter(
            "vllm_llmd_engine_failures", "Attempts that failed before the first byte", ["engine"]
        )
        self.retries_refused = self._counter("vllm_llmd_retries_refused", "Retries that were not within the budget")
        self.broken_streams = self._counter("vllm_llmd_broken_streams", "Answers that broke off midway", ["engine"])
        self.continued_streams = self._counter(
            "vllm_llmd_continued_streams", "Streams that broke and were continued on another engine", ["result"]
        )

    def _count_waiting(self) -> None:
        """Who waits in the router."""
        self.queue_wait_seconds = self._histogram(
            "vllm_llmd_queue_wait_seconds",
            "How long requests that had to wait in the router did so before they were sent to an engine",
            ["band"],
            buckets=_TTFT_BUCKETS,
        )
        self.shed = self._counter(
            "vllm_llmd_shed_requests", "Requests refused, or sent away from the queue", ["band", "reason"]
        )
        self.held = self._counter(
            "vllm_llmd_held_requests", "Requests that waited for one engine though others had room"
        )
        self.preempted = self._counter(
            "vllm_llmd_preempted_requests",
            "Attempts at engines given up so that more urgent requests had room",
            ["engine"],
        )
        self._queued = self._gauge("vllm_llmd_queued_requests", "Requests that wait in the router", ["band"])
        self._body_bytes = self._gauge("vllm_llmd_body_bytes", "Bytes of request bodies that the router holds")
        self._queued_bytes = self._gauge("vllm_llmd_queued_bytes", "Bytes of bodies that wait in the router")

    def _count_records(self) -> None:
        """What is recorded, and what engines have told."""
        self.decisions_recorded = self._counter("vllm_llmd_decisions_recorded", "Decisions written to the recording")
        self.decisions_lost = self._counter("vllm_llmd_decisions_lost", "Decisions that could not be recorded")
        self.snapshots_asked = self._counter("vllm_llmd_snapshots_asked", "Snapshots asked of engines", ["reason"])
        self.wire_errors = self._counter("vllm_llmd_wire_errors", "Messages that could not be used", ["kind"])

    def watch_queue(self, flow: Flow) -> None:
        """Exposes who waits in it."""
        for label in get_args(Band):
            self._queued.labels(label).set_function(partial(_queued, flow, label))
        self._queued_bytes.set_function(lambda: flow.size_bytes)

    def watch_bodies(self, bodies: Bodies) -> None:
        """Exposes how much is held of them."""
        self._body_bytes.set_function(lambda: bodies.size_bytes)

    def add(self, collector: Collector) -> None:
        """Exposes more."""
        self._registry.register(collector)

    def exposition(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self._registry)
