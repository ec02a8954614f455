"""Transport over NIXL (UCX): the only file that imports nixl. Needs no vLLM."""

from typing import Any

import numpy as np

from vllm_llmd.errors import TransferError
from vllm_llmd.kv_connector.transport import SCRATCH_BYTES, PeerName, ReadId, ReadPlan, ReadState
from vllm_llmd.wire import Regions


class NixlTransport:
    """Implements `Transport`. The progress thread stays off: it burns a core per worker, idle or not."""

    def __init__(self, name: str) -> None:
        """`name` must be unique across the fleet and lives. Raises TransferError if NIXL or UCX is missing."""
        try:
            from nixl._api import nixl_agent, nixl_agent_config
        except ImportError as error:
            raise TransferError("NIXL is not installed: pip install 'vllm-llmd[engine]'") from error
        self._agent: Any = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self._scratch = np.zeros(SCRATCH_BYTES, dtype=np.uint8)
        self._registered = [self._agent.register_memory([(self.scratch(), SCRATCH_BYTES, 0, "")], "DRAM")]
        self._reads: dict[ReadId, Any] = {}
        self._next = 0

    def register(self, regions: Regions, spans: list[tuple[int, int]]) -> None:
        rows = [(address, length, regions.device_id, "") for address, length in spans]
        self._registered.append(self._agent.register_memory(rows, regions.memory))

    def metadata(self) -> bytes:
        metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def scratch(self) -> int:
        return int(self._scratch.ctypes.data)

    def connect(self, metadata: bytes) -> PeerName:
        try:
            name = self._agent.add_remote_agent(metadata)
        except Exception as error:  # NIXL's errors share no base that it exports
            raise TransferError(f"NIXL does not accept the peer: {error}") from error
        return PeerName(name.decode() if isinstance(name, bytes) else name)

    def disconnect(self, peer: PeerName) -> None:
        self._agent.remove_remote_agent(peer)

    def start_read(self, plan: ReadPlan) -> ReadId:
        try:
            handle = self._agent.initialize_xfer(
                "READ",
                self._agent.get_xfer_descs(plan.local, plan.local_memory),
                self._agent.get_xfer_descs(plan.remote, plan.remote_memory),
                plan.peer,
            )
            state = self._agent.transfer(handle)
        except Exception as error:  # NIXL's errors share no base that it exports
            raise TransferError(f"NIXL cannot start a read of {plan.bytes} bytes from {plan.peer}: {error}") from error
        if state == "ERR":
            self._agent.release_xfer_handle(handle)
            raise TransferError(f"NIXL cannot start a read of {plan.bytes} bytes from {plan.peer}")
        self._next += 1
        self._reads[ReadId(self._next)] = handle
        return ReadId(self._next)

    def poll(self, read: ReadId) -> ReadState:
        handle = self._reads[read]
        try:
            state = self._agent.check_xfer_state(handle)
        except Exception:  # a peer that died shows as an exception of its own kind
            state = "ERR"
        if state == "PROC":
            return ReadState.RUNNING
        del self._reads[read]
        self._agent.release_xfer_handle(handle)
        return ReadState.FINISHED if state == "DONE" else ReadState.FAILED

    def progress(self) -> None:
        self._agent.get_new_notifs()

    def close(self) -> None:
        while self._registered:
            self._agent.deregister_memory(self._registered.pop())
