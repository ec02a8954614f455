"""Every vLLM internal that we touch beyond the connector interface, so that a new release changes one file.

What releases differ in ends here: see docs/decisions/0010-vllm-versions.md.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.request import RequestStatus

from vllm_llmd.kernels.block_names import BlockEvent, Cleared, Removed, Stored
from vllm_llmd.kernels.offloaded_blocks import Dropped, Offloaded
from vllm_llmd.kv_connector.device_memory import tensor_view
from vllm_llmd.kv_connector.layout import LayerView
from vllm_llmd.kv_connector.vllm_facts import Layer
from vllm_llmd.names import Tier

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    CACHE_HIT_SOURCE: Any = CacheHitSource.P2P
except ImportError:  # vLLM before 0.32 does not ask where tokens come from
    CACHE_HIT_SOURCE = None

logger = logging.getLogger(__name__)


def wrap(owner: type, name: str, make: Callable[[Any], Any]) -> None:
    """Puts what `make` makes of a method in its place; the second time nothing is changed."""
    theirs = getattr(owner, name)
    if not getattr(theirs, "wrapped_by_llmd", False):
        ours = make(theirs)
        ours.wrapped_by_llmd = True
        setattr(owner, name, ours)


# --- the connector's own hooks --------------------------------------------------------------------------------


def transfer_results(received: set[str], failed: set[str]) -> Any:
    """What `get_transfer_results` answers, a hook that vLLM calls from 0.30 on."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

    return KVConnectorTransferResults(finished_recving=received, failed_recving=failed)


def remember_manager() -> None:
    """Before vLLM builds its KV cache manager: make sure that `manager_of` will know it.

    From 0.30 on vLLM hands its manager to the connector itself. Before, only the manager's block pool.
    """
    if hasattr(KVConnectorBase_V1, "bind_kv_cache_manager"):
        return
    wrap(KVCacheManager, "__init__", _remembering)


def _remembering(theirs: Any) -> Any:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        theirs(self, *args, **kwargs)
        self.block_pool.llmd_manager = self

    return init


def manager_of(block_pool: Any) -> Any:
    """The manager of a pool that was built after `remember_manager`."""
    return block_pool.llmd_manager


# --- the block pool -------------------------------------------------------------------------------------------


class BlockPoolView:
    """The engine's block pool, as the scheduler side uses it. Only for the engine thread, but for `free_blocks`."""

    def __init__(self, kv_cache_manager: Any) -> None:
        self._manager = kv_cache_manager
        self._pool = kv_cache_manager.block_pool
        self._published = bool(self._pool.enable_kv_cache_events)
        self._pool.enable_kv_cache_events = True

    @property
    def published(self) -> bool:
        """Whether vLLM publishes block events of its own, so that drained ones must be handed on."""
        return self._published

    @property
    def capacity(self) -> int:
        """Blocks that requests may hold; one is vLLM's own."""
        return int(self._pool.num_gpu_blocks) - 1

    def free_blocks(self) -> int:
        count: int = self._pool.get_num_free_blocks()
        return count

    def take_events(self) -> list[Any]:
        events: list[Any] = self._pool.take_events()
        return events

    def blocks_of(self, request_id: str) -> tuple[list[Any], ...]:
        """The request's blocks of each group, in prompt order; `is_null` where a window has passed them by."""
        return tuple(list(blocks) for blocks in self._manager.get_blocks(request_id).blocks)

    def blocks_by_id(self, block_ids: Iterable[int]) -> list[Any]:
        return [self._pool.blocks[block_id] for block_id in block_ids]

    def pin(self, blocks: Sequence[Any]) -> None:
        """Keep blocks from reuse, whoever else lets go of them."""
        self._pool.touch(blocks)

    def unpin(self, blocks: Sequence[Any]) -> None:
        """Undo one `pin`."""
        self._pool.free_blocks(reversed(list(blocks)))

    def restart_load(self, request: Any) -> None:
        """Make vLLM give up the request's own blocks, keep what is valid in the prefix cache, and schedule it afresh.

        For a request whose failed load vLLM has just truncated to its valid prefix.
        """
        self._manager.cache_blocks(request, request.num_computed_tokens)
        request.num_computed_tokens = 0

    def forget_load(self, request: Any) -> None:
        """Give up the blocks of a request whose load has failed, and have it scheduled afresh.

        vLLM does so by itself from 0.30 on, where doing it twice changes nothing; 0.29 takes all that was loaded for
        valid, unless it is told of invalid blocks, and cannot be told so where there are several groups.
        """
        self._manager.free(request)
        request.num_computed_tokens = 0


