"""What the connector counts between two looks of vLLM's metrics hook."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_llmd.kv_connector.lifecycle import Outcome
from vllm_llmd.kv_connector.report import WorkerReport


@dataclass
class TransferCounts:
    """Counters since the last look. Of ranges and blocks the slowest rank counts; bytes are those of all ranks."""

    bytes_read: int = 0
    read_ms: float = 0.0
    ranges: int = 0
    ranges_before_end: int = 0
    orders: int = 0
    orders_failed: int = 0
    blocks_loaded: int = 0
    blocks_missing: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(asdict(self).values())

    def read(self, report: WorkerReport) -> None:
        """Bytes of one step's report."""
        self.bytes_read += report.bytes_read
        self.read_ms += report.read_ms

    def ended(self, outcomes: Sequence[Outcome]) -> None:
        """An order has ended; `outcomes` are those of every rank."""
        missing = max(len(outcome.missing) for outcome in outcomes)
        self.orders += 1
        self.orders_failed += any(outcome.reason is not None for outcome in outcomes)
        self.ranges += min(outcome.ranges for outcome in outcomes)
        self.ranges_before_end += min(outcome.ranges_before_end for outcome in outcomes)
        self.blocks_loaded += outcomes[0].blocks - missing
        self.blocks_missing += missing

    def to_data(self) -> dict[str, Any]:
        """As it travels to the API server, where the metrics live."""
        return asdict(self)
