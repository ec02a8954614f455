"""What the worker asks of whatever moves bytes: values and a Protocol. Implementations own no policy."""

from dataclasses import dataclass
from enum import Enum
from typing import NewType, Protocol

from vllm_llmd.kv_connector.layout import Runs
from vllm_llmd.wire import Regions

PeerName = NewType("PeerName", str)
"""A connected source rank, as the transport knows it."""

ReadId = NewType("ReadId", int)


SCRATCH_BYTES = 64


class ReadState(Enum):
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class ReadPlan:
    """Copy `remote` runs of `peer` into `local` runs, run by run. `memory` is DRAM or VRAM, of each side."""

    peer: PeerName
    local: Runs
    remote: Runs
    local_memory: str
    remote_memory: str

    @property
    def bytes(self) -> int:
        return int(self.local[:, 1].sum())


class Transport(Protocol):
    """Moves bytes by one-sided reads. Every call is made from one thread.

    A read that has started cannot be taken back: until `poll` answers FINISHED or FAILED, its local runs may change.
    """

    def register(self, regions: Regions, spans: list[tuple[int, int]]) -> None:
        """Make local memory readable and writable; `spans` are (address, bytes) that cover `regions`."""
        ...

    def metadata(self) -> bytes:
        """What a peer needs for `connect`."""
        ...

    def connect(self, metadata: bytes) -> PeerName:
        """Learn a peer. Raises TransferError."""
        ...

    def scratch(self) -> int:
        """Address of `SCRATCH_BYTES` of host memory that peers may read, to warm a connection."""
        ...

    def disconnect(self, peer: PeerName) -> None:
        """Forget a peer, whose reads have all ended."""
        ...

    def start_read(self, plan: ReadPlan) -> ReadId:
        """Begin a read. Raises TransferError if it cannot begin."""
        ...

    def poll(self, read: ReadId) -> ReadState:
        """State of a read; once it is not RUNNING the read is forgotten."""
        ...

    def progress(self) -> None:
        """Let reads by peers go on, where the wire needs the source's help (TCP, shared memory)."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...