def waits_for_kv(request: Any) -> bool:
    """Whether vLLM has parked the request until its KV is there."""
    return bool(request.status == RequestStatus.WAITING_FOR_REMOTE_KVS)


def to_block_events(events: Iterable[Any], group: int) -> list[BlockEvent]:
    """vLLM's events about one KV cache group, as ours."""
    converted: list[BlockEvent] = []
    for event in events:
        if (getattr(event, "group_idx", None) or 0) != group and not isinstance(event, AllBlocksCleared):
            continue
        match event:
            case BlockStored(block_hashes=hashes, parent_block_hash=parent, token_ids=tokens, extra_keys=salts):
                converted.append(Stored(tuple(hashes), parent, tokens, salts))
            case BlockRemoved(block_hashes=hashes):
                converted.append(Removed(tuple(hashes)))
            case AllBlocksCleared():
                converted.append(Cleared())
    return converted


_TIERS: Mapping[str, Tier] = {"CPU": "cpu", "STORAGE": "disk"}
"""Where vLLM's events say that a block is, unless it is on the GPU."""


def to_offloaded(events: Iterable[Any], group: int) -> list[Offloaded | Dropped]:
    """What vLLM's events tell of other places than the GPU, about one KV cache group."""
    converted: list[Offloaded | Dropped] = []
    for event in events:
        tier = _TIERS.get(getattr(event, "medium", None) or "")
        if tier is None or (getattr(event, "group_idx", None) or 0) != group:
            continue
        match event:
            case BlockStored(block_hashes=hashes):
                converted.append(Offloaded(tier, tuple(hashes)))
            case BlockRemoved(block_hashes=hashes):
                converted.append(Dropped(tier, tuple(hashes)))
    return converted


_connector_event_listeners: list[Callable[[list[Any]], None]] = []


def on_connector_events(listener: Callable[[list[Any]], None]) -> None:
    """Call `listener` with the block events of all connectors whenever vLLM takes them, if there are several.

    A connector that offloads tells vLLM of it after the step, and no other connector.
    """
    try:
        from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

        wrap(MultiConnector, "take_events", _telling_of_events)
    except (ImportError, AttributeError):
        logger.warning("this vLLM's MultiConnector is unknown to vllm-llmd: routers are not told of offloaded blocks")
        return
    _connector_event_listeners.append(listener)


def _telling_of_events(theirs: Any) -> Any:
    def take_events(self: Any) -> list[Any]:
        events = list(theirs(self))
        for tell in _connector_event_listeners:
            tell(events)
        return events

    return take_events


def forget_connector_events(listener: Callable[[list[Any]], None]) -> None:
    """Undo `on_connector_events`."""
    if listener in _connector_event_listeners:
        _connector_event_listeners.remove(listener)


def event_hashes(request: Any, count: int) -> list[Any]:
    """Hashes of the request's first `count` full blocks, as vLLM's events name them."""
    return [maybe_convert_block_hash(block_hash) for block_hash in request.block_hashes[:count]]


# --- processes of one engine ----------------------------------------------------------------------------------


