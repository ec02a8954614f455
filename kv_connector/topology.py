"""Pure: which rank of a source each rank of a destination reads, and which heads. Knows no bytes.

A rank holds `kv_heads / tp` successive heads, or, where there are more ranks than heads, one head that others hold
too. Where `kv_heads` is 0 every rank holds the whole cache (MLA).
"""

from dataclasses import dataclass
from functools import lru_cache

from vllm_llmd.errors import ConfigError
from vllm_llmd.wire import Geometry

MAX_RANKS = 1024
"""More than any engine has: a message that tells of more is not believed."""


@dataclass(frozen=True)
class HeadSlice:
    """`count` successive heads: where they begin within the source rank's, and within the destination rank's."""

    source_first: int
    destination_first: int
    count: int


@dataclass(frozen=True)
class Edge:
    """Destination rank `destination` reads from source rank `source`: `heads`, or all of a block if None."""

    destination: int
    source: int
    heads: HeadSlice | None


@lru_cache(maxsize=256)
def edges(source_tp: int, destination_tp: int, kv_heads: int) -> tuple[Edge, ...]:
    """Every edge between two engines; each destination rank's heads come from exactly one place.

    Example: from 1 rank to 2, with 4 heads: rank 0 reads heads 0 and 1 of it, rank 1 reads heads 2 and 3.
    Raises ConfigError if the heads cannot be dealt out evenly.
    """
    if source_tp == destination_tp:
        return tuple(Edge(rank, rank, None) for rank in range(source_tp))
    if kv_heads == 0:
        return tuple(Edge(rank, rank * source_tp // destination_tp, None) for rank in range(destination_tp))
    found: list[Edge] = []
    for rank in range(destination_tp):
        found += _edges_to(rank, source_tp, destination_tp, kv_heads)
    return tuple(found)


def sources_of(destination: int, between: tuple[Edge, ...]) -> tuple[Edge, ...]:
    """The edges that one destination rank reads along."""
    return tuple(edge for edge in between if edge.destination == destination)


def readers_of(source: int, between: tuple[Edge, ...]) -> tuple[int, ...]:
    """The destination ranks that read from one source rank."""
    return tuple(edge.destination for edge in between if edge.source == source)


def objection(mine: Geometry, theirs: Geometry) -> str | None:
    """Why an engine cut up like `mine` cannot read one cut up like `theirs`, or None; the kind comes first."""
    if mine == theirs:
        return None
    smallest = min((group.block_size for group in theirs.groups), default=1)
    if not 0 < theirs.tp <= MAX_RANKS or smallest < 1:
        return f"impossible engine: {theirs.tp} ranks, blocks of {smallest} tokens"
    if [(g.layers, g.window) for g in mine.groups] != [(g.layers, g.window) for g in theirs.groups]:
        return "KV cache groups differ"
    if mine.interior != theirs.interior or not mine.interior:
        return f"blocks are laid out differently: '{mine.interior}' here, '{theirs.interior}' there"
    sizes = [(a.block_size, b.block_size) for a, b in zip(mine.groups, theirs.groups, strict=True)]
    if len(sizes) > 1 and any(a != b for a, b in sizes):
        return "block sizes differ, which is supported with one KV cache group only"
    for here, there in sizes:
        if here % there and there % here:
            return f"block sizes must divide each other: {here} here, {there} there"
        if here != there and mine.interior.startswith(OPAQUE):
            return f"block sizes must be equal where blocks are '{mine.interior}': {here} here, {there} there"
    try:
        edges(theirs.tp, mine.tp, mine.kv_heads)
    except ConfigError as error:
        return f"heads cannot be dealt out: {error}"
    return None


OPAQUE = "opaque"
"""How the name of an interior begins whose order of bytes within a head is not known."""


def _edges_to(rank: int, source_tp: int, destination_tp: int, kv_heads: int) -> list[Edge]:
    mine = _held(rank, destination_tp, kv_heads)
    by_source: dict[int, list[int]] = {}
    for head in mine:
        holders = [source for source in range(source_tp) if head in _held(source, source_tp, kv_heads)]
        by_source.setdefault(holders[rank % len(holders)], []).append(head)
    found = []
    for source, heads in by_source.items():
        theirs = _held(source, source_tp, kv_heads)
        all_of_both = len(heads) == len(theirs) == len(mine)
        part = HeadSlice(heads[0] - theirs[0], heads[0] - mine[0], len(heads))
        found.append(Edge(rank, source, None if all_of_both else part))
    return found


def _held(rank: int, tp: int, kv_heads: int) -> range:
    if tp <= kv_heads:
        if kv_heads % tp:
            raise ConfigError(f"{kv_heads} KV heads cannot be dealt out to {tp} ranks")
        count = kv_heads // tp
        return range(rank * count, (rank + 1) * count)
    if tp % kv_heads:
        raise ConfigError(f"{tp} ranks cannot share {kv_heads} KV heads evenly")
    head = rank * kv_heads // tp
    return range(head, head + 1)
