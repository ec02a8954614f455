"""vLLM's offloading to CPU memory for engines that compute on the CPU too, where vLLM itself refuses it.

vLLM's own manager and events, with a plain copy in place of the one between devices. For an OffloadingConnector with
`"spec_module_path": "vllm_llmd.testing.offloading", "spec_name": "HostOffloadingSpec"`; vLLM 0.32.
"""

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from vllm_llmd.errors import ConfigError


class HostWorker(OffloadingWorker):
    """Copies at once, in the caller's thread. A chunk is one block."""

    def __init__(self, caches: CanonicalKVCaches, chunks: int) -> None:
        self._caches = [cache.tensor for cache in caches.tensors]
        self._chunks = [torch.zeros((chunks, *cache.shape[1:]), dtype=cache.dtype) for cache in self._caches]
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        return self._copy(job_id, src_spec, dst_spec, list(zip(self._caches, self._chunks, strict=True)))

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, src_spec, dst_spec, list(zip(self._chunks, self._caches, strict=True)))

    def _copy(
        self,
        job_id: int,
        source: LoadStoreSpec,
        destination: LoadStoreSpec,
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> bool:
        froms, tos = (torch.from_numpy(spec.block_ids).long() for spec in (source, destination))
        for there, here in pairs:
            here[tos] = there[froms]
        self._finished.append(TransferResult(job_id, True))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing: whatever was submitted is done."""


class HostOffloadingSpec(CPUOffloadingSpec):
    """Raises ConfigError unless a chunk is one block and one rank holds all."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self.blocks_per_chunk != 1 or self.config.parallel.world_size != 1:
            raise ConfigError("HostOffloadingSpec takes chunks of one block and one rank: leave block_size out")
        return HostWorker(kv_caches, self.num_chunks)