SPIN_S = 0.0005
"""How long a process of a CPU engine spins for a message of another before it blocks. vLLM's own second of spinning
takes a core from the model whenever an engine waits for KV, and from the model's own threads whenever it computes."""

BLOCK_MS = (2.0, 100.0)
"""How long it then blocks before it looks again, at least and at most: its notifications are lossy when many follow
each other closely, which a second of spinning hides."""

BLOCK_SHARE = 0.02
"""In between, this much of the time since the last message: what a lost notification costs at most."""


def block_ms(idle_s: float) -> int:
    """How long to block where the last message came `idle_s` ago."""
    shortest, longest = BLOCK_MS
    return int(min(max(idle_s * 1000 * BLOCK_SHARE, shortest), longest))


def spin_briefly() -> None:
    """On CPU, where the cores are what computes: make vLLM's message queues block early. Elsewhere nothing changes."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    try:
        from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

        wrap(SpinCondition, "wait", _waiting_briefly)
    except (ImportError, AttributeError):
        logger.warning("this vLLM's message queues are unknown to vllm-llmd: waiting for KV may cost a core")


def _waiting_briefly(theirs: Any) -> Any:
    def wait(self: Any, timeout_ms: int | None = None) -> None:
        self.busy_loop_s = min(self.busy_loop_s, SPIN_S)
        block = block_ms(time.monotonic() - self.last_read)
        theirs(self, block if timeout_ms is None else min(timeout_ms, block))

    return wait


_arrival_listeners: list[Callable[[], None]] = []


def on_arrival(listener: Callable[[], None]) -> bool:
    """Call `listener` whenever a request has reached this process, in the thread that receives it.

    While a step is under way, the engine thread does not look. Returns False if this vLLM offers no such moment.
    """
    try:
        from vllm.v1.engine.core import EngineCore

        wrap(EngineCore, "preprocess_add_request", _telling_of_arrivals)
    except (ImportError, AttributeError):
        logger.warning("this vLLM does not tell of new requests: an engine that waits for KV looks for them often")
        return False
    _arrival_listeners.append(listener)
    return True


def _telling_of_arrivals(theirs: Any) -> Any:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        preprocessed = theirs(self, request)
        for tell in _arrival_listeners:
            tell()
        return preprocessed

    return preprocess_add_request


def forget_arrivals(listener: Callable[[], None]) -> None:
    """Undo `on_arrival`."""
    if listener in _arrival_listeners:
        _arrival_listeners.remove(listener)


def on_told_to_stop(listener: Callable[[], None]) -> None:
    """Call `listener` when SIGTERM reaches this process, before vLLM does what it does then.

    It is called where a signal's handler is: it must not wait. Does nothing where SIGTERM is not vLLM's to handle.
    """
    theirs = signal.getsignal(signal.SIGTERM)
    if not callable(theirs) or threading.current_thread() is not threading.main_thread():
        return

    def told(number: int, frame: Any) -> None:
        listener()
        theirs(number, frame)

    signal.signal(signal.SIGTERM, told)


# --- the worker -----------------------------------------------------------------------------------------------


def layer_views(caches: Mapping[str, torch.Tensor], layers: Sequence[Layer], num_blocks: int) -> list[LayerView]:
    """The caches of the layers, in the model's order. A layer that uses another's cache is not among them."""
    return [
        LayerView(number, layer.group, tensor_view(_by_blocks(caches[layer.name], num_blocks)), layer.order)
        for number, layer in enumerate(layers)
    ]


def _by_blocks(cache: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """A cache whose first dimension counts the kernel's smaller blocks, seen by vLLM's blocks."""
    if num_blocks in cache.shape or cache.shape[0] % num_blocks:
        return cache
    return cache.unflatten(0, (num_blocks, -1))


def tensor_rank() -> int:
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def agree(value: int) -> int:
    """Rank 0's value, on every tensor-parallel rank."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    return value if group.world_size == 1 else int(group.broadcast_object(value, src=0))
