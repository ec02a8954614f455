"""Every vLLM internal that we touch beyond the connector interface, so that a new release changes one file."""

import hashlib
import json
import logging
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from vllm_llmd.errors import ConfigError
from vllm_llmd.kv_connector.block_names import BlockEvent, Cleared, Removed, Stored
from vllm_llmd.kv_connector.layout import TensorView
from vllm_llmd.names import Role
from vllm_llmd.settings import EngineSettings
from vllm_llmd.wire import MAJOR

logger = logging.getLogger(__name__)

TESTED = ("0.32",)
"""Releases that the engine tests have passed on."""

DEFAULT_PORT = 8000
"""vLLM's own."""


# --- configuration --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineFacts:
    """What the connector needs of vLLM's configuration."""

    id: str
    role: Role
    models: tuple[str, ...]
    block_size: int
    num_blocks: int
    max_model_len: int
    tp_size: int
    fingerprint: str


def read_facts(config: Any, kv_cache: Any, settings: EngineSettings) -> EngineFacts:
    """Facts from VllmConfig and KVCacheConfig. Raises ConfigError where the engine cannot join a fleet."""
    _check_supported(config, kv_cache)
    transfer = config.kv_transfer_config
    roles: dict[str, Role] = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}
    served = config.model_config.served_model_name
    return EngineFacts(
        id=transfer.engine_id,
        role=settings.role or roles[transfer.kv_role],
        models=(served,) if isinstance(served, str) else tuple(served),
        block_size=kv_cache.kv_cache_groups[0].kv_cache_spec.block_size,
        num_blocks=kv_cache.num_blocks,
        max_model_len=config.model_config.max_model_len,
        tp_size=config.parallel_config.tensor_parallel_size,
        fingerprint=_fingerprint(config, kv_cache, settings),
    )


def warn_of_what_should_differ(config: Any) -> None:
    """One clear line for each setting that works, but not as well as it should."""
    if not vllm.__version__.startswith(TESTED):
        logger.warning("vllm-llmd is tested with vLLM %s; this is %s", ", ".join(TESTED), vllm.__version__)
    policy = config.kv_transfer_config.kv_load_failure_policy
    if policy != "recompute":
        logger.warning(
            "kv_load_failure_policy is '%s': a request whose source engine dies will fail. Set "
            '"kv_load_failure_policy":"recompute" in --kv-transfer-config: then what did not arrive is computed here.',
            policy,
        )
    if not config.cache_config.enable_prefix_caching:
        logger.warning("prefix caching is off: the router cannot know what this engine holds")


