"""What the connector counts between two looks of vLLM's metrics hook."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_llmd.kv_connector.lifecycle import LEASE_EXPIRED, Outcome
from vllm_llmd.kv_connector.report import WorkerReport


@dataclass
class TransferCounts:
    """Counts since the last look. Of ranges and blocks the slowest rank counts; bytes are those of all ranks.

    `lead_ms` has one entry per range that arrived before its prefill ended: by how much. `outstanding` orders are told
    when their number has changed.
    """

    bytes_read: int = 0
    bytes_before_end: int = 0
    read_ms: float = 0.0
    ranges: int = 0
    ranges_before_end: int = 0
    orders: int = 0
    orders_failed: int = 0
    blocks_loaded: int = 0
    blocks_missing: int = 0
    blocks_salvaged: int = 0
    leases_expired: int = 0
    prompts_held: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    lead_ms: list[float] = field(default_factory=list)
    outstanding: int | None = None

    def __bool__(self) -> bool:
        return self.outstanding is not None or any(asdict(self).values())

    def read(self, report: WorkerReport) -> None:
        """What one step's report says beside outcomes."""
        self.bytes_read += report.bytes_read
        self.read_ms += report.read_ms
        self.leases_expired += report.leases_expired

    def ended(self, outcomes: Sequence[Outcome]) -> None:
        """What was ordered for a request has ended; `outcomes` are those of every rank."""
        missing = max(len(outcome.missing) for outcome in outcomes)
        loaded = len(outcomes[0].blocks) - missing
        failed = any(outcome.reason is not None for outcome in outcomes)
        self.orders += 1
        self.orders_failed += failed
        self.blocks_loaded += loaded
        self.blocks_missing += missing
        self.blocks_salvaged += loaded if failed else 0
        self.leases_expired += any(outcome.reason == LEASE_EXPIRED for outcome in outcomes)
        self.ranges += min(len(outcome.arrivals) for outcome in outcomes)
        self.ranges_before_end += min(sum(a.before_end for a in outcome.arrivals) for outcome in outcomes)
        for outcome in outcomes:
            early = [arrival for arrival in outcome.arrivals if arrival.before_end]
            self.bytes_before_end += sum(arrival.bytes for arrival in early)
            if outcome.prefill_ended_ms is not None:
                self.lead_ms += [outcome.prefill_ended_ms - arrival.read_ms for arrival in early]

    def to_data(self) -> dict[str, Any]:
        """As it travels to the API server, where the metrics live."""
        return asdict(self)


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two `to_data()` as one, `second` being the later."""
    merged = {key: _sum(value, second[key]) for key, value in first.items() if key != "outstanding"}
    latest = second["outstanding"]
    return {**merged, "outstanding": first["outstanding"] if latest is None else latest}


def _sum(first: Any, second: Any) -> Any:
    if isinstance(first, dict):
        return dict(Counter(first) + Counter(second))
    return first + second
