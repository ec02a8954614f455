"""What the connector makes of vLLM's configuration: who may join a fleet, with whom blocks fit, what to warn of."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import vllm

from vllm_llmd.errors import ConfigError
from vllm_llmd.kv_connector.command_line import adapter_names, server_options
from vllm_llmd.kv_connector.layout import Order
from vllm_llmd.kv_connector.topology import OPAQUE
from vllm_llmd.names import Role
from vllm_llmd.settings import EngineSettings
from vllm_llmd.wire import MAJOR, Geometry, GroupShape

logger = logging.getLogger(__name__)

TESTED = ("0.29", "0.30", "0.31", "0.32")
"""Releases that the engine tests pass on."""

CPU_KEYS_TRANSPOSED = ("vec", "vec16")
"""vLLM's names of the CPU attention kernels that keep the keys of a head as [channel, token], its values after them."""


@dataclass(frozen=True)
class Layer:
    """One layer's cache: its name in vLLM, the group whose blocks it uses, and what stands within them."""

    name: str
    group: int
    order: Order


@dataclass(frozen=True)
class EngineFacts:
    """What the connector needs of vLLM's configuration. `layers` are in the model's order."""

    id: str
    role: Role
    models: tuple[str, ...]
    adapters: tuple[str, ...]
    block_size: int
    num_blocks: int
    max_model_len: int
    geometry: Geometry
    layers: tuple[Layer, ...]
    layer_bytes: int
    hash_tokens: int
    prefix_caching: bool
    priorities: bool
    fingerprint: str
    max_sequences: int | None = None

    @property
    def layer_masks(self) -> tuple[int, ...]:
        """The layers of each group, as bits."""
        groups = range(len(self.geometry.groups))
        return tuple(sum(1 << i for i, layer in enumerate(self.layers) if layer.group == group) for group in groups)

    @property
    def naming_group(self) -> int:
        return naming_group(self.geometry)


def naming_group(geometry: Geometry) -> int:
    """The group whose blocks name what the cache holds: the first that keeps all of the past, if any does."""
    return next((i for i, group in enumerate(geometry.groups) if not group.window), 0)


def read_facts(config: Any, kv_cache: Any, settings: EngineSettings) -> EngineFacts:
    """Facts from VllmConfig and KVCacheConfig. Raises ConfigError where the engine cannot join a fleet."""
    check_supported(config, kv_cache)
    transfer = config.kv_transfer_config
    roles: dict[str, Role] = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}
    served = config.model_config.served_model_name
    geometry, layers = _geometry(config, kv_cache), _layers(config, kv_cache)
    specs = [spec for group in kv_cache.kv_cache_groups for spec in _specs(group)]
    facts = EngineFacts(
        id=transfer.engine_id,
        role=settings.role or roles[transfer.kv_role],
        models=(served,) if isinstance(served, str) else tuple(served),
        adapters=tuple(adapter_names(server_options())),
        block_size=geometry.groups[naming_group(geometry)].block_size,
        num_blocks=kv_cache.num_blocks,
        max_model_len=config.model_config.max_model_len,
        geometry=geometry,
        layers=layers,
        layer_bytes=max(spec.page_size_bytes for spec in specs),
        hash_tokens=_hash_tokens(config, kv_cache),
        prefix_caching=bool(config.cache_config.enable_prefix_caching),
        priorities=config.scheduler_config.policy == "priority",
        fingerprint=_fingerprint(config, kv_cache, settings),
        max_sequences=config.scheduler_config.max_num_seqs,
    )
    logger.info("llmd geometry of %s: %s", facts.id, geometry)
    return facts


def warn_of_what_should_differ(config: Any) -> None:
    """One clear line for each setting that works, but not as well as it should."""
    if _release() not in TESTED:
        tested = f"{TESTED[0]} to {TESTED[-1]}"
        logger.warning("vllm-llmd is tested with vLLM %s; this is %s", tested, vllm.__version__)
    policy = config.kv_transfer_config.kv_load_failure_policy
    if policy != "recompute":
        logger.warning(
            "kv_load_failure_policy is '%s': a request whose source engine dies will fail. Set "
            '"kv_load_failure_policy":"recompute" in --kv-transfer-config: then what did not arrive is computed here.',
            policy,
        )
    if not config.cache_config.enable_prefix_caching:
        logger.warning("prefix caching is off: the router cannot know what this engine holds")
    if config.scheduler_config.policy != "priority":
        logger.warning(
            "requests are served in order of arrival: with --scheduling-policy priority short prompts do not wait for "
            "long ones, and the router's priorities and objectives hold here, too"
        )


