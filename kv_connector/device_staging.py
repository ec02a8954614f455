"""The staging area of a cache in device memory: slots there, and copies on a stream of their own."""

from collections.abc import Callable, Sequence

import torch

from vllm_llmd.kv_connector.staging import SLOT_BYTES, SLOTS, Placement


class DeviceStaging:
    """Implements `Staging`. Copies run beside the model; `place` answers when the device has passed them."""

    def __init__(self, caches: Sequence[torch.Tensor]) -> None:
        """`caches` are what pieces are put into; all of one device.

        The slots are allocated on the stream of the copies: nothing that runs on another may still use their memory.
        """
        storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in caches}
        self._caches = [
            torch.empty(0, dtype=torch.uint8, device=caches[0].device).set_(storage) for storage in storages.values()
        ]
        self._stream = torch.cuda.Stream(caches[0].device)
        with torch.cuda.stream(self._stream):
            self._memory = torch.empty(SLOTS * SLOT_BYTES, dtype=torch.uint8, device=caches[0].device)

    @property
    def address(self) -> int:
        return int(self._memory.data_ptr())

    def place(self, slot: int, placements: Sequence[Placement]) -> Callable[[], bool]:
        from vllm_llmd.kernels.block_copy_triton import copy_blocks

        source = self._memory[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            for placement in placements:
                cache = self._cache_at(int(placement.addresses[0]))
                addresses = torch.from_numpy(placement.addresses.astype("int64"))
                offsets, places = torch.from_numpy(placement.offsets), addresses - cache.data_ptr()
                copy_blocks(source, offsets, cache, places, placement.grid)
            done.record()
        return lambda: bool(done.query())

    def _cache_at(self, address: int) -> torch.Tensor:
        for cache in self._caches:
            if cache.data_ptr() <= address < cache.data_ptr() + cache.nbytes:
                return cache
        raise AssertionError(f"no cache of this rank holds address {address:#x}")
