"""Pure arithmetic from block ids to byte ranges. Knows nothing of torch, vLLM or NIXL.

A region is one place where blocks lie at a fixed stride: one per layer, two where keys and values are apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from vllm_llmd.errors import ConfigError
from vllm_llmd.wire import Regions

Runs = npt.NDArray[np.uint64]
"""Byte runs, shape (n, 3): address, length in bytes, device id."""


@dataclass(frozen=True)
class TensorView:
    """What matters of one layer's cache tensor: `strides` are in elements, as torch gives them."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int


@dataclass(frozen=True)
class Region:
    """Blocks at `base + b * stride`, `block_bytes` each."""

    base: int
    stride: int
    block_bytes: int


@dataclass(frozen=True)
class BlockPair:
    """One block to copy: source's block id, destination's block id."""

    remote: int
    local: int


def regions_of(tensor: TensorView, num_blocks: int) -> list[Region]:
    """The regions of one layer's cache tensor, from its strides.

    Raises ConfigError if a block is not made of contiguous runs.
    """
    dim = _block_dim(tensor, num_blocks)
    stride = tensor.strides[dim]
    others = [(tensor.strides[d], tensor.shape[d]) for d in range(len(tensor.shape)) if d != dim]
    inner = sorted((s, n) for s, n in others if s < stride and n > 1)
    outer = sorted((s, n) for s, n in others if s >= stride and n > 1)
    expected = 1
    for inner_stride, size in inner:
        if inner_stride != expected:
            raise ConfigError(f"a KV block must be one contiguous run; got shape {tensor.shape}, {tensor.strides}")
        expected *= size
    bases = [tensor.address]
    for outer_stride, size in outer:
        bases = [base + i * outer_stride * tensor.itemsize for i in range(size) for base in bases]
    block_bytes = prod(size for _, size in inner) * tensor.itemsize
    return [Region(base, stride * tensor.itemsize, block_bytes) for base in sorted(bases)]


def _block_dim(tensor: TensorView, num_blocks: int) -> int:
    dims = [d for d, size in enumerate(tensor.shape) if size == num_blocks]
    if not dims:
        raise ConfigError(f"no dimension of the KV cache tensor {tensor.shape} has {num_blocks} blocks")
    return max(dims, key=lambda d: tensor.strides[d])


def pack_regions(regions: Sequence[Region], num_blocks: int, device_id: int, memory: str) -> Regions:
    """Regions as they travel to another engine."""
    return Regions(
        bases=[r.base for r in regions],
        strides=[r.stride for r in regions],
        block_bytes=[r.block_bytes for r in regions],
        num_blocks=num_blocks,
        device_id=device_id,
        memory=memory,
    )


def one_run(address: int, length: int) -> Runs:
    """A single run of host memory."""
    return np.array([[address, length, 0]], dtype=np.uint64)


def read_runs(local: Regions, remote: Regions, pairs: Sequence[BlockPair]) -> tuple[Runs, Runs]:
    """Byte runs that copy `pairs` from `remote` to `local`, region by region, merged where both sides touch.

    Example: blocks 4,5,6 into 9,10,12 with dense regions are two runs a region: (4,5)->(9,10) and 6->12.
    Raises ConfigError if the two sides do not have the same regions or a block id is out of range.
    """
    if local.block_bytes != remote.block_bytes:
        raise ConfigError(
            f"KV blocks differ: {len(local.block_bytes)} regions here, {len(remote.block_bytes)} at the source"
        )
    for pair in pairs:
        if not (0 <= pair.remote < remote.num_blocks and 0 <= pair.local < local.num_blocks):
            raise ConfigError(f"block out of range: {pair}, {remote.num_blocks} blocks there, {local.num_blocks} here")
    ordered = sorted(pairs, key=lambda p: (p.local, p.remote))
    starts, lengths = _consecutive(ordered)
    first_local = np.array([ordered[i].local for i in starts], dtype=np.uint64)
    first_remote = np.array([ordered[i].remote for i in starts], dtype=np.uint64)
    local_rows: list[Runs] = []
    remote_rows: list[Runs] = []
    for index, block_bytes in enumerate(local.block_bytes):
        dense = local.strides[index] == block_bytes == remote.strides[index]
        if dense:
            firsts_local, firsts_remote, counts = first_local, first_remote, lengths
        else:
            firsts_local = np.array([p.local for p in ordered], dtype=np.uint64)
            firsts_remote = np.array([p.remote for p in ordered], dtype=np.uint64)
            counts = np.ones(len(ordered), dtype=np.uint64)
        sizes = counts * np.uint64(block_bytes)
        local_rows.append(_rows(local, index, firsts_local, sizes))
        remote_rows.append(_rows(remote, index, firsts_remote, sizes))
    return np.concatenate(local_rows), np.concatenate(remote_rows)


def _consecutive(ordered: Sequence[BlockPair]) -> tuple[list[int], npt.NDArray[np.uint64]]:
    starts = [
        i
        for i, pair in enumerate(ordered)
        if i == 0 or pair.local != ordered[i - 1].local + 1 or pair.remote != ordered[i - 1].remote + 1
    ]
    return starts, np.diff(np.array([*starts, len(ordered)])).astype(np.uint64)


def _rows(regions: Regions, index: int, blocks: npt.NDArray[np.uint64], sizes: npt.NDArray[np.uint64]) -> Runs:
    addresses = np.uint64(regions.bases[index]) + blocks * np.uint64(regions.strides[index])
    devices = np.full(len(blocks), regions.device_id, dtype=np.uint64)
    return np.stack([addresses, sizes, devices], axis=1)