def _check_supported(config: Any, kv_cache: Any) -> None:
    groups = kv_cache.kv_cache_groups
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    model = config.model_config.model
    if len(groups) != 1 or kinds != ["FullAttentionSpec"]:
        raise ConfigError(
            f"LlmdConnector moves one full-attention KV cache group; {model} has {len(groups)} of {kinds}. "
            "Serve it without the connector."
        )
    parallel = config.parallel_config
    for name in ("pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"LlmdConnector does not support {name} > 1 yet; start one engine per replica instead")


def _fingerprint(config: Any, kv_cache: Any, settings: EngineSettings) -> str:
    """Equal on two engines exactly when KV blocks of one are valid in the other."""
    spec = kv_cache.kv_cache_groups[0].kv_cache_spec
    facts = {
        "model": settings.model_id or config.model_config.model,
        "revision": config.model_config.revision,
        "quantization": str(config.model_config.quantization),
        "dtype": str(config.model_config.dtype),
        "cache_dtype": str(spec.dtype),
        "layers": len(kv_cache.kv_cache_groups[0].layer_names),
        "kv_heads": spec.num_kv_heads,
        "head_size": spec.head_size,
        "block_size": spec.block_size,
        "page_bytes": spec.page_size_bytes,
        "layout": str(getattr(kv_cache, "kv_cache_layout", None)),
        "tp": config.parallel_config.tensor_parallel_size,
        "device": _device_kind(config.device_config.device_type),
        "vllm": ".".join(vllm.__version__.split(".")[:2]),
        "protocol": MAJOR,
    }
    text = json.dumps(facts, sort_keys=True)
    logger.info("llmd fingerprint of %s", text)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _device_kind(device_type: str) -> str:
    """On CPU the attention kernel, and with it the order of bytes in a block, follows the instruction set."""
    if device_type != "cpu":
        return device_type
    amx = bool(torch.cpu._is_amx_tile_supported())
    return f"cpu {torch.backends.cpu.get_cpu_capability()} {'amx' if amx else 'no amx'}"


# --- addresses ------------------------------------------------------------------------------------------------


def own_host(settings: EngineSettings) -> str:
    """The address others reach this machine under: as set, or the one that leads to the router."""
    if settings.host is not None:
        return settings.host
    for endpoint in settings.routers:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        if not host:
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((host, int(port)))
            except OSError as error:
                raise ConfigError(f"the router's address {endpoint} cannot be resolved: {error}") from error
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def own_http(settings: EngineSettings, argv: Sequence[str] | None = None) -> str:
    """Base URL of this engine's API server: as set, or read from the server's own command line."""
    if settings.http is not None:
        return settings.http.rstrip("/")
    options = _server_options(list(sys.argv if argv is None else argv))
    host = options.get("host") or ""
    if host in ("", "0.0.0.0", "::"):
        host = own_host(settings)
    scheme = "https" if options.get("ssl-keyfile") else "http"
    return f"{scheme}://{host}:{options.get('port') or DEFAULT_PORT}"


def _server_options(argv: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    config_file = _option(argv, "config")
    if config_file is not None:
        import yaml

        loaded = yaml.safe_load(Path(config_file).read_text()) or {}
        options.update({str(k).replace("_", "-"): str(v) for k, v in loaded.items()})
    for name in ("host", "port", "ssl-keyfile"):
        value = _option(argv, name)
        if value is not None:
            options[name] = value
    return options


def _option(argv: list[str], name: str) -> str | None:
    """The last value of `--name VALUE` or `--name=VALUE`; vLLM takes underscores for dashes."""
    value = None
    for word, after in zip_longest(argv, argv[1:]):
        flag, equals, rest = word.partition("=")
        if flag.replace("_", "-") == f"--{name}":
            value = rest if equals else after
    return value


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

    def free_blocks(self) -> int:
        count: int = self._pool.get_num_free_blocks()
        return count

    def take_events(self) -> list[Any]:
        events: list[Any] = self._pool.take_events()
        return events

    def blocks_of(self, request_id: str) -> list[Any]:
        """The request's blocks, in prompt order."""
        return list(self._manager.get_blocks(request_id).blocks[0])

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


def to_block_events(events: Iterable[Any]) -> list[BlockEvent]:
    """vLLM's events as ours; those of other media than the device's are left out."""
    converted: list[BlockEvent] = []
    for event in events:
        match event:
            case BlockStored(block_hashes=hashes, parent_block_hash=parent, token_ids=tokens, extra_keys=salts):
                converted.append(Stored(tuple(hashes), parent, tokens, salts))
            case BlockRemoved(block_hashes=hashes):
                converted.append(Removed(tuple(hashes)))
            case AllBlocksCleared():
                converted.append(Cleared())
    return converted


def event_hashes(request: Any, count: int) -> list[Any]:
    """Hashes of the request's first `count` full blocks, as vLLM's events name them."""
    return [maybe_convert_block_hash(block_hash) for block_hash in request.block_hashes[:count]]


# --- processes of one engine ----------------------------------------------------------------------------------


SPIN_S = 0.0005
"""How long a process of a CPU engine spins for a message of another before it blocks. vLLM's own second of spinning
takes a core from the model whenever an engine waits for KV, and from the model's own threads whenever it computes."""

BLOCK_MS = 2
"""How long it then blocks before it looks again: its notifications are lossy, which a second of spinning hides."""


def spin_briefly() -> None:
    """On CPU, where the cores are what computes: make vLLM's message queues block early. Elsewhere nothing changes."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    try:
        from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

        theirs = SpinCondition.wait
    except (ImportError, AttributeError):
        logger.warning("this vLLM's message queues are unknown to vllm-llmd: waiting for KV may cost a core")
        return
    if getattr(theirs, "spins_briefly", False):
        return

    def wait(self: Any, timeout_ms: int | None = None) -> None:
        self.busy_loop_s = min(self.busy_loop_s, SPIN_S)
        theirs(self, BLOCK_MS if timeout_ms is None else min(timeout_ms, BLOCK_MS))

    wait.spins_briefly = True  # type: ignore[attr-defined]
    SpinCondition.wait = wait


# --- the worker -----------------------------------------------------------------------------------------------


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


def tensor_rank() -> int:
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def agree(value: int) -> int:
    """Rank 0's value, on every tensor-parallel rank."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    return value if group.world_size == 1 else int(group.broadcast_object(value, src=0))
