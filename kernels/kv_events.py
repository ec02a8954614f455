"""The KV events that vLLM, SGLang and others publish, decoded: one msgpack payload -> what it says of which blocks.

A payload is an array of a time, the events and more, or a map. An event is a map with its kind under `type`, or an
array that begins with its kind. Fields have been added over time; all but the first ones are optional here.
`kv_events_cpu` reads the common shapes, compiled; this is the reference, and reads the rest.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from vllm_llmd.errors import MalformedMessageError
from vllm_llmd.kernels.block_names import BlockEvent, Cleared, Removed, Stored
from vllm_llmd.kernels.offloaded_blocks import Dropped, Offloaded
from vllm_llmd.names import Tier

STORED_FIELDS: Final = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
)
REMOVED_FIELDS: Final = ("block_hashes", "medium", "group_idx")
"""In the order in which an event as an array has them; what follows is of no use here."""

FULL_ATTENTION: Final = frozenset(("full_attention", "mla_attention", "sink_full_attention"))
"""Kinds of KV cache groups that keep all of the past."""

TIERS: Final[Mapping[str, Tier]] = {"GPU": "gpu", "CPU": "cpu", "CPU_PINNED": "cpu", "STORAGE": "disk", "DISK": "disk"}
"""What engines call a medium, in capitals; none at all is the GPU."""

LIMIT: Final = 1 << 31
"""Block sizes and groups are below."""

_decoder: Final = msgspec.msgpack.Decoder()


@dataclass(frozen=True)
class Reported:
    """One event, and of which tier and KV cache group it tells. `tier` is None where it is of a kind we do not know.

    `block_size` is None where the event does not say; `keeps_all` is whether the group keeps all of the past. Of
    another tier than the GPU hashes alone are read: who offloads blocks need not say what is in them.
    """

    event: BlockEvent
    tier: Tier | None = "gpu"
    group: int = 0
    block_size: int | None = None
    keeps_all: bool = True

    @property
    def elsewhere(self) -> Offloaded | Dropped | None:
        """What it says of a tier below the GPU."""
        if self.tier is None or self.tier == "gpu" or isinstance(self.event, Cleared):
            return None
        kind = Offloaded if isinstance(self.event, Stored) else Dropped
        return kind(self.tier, self.event.hashes)


@dataclass(frozen=True)
class Decoded:
    """A payload's events in order, and how many were of a kind or a shape that is not known."""

    events: tuple[Reported, ...]
    unknown: int

    def offloaded(self) -> list[Hashable]:
        """Hashes of the blocks that are in a tier below the GPU now."""
        told = [reported.elsewhere for reported in self.events]
        return [block_hash for each in told if isinstance(each, Offloaded) for block_hash in each.hashes]


def decode(payload: bytes) -> Decoded:
    """Raises MalformedMessageError for what is no batch of events; a single event that is not understood is counted."""
    try:
        batch = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(f"not msgpack: {error}") from None
    listed = batch.get("events") if isinstance(batch, dict) else batch[1] if _is_array_of(2, batch) else None
    if not isinstance(listed, list):
        raise MalformedMessageError("a batch of KV events is an array of a time and the events, or a map with `events`")
    events = [_reported(raw) for raw in listed]
    return Decoded(tuple(event for event in events if event is not None), events.count(None))


def _is_array_of(least: int, value: Any) -> bool:
    return isinstance(value, list) and len(value) >= least


def _reported(raw: Any) -> Reported | None:
    kind, fields = _kind_and_fields(raw)
    try:
        if kind == "BlockStored":
            return _stored(fields)
        if kind == "BlockRemoved":
            removed = Removed(_hashes(fields["block_hashes"]))
            return Reported(removed, _tier(fields), _group(fields))
        if kind == "AllBlocksCleared":
            return Reported(Cleared())
    except (KeyError, TypeError, ValueError):
        pass
    return None


def _kind_and_fields(raw: Any) -> tuple[Any, Mapping[Any, Any]]:
    if isinstance(raw, dict):
        return raw.get("type"), raw
    if isinstance(raw, list) and raw:
        names = REMOVED_FIELDS if raw[0] == "BlockRemoved" else STORED_FIELDS
        return raw[0], dict(zip(names, raw[1:], strict=False))
    return None, {}


def _stored(fields: Mapping[Any, Any]) -> Reported:
    hashes = _hashes(fields["block_hashes"])
    parent = None if fields["parent_block_hash"] is None else _hash(fields["parent_block_hash"])
    if _tier(fields) != "gpu":
        return Reported(Stored(hashes, parent, [], None), _tier(fields), _group(fields))
    tokens, size = fields["token_ids"], fields["block_size"]
    if not isinstance(size, int) or not 0 < size < LIMIT or not isinstance(tokens, list):
        raise ValueError
    if not all(type(token) is int and 0 <= token < 1 << 32 for token in tokens):
        raise ValueError
    kind = fields.get("kv_cache_spec_kind")
    return Reported(
        Stored(hashes, parent, tokens, _salts(fields, len(hashes))),
        _tier(fields),
        _group(fields),
        size,
        kind is None or kind in FULL_ATTENTION,
    )


def _salts(fields: Mapping[Any, Any], blocks: int) -> Sequence[Sequence[object] | None] | None:
    """Extra keys per block. Releases that do not tell them say at least which adapter it was."""
    keys = fields.get("extra_keys")
    if keys is not None:
        if len(keys) != blocks or not all(each is None or isinstance(each, list) for each in keys):
            raise ValueError
        return keys  # type: ignore[no-any-return]
    adapter = fields.get("lora_name") or fields.get("lora_id")
    return None if adapter is None else [[adapter]] * blocks


def _tier(fields: Mapping[Any, Any]) -> Tier | None:
    medium = fields.get("medium")
    return "gpu" if medium is None else TIERS.get(str(medium).upper())


def _group(fields: Mapping[Any, Any]) -> int:
    group = fields.get("group_idx")
    if group is None:
        return 0
    if not isinstance(group, int) or not 0 <= group < LIMIT:
        raise ValueError
    return group


def _hashes(raw: Any) -> tuple[Hashable, ...]:
    if not isinstance(raw, list):
        raise TypeError
    return tuple(map(_hash, raw))


def _hash(raw: Any) -> Hashable:
    """An integer counts by its 64 bits: some publish them signed."""
    if isinstance(raw, bytes):
        return raw
    if not isinstance(raw, int) or isinstance(raw, bool):
        raise TypeError
    return raw & (1 << 64) - 1
