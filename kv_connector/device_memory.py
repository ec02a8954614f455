"""What torch knows of memory and streams. Needs torch and nothing of vLLM."""

from collections.abc import Callable, Iterable, Sequence

import torch

from vllm_llmd.kv_connector.layout import TensorView
from vllm_llmd.kv_connector.staging import HostStaging, Staging, prepare_host_staging


def tensor_view(cache: torch.Tensor) -> TensorView:
    return TensorView(cache.data_ptr(), tuple(cache.shape), tuple(cache.stride()), cache.element_size())


def storage_spans(caches: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """(address, bytes) of every storage below the caches, each once: layers are views of few allocations."""
    storages = [cache.untyped_storage() for cache in caches]
    return sorted({(storage.data_ptr(), storage.nbytes()) for storage in storages})


def device_of(cache: torch.Tensor) -> tuple[str, int]:
    """NIXL's memory kind and the device's index."""
    if cache.device.type == "cpu":
        return "DRAM", 0
    return "VRAM", cache.device.index or 0


def step_marker(memory: str) -> Callable[[], Callable[[], bool]]:
    """A function that marks this point of the current stream; its answer tells whether the device has passed it."""
    if memory == "DRAM":
        return lambda: lambda: True

    def mark() -> Callable[[], bool]:
        event = torch.cuda.Event()
        event.record()
        return lambda: bool(event.query())

    return mark


def staging_for(caches: Sequence[torch.Tensor]) -> tuple[Callable[[], Staging], Callable[[], None]]:
    """What makes the staging area beside these caches, and what prepares its first use."""
    if device_of(caches[0])[0] == "DRAM":
        return HostStaging, prepare_host_staging

    def on_device() -> Staging:
        from vllm_llmd.kv_connector.device_staging import DeviceStaging

        return DeviceStaging(caches)

    return on_device, lambda: None
