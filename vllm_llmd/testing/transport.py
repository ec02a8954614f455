"""A transport inside one process: reads are plain copies, and the test decides when they finish, and how."""

import ctypes
from collections.abc import Callable

import numpy as np

from vllm_llmd.errors import TransferError
from vllm_llmd.kv_connector.transport import SCRATCH_BYTES, PeerName, ReadId, ReadPlan, ReadState
from vllm_llmd.wire import Regions


class FakeTransport:
    """Implements `Transport`. By default a read finishes at its first poll; `hold` keeps reads running."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._scratch = np.zeros(SCRATCH_BYTES, dtype=np.uint8)
        self._peers: set[PeerName] = set()
        self._reads: dict[ReadId, ReadPlan] = {}
        self._next = 0
        self.hold: Callable[[ReadPlan], bool] = lambda plan: False
        """Reads for which it is true stay RUNNING."""
        self.fail: Callable[[ReadPlan], bool] = lambda plan: False
        """Reads for which it is true end as FAILED."""
        self.registered: list[tuple[int, int]] = []
        self.closed = False

    def register(self, regions: Regions, spans: list[tuple[int, int]]) -> None:
        self.registered += spans

    def metadata(self) -> bytes:
        return self._name.encode()

    def connect(self, metadata: bytes) -> PeerName:
        if not metadata or not metadata.isascii():
            raise TransferError("a peer's metadata must be its name")
        peer = PeerName(metadata.decode())
        self._peers.add(peer)
        return peer

    def scratch(self) -> int:
        return int(self._scratch.ctypes.data)

    def disconnect(self, peer: PeerName) -> None:
        self._peers.discard(peer)

    def start_read(self, plan: ReadPlan) -> ReadId:
        if plan.peer not in self._peers:
            raise TransferError(f"{plan.peer} is not connected")
        self._next += 1
        self._reads[ReadId(self._next)] = plan
        return ReadId(self._next)

    def poll(self, read: ReadId) -> ReadState:
        plan = self._reads[read]
        if self.hold(plan):
            return ReadState.RUNNING
        del self._reads[read]
        if self.fail(plan):
            return ReadState.FAILED
        for (to, length, _), (source, _, _) in zip(plan.local.tolist(), plan.remote.tolist(), strict=True):
            ctypes.memmove(to, source, length)
        return ReadState.FINISHED

    def progress(self) -> None:
        """Copies need no help."""

    def close(self) -> None:
        self.closed = True
