"""What a worker rank tells its scheduler after a step: orders that ended, ranges to unpin, counts."""

from collections import Counter
from dataclasses import dataclass, field

from vllm_llmd.kv_connector.lifecycle import Drained, Outcome, Unpin
from vllm_llmd.names import OrderId


@dataclass
class WorkerReport:
    """Of one rank, or, merged, of all of them. `unpinned` counts ranks per (order, range)."""

    outcomes: list[Outcome] = field(default_factory=list)
    drained: list[Drained] = field(default_factory=list)
    unpinned: Counter[tuple[OrderId, int]] = field(default_factory=Counter)
    bytes_read: int = 0
    read_ms: float = 0.0
    leases_expired: int = 0

    def __bool__(self) -> bool:
        return self != WorkerReport()

    def add(self, what: Outcome | Drained | Unpin) -> None:
        match what:
            case Outcome():
                self.outcomes.append(what)
            case Drained():
                self.drained.append(what)
            case Unpin(order=order, seqs=seqs):
                self.unpinned.update((order, seq) for seq in seqs)

    def read(self, n_bytes: int, ms: float) -> None:
        self.bytes_read += n_bytes
        self.read_ms += ms

    def merge(self, other: "WorkerReport") -> "WorkerReport":
        """Both reports as one; neither is changed."""
        return WorkerReport(
            outcomes=self.outcomes + other.outcomes,
            drained=self.drained + other.drained,
            unpinned=self.unpinned + other.unpinned,
            bytes_read=self.bytes_read + other.bytes_read,
            read_ms=self.read_ms + other.read_ms,
            leases_expired=self.leases_expired + other.leases_expired,
        )
