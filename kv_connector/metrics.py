"""The connector's metrics in the engine's own `/metrics`, through vLLM's hook. Lives in the API server process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MetricSpec:
    """One Prometheus metric, and where what it counts stands in `TransferCounts.to_data()`."""

    key: str
    name: str
    help: str


COUNTERS = (
    MetricSpec("bytes_read", "vllm:llmd_kv_bytes_read", "Bytes of KV cache read from other engines."),
    MetricSpec(
        "bytes_before_end",
        "vllm:llmd_kv_bytes_read_before_prefill_ended",
        "Bytes accepted that had arrived before the source announced its last range.",
    ),
    MetricSpec("read_ms", "vllm:llmd_kv_read_milliseconds", "Time reads were in flight, summed over reads."),
    MetricSpec("ranges", "vllm:llmd_kv_ranges_read", "Ranges of KV blocks read and accepted."),
    MetricSpec(
        "ranges_before_end",
        "vllm:llmd_kv_ranges_read_before_prefill_ended",
        "Ranges that had arrived before the source announced its last one.",
    ),
    MetricSpec("orders", "vllm:llmd_orders", "Requests whose remote prefill has ended, well or not."),
    MetricSpec("orders_failed", "vllm:llmd_orders_failed", "Of these, those of which not every block arrived."),
    MetricSpec("blocks_loaded", "vllm:llmd_kv_blocks_loaded", "KV blocks that orders brought."),
    MetricSpec("blocks_missing", "vllm:llmd_kv_blocks_missing", "KV blocks that orders failed to bring."),
    MetricSpec(
        "blocks_salvaged", "vllm:llmd_kv_blocks_salvaged", "KV blocks that orders brought although they failed."
    ),
    MetricSpec(
        "leases_expired", "vllm:llmd_leases_expired", "Leases that ran out, on orders placed here and served here."
    ),
    MetricSpec(
        "prompts_held",
        "vllm:llmd_prompts_held",
        "Steps in which a prompt that had been begun stood still for one due earlier, summed over prompts.",
    ),
)

FALLBACKS = MetricSpec(
    "fallbacks", "vllm:llmd_fallbacks", "Hinted requests that were prefilled here after all, wholly or in part."
)
REFUSED = MetricSpec("refused", "vllm:llmd_orders_refused", "Orders of other engines that were refused here.")
OUTSTANDING = MetricSpec("outstanding", "vllm:llmd_orders_outstanding", "Requests that wait for their remote prefill.")
LEAD = MetricSpec(
    "lead_ms", "vllm:llmd_kv_range_lead_seconds", "How long before its prefill ended a range had arrived."
)
LEAD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

METRICS = (*COUNTERS, FALLBACKS, REFUSED, OUTSTANDING, LEAD)


@dataclass(frozen=True)
class MetricTypes:
    """vLLM's stand-ins for prometheus_client's types: it swaps them where metrics live elsewhere."""

    counter: Any
    gauge: Any
    histogram: Any


class Metrics:
    """All metrics of one API server; `observe` adds what an engine has counted."""

    def __init__(self, types: MetricTypes, labelnames: Sequence[str], labelvalues: Mapping[int, list[object]]) -> None:
        names = list(labelnames)
        self._labelvalues = labelvalues
        self._counters = {
            spec.key: types.counter(name=spec.name, documentation=spec.help, labelnames=names) for spec in COUNTERS
        }
        self._by_reason = {
            spec.key: types.counter(name=spec.name, documentation=spec.help, labelnames=[*names, "reason"])
            for spec in (FALLBACKS, REFUSED)
        }
        self._outstanding = types.gauge(
            name=OUTSTANDING.name, documentation=OUTSTANDING.help, labelnames=names, multiprocess_mode="mostrecent"
        )
        self._lead = types.histogram(
            name=LEAD.name, documentation=LEAD.help, labelnames=names, buckets=list(LEAD_BUCKETS)
        )
        for metric in (*self._counters.values(), self._outstanding, self._lead):
            for values in labelvalues.values():
                metric.labels(*values)

    def observe(self, data: Mapping[str, Any], engine: int) -> None:
        values = self._labelvalues[engine]
        for key, counter in self._counters.items():
            if data[key]:
                counter.labels(*values).inc(data[key])
        for key, counter in self._by_reason.items():
            for reason, count in data[key].items():
                counter.labels(*values, reason).inc(count)
        for lead_ms in data["lead_ms"]:
            self._lead.labels(*values).observe(lead_ms / 1000)
        if data["outstanding"] is not None:
            self._outstanding.labels(*values).set(data["outstanding"])
