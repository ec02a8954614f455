"""The connector's counters in the engine's own `/metrics`, through vLLM's hook. Lives in the API server process."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CounterSpec:
    """One Prometheus counter, and where its increments stand in `TransferCounts.to_data()`."""

    key: str
    name: str
    help: str


COUNTERS = (
    CounterSpec("bytes_read", "vllm:llmd_kv_bytes_read", "Bytes of KV cache read from other engines."),
    CounterSpec("read_ms", "vllm:llmd_kv_read_milliseconds", "Time reads were in flight, summed over reads."),
    CounterSpec("ranges", "vllm:llmd_kv_ranges_read", "Ranges of KV blocks read and accepted."),
    CounterSpec(
        "ranges_before_end",
        "vllm:llmd_kv_ranges_read_before_prefill_ended",
        "Ranges that had arrived before the source announced its last one.",
    ),
    CounterSpec("orders", "vllm:llmd_orders", "Remote prefill orders that have ended."),
    CounterSpec("orders_failed", "vllm:llmd_orders_failed", "Orders of which not every block arrived."),
    CounterSpec("blocks_loaded", "vllm:llmd_kv_blocks_loaded", "KV blocks that orders brought."),
    CounterSpec("blocks_missing", "vllm:llmd_kv_blocks_missing", "KV blocks that orders failed to bring."),
)

FALLBACKS = CounterSpec(
    "fallbacks", "vllm:llmd_fallbacks", "Hinted requests that were prefilled here after all, wholly or in part."
)


class Counters:
    """All counters of one API server; `observe` adds what an engine has counted."""

    def __init__(self, counter_type: Any, labelnames: list[str], labelvalues: dict[int, list[object]]) -> None:
        self._labelvalues = labelvalues
        self._counters = {
            spec.key: counter_type(name=spec.name, documentation=spec.help, labelnames=labelnames) for spec in COUNTERS
        }
        self._fallbacks = counter_type(
            name=FALLBACKS.name, documentation=FALLBACKS.help, labelnames=[*labelnames, "reason"]
        )
        for counter in self._counters.values():
            for values in labelvalues.values():
                counter.labels(*values)

    def observe(self, data: dict[str, Any], engine: int) -> None:
        values = self._labelvalues[engine]
        for key, counter in self._counters.items():
            if data[key]:
                counter.labels(*values).inc(data[key])
        for reason, count in data["fallbacks"].items():
            self._fallbacks.labels(*values, reason).inc(count)
