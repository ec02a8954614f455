"""vLLM's own NIXL connectors without the two habits that cost cores on a CPU, so that protocols can be compared.

Loaded into engines by `kv_connector_module_path`. NIXL's progress thread stays off, and the worker's main thread may
run on every core again after the connector has pinned it to one. Everything else is vLLM's. Without the thread, NIXL
makes progress when the connector asks it how things stand: in every engine step, of which both sides make hundreds a
second while a transfer is under way.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nixl._api import nixl_thread_sync_t
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector, NixlPushConnector


@contextmanager
def quietly() -> Iterator[None]:
    """Agents made within the block have no progress thread; the thread's CPU affinity is restored on leaving it.

    They lock themselves instead: the push connector calls its agent from two threads, and without either the worker
    ends in a segmentation fault.
    """
    theirs = base_worker.nixl_agent_config
    cores = os.sched_getaffinity(0)

    def without_thread(*args: Any, **kwargs: Any) -> Any:
        strict = nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        return theirs(*args, **{**kwargs, "enable_prog_thread": False, "sync_mode": strict})

    base_worker.nixl_agent_config = without_thread
    try:
        yield
    finally:
        base_worker.nixl_agent_config = theirs
        os.sched_setaffinity(0, cores)


class QuietPullConnector(NixlPullConnector):
    """vLLM's `NixlConnector`."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        with quietly():
            super().__init__(vllm_config, role, kv_cache_config)


class QuietPushConnector(NixlPushConnector):
    """vLLM's `NixlPushConnector`."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        with quietly():
            super().__init__(vllm_config, role, kv_cache_config)
