"""Pure: from cells to copy to the bytes of a read, between one rank's regions and those of one of its sources.

Bytes that are contiguous on both sides are read into place in one run; where a block must be reordered on the way,
whole blocks are read into a staging area, and a kernel copies from there. Holds no state of any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vllm_llmd.errors import ConfigError
from vllm_llmd.kernels.block_copy import Grid, Strides
from vllm_llmd.kv_connector.layout import CellCopy, Runs
from vllm_llmd.kv_connector.topology import HeadSlice
from vllm_llmd.wire import Component, Interior, Regions

MIN_RUN_BYTES = 1024
"""Shorter runs cost more to post than a detour through the staging area."""


@dataclass(frozen=True)
class Staged:
    """Pieces to read into the staging area, and how each is copied into place from there.

    Piece `i` is `piece_bytes` at address `remote[i]` of the source's device; `grid` copies it to our `local[i]`.
    """

    remote: npt.NDArray[np.uint64]
    device_id: int
    local: npt.NDArray[np.uint64]
    piece_bytes: int
    grid: Grid


@dataclass(frozen=True)
class ReadWork:
    """What one range takes: runs to read straight into place, and pieces to stage."""

    local: Runs
    remote: Runs
    staged: tuple[Staged, ...]

    @property
    def bytes(self) -> int:
        """Bytes of KV that end up in place."""
        return int(self.local[:, 1].sum()) + sum(len(staged.local) * staged.grid.bytes for staged in self.staged)


@dataclass(frozen=True)
class _Runs:
    """Runs within a pair of blocks: offset here, offset at the source, length."""

    local: npt.NDArray[np.uint64]
    remote: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class _Detour:
    """Part of a pair of blocks that has to be staged: its offset here, that of the piece there."""

    local: int
    remote: int
    piece_bytes: int
    grid: Grid


_Pattern = tuple[_Runs | None, tuple[_Detour, ...]]


@dataclass(frozen=True)
class _Outline:
    """What a pair of blocks takes in several regions.

    Run `i` of `sizes[i]` bytes starts at `local[i, 0]` plus `local[i, 1]` per block here, and likewise at the source.
    `detours` come with their region.
    """

    local: npt.NDArray[np.uint64]
    remote: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint64]
    detours: tuple[tuple[int, _Detour], ...]


class Bridge:
    """How to read from one source rank, whose regions have been checked.

    Raises ConfigError where the two sides cannot be brought together.
    """

    def __init__(self, local: Regions, remote: Regions, heads: HeadSlice | None) -> None:
        here, there = (
            list(zip(local.layers, local.groups, strict=True)),
            list(zip(remote.layers, remote.groups, strict=True)),
        )
        if here != there:
            raise ConfigError(f"KV caches differ: {len(here)} regions here, {len(there)} at the source")
        self._local = local
        self._remote = remote
        self._heads = heads
        self._layers = np.array(local.layers)
        self._groups = np.array(local.groups)
        self._patterns: dict[tuple[int, ...], _Pattern] = {}
        self._outlines: dict[tuple[int, ...], _Outline] = {}
        for region in range(len(here)):
            self._check(region)

    def plan(self, cells: Sequence[CellCopy], first_layer: int = 0, end_layer: int = 0) -> ReadWork:
        """What to read for `cells`, in layers `first_layer` to `end_layer` (0: all).

        Example: blocks 4,5,6 into 9,10,12, layers apart and blocks dense, are two runs a layer.
        Raises ConfigError if a block id or a part of a block is out of range.
        """
        locals_, remotes = [np.zeros((0, 3), np.uint64)], [np.zeros((0, 3), np.uint64)]
        staged: list[Staged] = []
        for (group, *parts), pairs in self._by_kind(cells).items():
            outline = self._outline(group, parts[0], parts[1], first_layer, end_layer)
            here, there = pairs[:, 0], pairs[:, 1]
            for runs, blocks, rows in ((outline.local, here, locals_), (outline.remote, there, remotes)):
                rows.append(_rows(runs, blocks, outline.sizes))
            staged += [self._staged(region, detour, here, there) for region, detour in outline.detours]
        local, remote = np.concatenate(locals_), np.concatenate(remotes)
        local[:, 2], remote[:, 2] = self._local.device_id, self._remote.device_id
        return ReadWork(*merge(local, remote), tuple(staged))

    def _by_kind(self, cells: Sequence[CellCopy]) -> dict[tuple[int, int, int], npt.NDArray[np.uint64]]:
        kinds: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        for cell in cells:
            if not (0 <= cell.remote < self._remote.num_blocks and 0 <= cell.local < self._local.num_blocks):
                raise ConfigError(
                    f"block out of range: {cell}; {self._remote.num_blocks} blocks there, {self._local.num_blocks} here"
                )
            kinds.setdefault((cell.group, cell.local_part, cell.remote_part), []).append((cell.local, cell.remote))
        return {kind: np.array(pairs, dtype=np.uint64) for kind, pairs in kinds.items()}

    def _regions(self, group: int, first_layer: int, end_layer: int) -> list[int]:
        wanted = self._groups == group
        if end_layer:
            wanted &= (self._layers >= first_layer) & (self._layers < end_layer)
        return [int(region) for region in np.flatnonzero(wanted)]

    def _check(self, region: int) -> None:
        local, remote = self._interiors(region)
        if self._whole(region):
            return
        if self._heads is not None and local.head_bytes and local.head_bytes == remote.head_bytes:
            return
        if not local.components or not remote.components:
            raise ConfigError("KV blocks differ and cannot be taken apart: TP and block size must be equal")
        kinds = [[(c.channels, c.item_bytes) for c in interior.components] for interior in (local, remote)]
        if kinds[0] != kinds[1]:
            raise ConfigError("KV blocks hold different things: the models or their dtypes differ")

    def _interiors(self, region: int) -> tuple[Interior, Interior]:
        return (
            self._local.interiors[self._local.kinds[region]],
            self._remote.interiors[self._remote.kinds[region]],
        )

    def _whole(self, region: int) -> bool:
        local, remote = self._interiors(region)
        return (
            self._heads is None
            and local == remote
            and self._local.block_bytes[region] == self._remote.block_bytes[region]
        )

    def _staged(
        self, region: int, detour: _Detour, here: npt.NDArray[np.uint64], there: npt.NDArray[np.uint64]
    ) -> Staged:
        return Staged(
            remote=_blocks_at(self._remote, region, there) + np.uint64(detour.remote),
            device_id=self._remote.device_id,
            local=_blocks_at(self._local, region, here) + np.uint64(detour.local),
            piece_bytes=detour.piece_bytes,
            grid=detour.grid,
        )

    def _outline(self, group: int, local_part: int, remote_part: int, first_layer: int, end_layer: int) -> _Outline:
        key = (group, local_part, remote_part, first_layer, end_layer)
        if key not in self._outlines:
            regions = self._regions(group, first_layer, end_layer)
            patterns = [(region, self._pattern(region, local_part, remote_part)) for region in regions]
            self._outlines[key] = self._new_outline(patterns)
        return self._outlines[key]

    def _new_outline(self, patterns: list[tuple[int, _Pattern]]) -> _Outline:
        """Runs of one pair of blocks through all regions. Those that go on from region to region become one."""
        by_strides: dict[tuple[int, int], list[_Runs]] = {}
        for region, (runs, _) in patterns:
            if runs is not None:
                bases = np.uint64(self._local.bases[region]), np.uint64(self._remote.bases[region])
                strides = self._local.strides[region], self._remote.strides[region]
                moved = _Runs(runs.local + bases[0], runs.remote + bases[1], runs.sizes)
                by_strides.setdefault(strides, []).append(moved)
        local, remote = [np.zeros((0, 2), np.uint64)], [np.zeros((0, 2), np.uint64)]
        sizes = [np.zeros(0, np.uint64)]
        for strides, found in by_strides.items():
            together = _merged(_concatenate(found))
            local.append(_with(together.local, strides[0]))
            remote.append(_with(together.remote, strides[1]))
            sizes.append(together.sizes)
        detours = tuple((region, detour) for region, (_, detours) in patterns for detour in detours)
        return _Outline(np.concatenate(local), np.concatenate(remote), np.concatenate(sizes), detours)

    def _pattern(self, region: int, local_part: int, remote_part: int) -> _Pattern:
        sides = (self._local.kinds[region], self._remote.kinds[region], self._local.block_bytes[region])
        key = (*sides, local_part, remote_part)
        if key not in self._patterns:
            self._patterns[key] = self._new_pattern(region, local_part, remote_part)
        return self._patterns[key]

    def _new_pattern(self, region: int, local_part: int, remote_part: int) -> _Pattern:
        local, remote = self._interiors(region)
        tokens = min(local.tokens, remote.tokens)
        if max(local_part, remote_part) and not tokens:
            raise ConfigError("KV blocks cannot be taken apart")
        if local_part * tokens + tokens > local.tokens or remote_part * tokens + tokens > remote.tokens:
            raise ConfigError(f"part out of range: {tokens} tokens of blocks of {local.tokens} and {remote.tokens}")
        if self._whole(region):
            return _one_run(0, 0, self._local.block_bytes[region]), ()
        heads = self._heads or HeadSlice(0, 0, local.heads)
        if local.tokens == remote.tokens and local.head_bytes and local.head_bytes == remote.head_bytes:
            size = local.head_bytes
            return _one_run(heads.destination_first * size, heads.source_first * size, heads.count * size), ()
        runs: list[_Runs] = []
        detours: list[_Detour] = []
        for ours, theirs in zip(local.components, remote.components, strict=True):
            here = ours.offset + heads.destination_first * ours.head + local_part * tokens * ours.token
            there = theirs.offset + heads.source_first * theirs.head + remote_part * tokens * theirs.token
            grid = Grid(heads.count, tokens, ours.channels, ours.item_bytes, _strides(theirs), _strides(ours))
            found = _runs_of(grid, here, there)
            if found is not None:
                runs.append(found)
            else:
                detours += _detours(grid, here, there)
        return (_concatenate(runs) if runs else None), tuple(detours)


def merge(local: Runs, remote: Runs) -> tuple[Runs, Runs]:
    """The same copy in as few runs as can be: those that continue each other on both sides become one."""
    if len(local) < 2:
        return local, remote
    order = np.argsort(local[:, 0], kind="stable")
    local, remote = local[order], remote[order]
    joined = (local[:-1, 0] + local[:-1, 1] == local[1:, 0]) & (remote[:-1, 0] + remote[:-1, 1] == remote[1:, 0])
    starts = np.flatnonzero(np.concatenate([[True], ~joined]))
    sizes = np.add.reduceat(local[:, 1], starts)
    local, remote = local[starts], remote[starts]
    local[:, 1] = remote[:, 1] = sizes
    return local, remote


def one_run(address: int, length: int) -> Runs:
    """A single run of host memory."""
    return np.array([[address, length, 0]], dtype=np.uint64)


def _rows(runs: npt.NDArray[np.uint64], blocks: npt.NDArray[np.uint64], sizes: npt.NDArray[np.uint64]) -> Runs:
    """The runs of an outline for these blocks; the device is left open."""
    rows = np.empty((len(blocks), len(runs), 3), dtype=np.uint64)
    rows[:, :, 0] = runs[:, 0] + blocks[:, None] * runs[:, 1]
    rows[:, :, 1] = sizes
    return rows.reshape(-1, 3)


def _blocks_at(side: Regions, region: int, blocks: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    return np.uint64(side.bases[region]) + blocks * np.uint64(side.strides[region])


def _with(addresses: npt.NDArray[np.uint64], stride: int) -> npt.NDArray[np.uint64]:
    return np.stack([addresses, np.full_like(addresses, stride)], axis=1)


def _merged(runs: _Runs) -> _Runs:
    """`merge` for runs that are alike on both sides but for their addresses."""
    local, remote = (np.stack([at, runs.sizes, runs.sizes], axis=1) for at in (runs.local, runs.remote))
    local, remote = merge(local, remote)
    return _Runs(local[:, 0], remote[:, 0], local[:, 1])


def _one_run(local: int, remote: int, size: int) -> _Runs:
    return _Runs(np.array([local], np.uint64), np.array([remote], np.uint64), np.array([size], np.uint64))


def _concatenate(runs: list[_Runs]) -> _Runs:
    return _Runs(
        np.concatenate([r.local for r in runs]),
        np.concatenate([r.remote for r in runs]),
        np.concatenate([r.sizes for r in runs]),
    )


def _runs_of(grid: Grid, here: int, there: int) -> _Runs | None:
    """The grid as runs contiguous on both sides, or None if they are too short to be worth posting."""
    if grid.source.channel != grid.item_bytes or grid.destination.channel != grid.item_bytes:
        return None
    heads, tokens = np.arange(grid.heads)[:, None], np.arange(grid.tokens)[None, :]
    local = (here + heads * grid.destination.head + tokens * grid.destination.token).ravel()
    remote = (there + heads * grid.source.head + tokens * grid.source.token).ravel()
    sizes = np.full(len(local), grid.channels * grid.item_bytes)
    merged = _merged(_Runs(local.astype(np.uint64), remote.astype(np.uint64), sizes.astype(np.uint64)))
    return None if merged.sizes.mean() < MIN_RUN_BYTES else merged


def _detours(grid: Grid, here: int, there: int) -> list[_Detour]:
    """Stage the fewest bytes of the source's block that hold the grid: head by head where heads lie apart."""
    one_head = (grid.tokens - 1) * grid.source.token + (grid.channels - 1) * grid.source.channel + grid.item_bytes
    if grid.source.head < one_head:
        return [_Detour(here, there, one_head + (grid.heads - 1) * grid.source.head, grid)]
    single = replace(grid, heads=1)
    return [
        _Detour(here + head * grid.destination.head, there + head * grid.source.head, one_head, single)
        for head in range(grid.heads)
    ]


def _strides(component: Component) -> Strides:
    return Strides(component.head, component.token, component.channel)