def check_supported(config: Any, kv_cache: Any) -> None:
    """Raises ConfigError that says which model or setting, and why."""
    model = config.model_config.model
    for group in kv_cache.kv_cache_groups:
        for spec in _specs(group):
            reason = _unsupported(spec)
            if reason is not None:
                raise ConfigError(
                    f"LlmdConnector cannot move the KV cache of {model}: {reason}. Serve it without the connector."
                )
        if not getattr(group, "enable_kv_transfer", True) or getattr(group, "host_resident", False):
            raise ConfigError(f"LlmdConnector cannot move the KV cache of {model}: part of it is not to be transferred")
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise ConfigError(
            "LlmdConnector cannot move a KV cache whose fp8 scales each engine measures for itself: "
            "leave --calculate-kv-scales out"
        )
    parallel = config.parallel_config
    for name in ("pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(f"LlmdConnector does not support {name} > 1 yet; start one engine per replica instead")


def _unsupported(spec: Any) -> str | None:
    kind = type(spec).__name__
    if kind not in ("FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec"):
        return f"it has layers of {kind}; full attention, sliding windows and MLA are supported"
    if getattr(spec, "tokens_per_state", 1) != 1:
        return f"it keeps one state per {spec.tokens_per_state} tokens"
    return None


def _specs(group: Any) -> list[Any]:
    """The specs of a group's layers: one for all, or one each."""
    spec = group.kv_cache_spec
    return list(spec.kv_cache_specs.values()) if type(spec).__name__ == "UniformTypeKVCacheSpecs" else [spec]


def _spec_of(group: Any, layer: str) -> Any:
    spec = group.kv_cache_spec
    return spec.kv_cache_specs[layer] if type(spec).__name__ == "UniformTypeKVCacheSpecs" else spec


# --- how the cache is cut up ----------------------------------------------------------------------------------


def _geometry(config: Any, kv_cache: Any) -> Geometry:
    orders = {layer.order for layer in _layers(config, kv_cache)}
    order = orders.pop() if len(orders) == 1 else "opaque"
    device = config.device_config.device_type
    return Geometry(
        tp=config.parallel_config.tensor_parallel_size,
        kv_heads=0 if _latent(kv_cache) else config.model_config.get_total_num_kv_heads(),
        interior=f"{OPAQUE} {_device_kind(device)}" if order == "opaque" else f"{device} {order}",
        groups=[
            GroupShape(group.kv_cache_spec.block_size, len(group.layer_names), _window(group))
            for group in kv_cache.kv_cache_groups
        ],
    )


def _hash_tokens(config: Any, kv_cache: Any) -> int:
    """How many tokens vLLM hashes at a time. From 0.32 on its engine core says so; before, this is how it decides."""
    sizes = [group.kv_cache_spec.block_size for group in kv_cache.kv_cache_groups]
    asked_for = getattr(config.cache_config, "prefix_match_unit", None) if len(sizes) > 1 else None
    return getattr(kv_cache, "hash_block_size", None) or asked_for or gcd(*sizes)


def _latent(kv_cache: Any) -> bool:
    """Whether every rank holds the whole cache."""
    return all(
        type(spec).__name__ == "MLAAttentionSpec" for group in kv_cache.kv_cache_groups for spec in _specs(group)
    )


def _window(group: Any) -> int:
    """Tokens of the past that the group's blocks are kept for; 0 for all."""
    spec = _specs(group)[0]
    if type(spec).__name__ != "SlidingWindowSpec":
        return 0
    return int(spec.sliding_window) + int(getattr(spec, "extra_retained_tokens", 0))


def _layers(config: Any, kv_cache: Any) -> tuple[Layer, ...]:
    found = [
        Layer(name, number, _order(config, _spec_of(group, name)))
        for number, group in enumerate(kv_cache.kv_cache_groups)
        for name in group.layer_names
    ]
    return tuple(sorted(found, key=lambda layer: tuple(_natural(layer.name))))


def _natural(name: str) -> Iterator[tuple[int, str]]:
    """A key that sorts layer 10 after layer 9."""
    for word in re.split(r"(\d+)", name):
        yield (int(word), "") if word.isdigit() else (-1, word)


def _order(config: Any, spec: Any) -> Order:
    quantized = getattr(getattr(spec, "kv_quant_mode", None), "name", "NONE")
    if quantized not in ("NONE", "FP8_PER_TENSOR"):
        return "opaque"
    if config.device_config.device_type != "cpu" or type(spec).__name__ == "MLAAttentionSpec":
        return "cells"
    if quantized != "NONE":
        return "opaque"
    return "keys transposed" if _cpu_kernel(config, spec) in CPU_KEYS_TRANSPOSED else "opaque"


def _cpu_kernel(config: Any, spec: Any) -> str:
    """vLLM's name of the CPU attention kernel that it picks for this cache."""
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    except ImportError:
        return "unknown"
    name: str = _get_attn_isa(config.model_config.dtype, spec.block_size, spec.head_size)
    return name


def _fingerprint(config: Any, kv_cache: Any, settings: EngineSettings) -> str:
    """Equal on two engines exactly when their caches hold the same values, however each cuts them up."""
    facts = {
        "model": settings.model_id or config.model_config.model,
        "revision": config.model_config.revision,
        "quantization": str(config.model_config.quantization),
        "dtype": str(config.model_config.dtype),
        "groups": [
            [[type(spec).__name__, str(spec.dtype), spec.head_size, _window(group)] for spec in _specs(group)]
            + [len(group.layer_names)]
            for group in kv_cache.kv_cache_groups
        ],
        "kv_heads": config.model_config.get_total_num_kv_heads(),
        "device": _device_kind(config.device_config.device_type),
        "vllm": _release(),
        "protocol": MAJOR,
    }
    text = json.dumps(facts, sort_keys=True)
    logger.info("llmd fingerprint of %s", text)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _release() -> str:
    return ".".join(vllm.__version__.split(".")[:2])


def _device_kind(device_type: str) -> str:
    """On CPU the attention kernel, and with it the order of bytes in a block, follows the instruction set."""
    if device_type != "cpu":
        return device_type
    amx = bool(torch.cpu._is_amx_tile_supported())
    return f"cpu {torch.backends.cpu.get_cpu_capability()} {'amx' if amx else 'no amx'}"
