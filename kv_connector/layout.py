"""Pure: where a rank's KV cache lies, from the strides of its tensors. Knows nothing of torch, vLLM or NIXL.

A region is one place where blocks lie at a fixed stride: one per layer, two where keys and values are apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import numpy.typing as npt

from vllm_llmd.errors import ConfigError
from vllm_llmd.kernels.block_copy import ITEM_BYTES
from vllm_llmd.wire import Component, Interior, Regions

Runs = npt.NDArray[np.uint64]
"""Byte runs, shape (n, 3): address, length in bytes, device id."""

Order = Literal["cells", "keys transposed", "opaque"]
"""What stands within a head of a block: a cell per token, all keys [channel, token] before all values, or unknown."""


@dataclass(frozen=True)
class TensorView:
    """What matters of one layer's cache tensor: `strides` are in elements, as torch gives them."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int


@dataclass(frozen=True)
class LayerView:
    """One layer's cache: which layer and KV cache group, its tensor, and how it is to be read."""

    layer: int
    group: int
    tensor: TensorView
    order: Order


@dataclass(frozen=True)
class Memory:
    """Where a rank's cache is: kind and device as NIXL names them."""

    num_blocks: int
    kind: str
    device_id: int


@dataclass(frozen=True)
class Region:
    """Blocks at `base + b * stride`, `block_bytes` each."""

    base: int
    stride: int
    block_bytes: int
    interior: Interior


@dataclass(frozen=True)
class CellCopy:
    """One cell to copy, within one group: part `remote_part` of a block of the source to a part of one of ours.

    A cell is as many tokens as the smaller of the two block sizes; with equal sizes it is a block and the parts are 0.
    """

    group: int
    remote: int
    remote_part: int
    local: int
    local_part: int


ADDRESSES = 1 << 62
"""Addresses and sizes are below this: sums of two still fit into 64 bits."""

UNKNOWN = Interior(0, 0, 0, [])
"""The interior of blocks of which nothing is known but where they begin and end."""


def regions_of(tensor: TensorView, num_blocks: int, order: Order = "opaque") -> list[Region]:
    """The regions of one layer's cache tensor, from its strides.

    A tensor (blocks, heads, tokens, content) is read as what it is, any other shape as whole blocks.
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
    interior = _interior(tensor, order) if len(tensor.shape) == 4 and dim == 0 and not outer else UNKNOWN
    return [Region(base, stride * tensor.itemsize, block_bytes, interior) for base in sorted(bases)]


def pack_regions(layers: Sequence[LayerView], memory: Memory) -> Regions:
    """All regions of a rank as they travel to another engine. Raises as `regions_of` does."""
    kinds: dict[str, int] = {}
    interiors: list[Interior] = []
    packed = Regions([], [], [], [], [], [], interiors, memory.num_blocks, memory.device_id, memory.kind)
    for view in layers:
        for region in regions_of(view.tensor, memory.num_blocks, view.order):
            kind = kinds.setdefault(repr(region.interior), len(interiors))
            if kind == len(interiors):
                interiors.append(region.interior)
            packed.bases.append(region.base)
            packed.strides.append(region.stride)
            packed.block_bytes.append(region.block_bytes)
            packed.layers.append(view.layer)
            packed.groups.append(view.group)
            packed.kinds.append(kind)
    return packed


def check_regions(regions: Regions) -> None:
    """Raises ConfigError if what another rank says of its cache cannot be true of any: nothing is to be read by it."""
    columns = (regions.bases, regions.strides, regions.block_bytes, regions.layers, regions.groups, regions.kinds)
    if len({len(column) for column in columns}) != 1:
        raise ConfigError("impossible KV cache: its regions are described unevenly")
    smallest = [ADDRESSES] * len(regions.interiors)
    for base, stride, size, layer, group, kind in zip(*columns, strict=True):
        if not (0 < size <= stride and min(base, layer, group) >= 0 and 0 <= kind < len(smallest)):
            raise ConfigError(f"impossible KV cache: blocks of {size} bytes every {stride} from {base}, kind {kind}")
        if not regions.num_blocks >= 0 or base + regions.num_blocks * stride > ADDRESSES:
            raise ConfigError(f"impossible KV cache: {regions.num_blocks} blocks every {stride} bytes from {base}")
        smallest[kind] = min(smallest[kind], size)
    for interior, size in zip(regions.interiors, smallest, strict=True):
        _check_interior(interior, size)
    if not 0 <= regions.device_id < ADDRESSES:
        raise ConfigError(f"impossible device: {regions.device_id}")


def _check_interior(interior: Interior, block_bytes: int) -> None:
    if min(interior.heads, interior.tokens, interior.head_bytes) < 0:
        raise ConfigError(f"impossible KV block: {interior}")
    if interior.heads * interior.head_bytes > block_bytes:
        raise ConfigError(f"impossible KV block: {interior} in {block_bytes} bytes")
    for each in interior.components:
        counts, strides = (interior.heads, interior.tokens, each.channels), (each.head, each.token, each.channel)
        last = each.offset + sum((count - 1) * stride for count, stride in zip(counts, strides, strict=True))
        if min(counts) < 1 or min(each.offset, *strides) < 0 or each.item_bytes not in ITEM_BYTES:
            raise ConfigError(f"impossible KV block: {interior}")
        if last + each.item_bytes > block_bytes:
            raise ConfigError(f"impossible KV block: {interior} in {block_bytes} bytes")


def _block_dim(tensor: TensorView, num_blocks: int) -> int:
    dims = [d for d, size in enumerate(tensor.shape) if size == num_blocks]
    if not dims:
        raise ConfigError(f"no dimension of the KV cache tensor {tensor.shape} has {num_blocks} blocks")
    return max(dims, key=lambda d: tensor.strides[d])


def _interior(tensor: TensorView, order: Order) -> Interior:
    """Of a tensor (blocks, heads, tokens, content)."""
    _, heads, tokens, content = tensor.shape
    item = tensor.itemsize
    _, head, token, channel = (stride * item for stride in tensor.strides)
    head_bytes = tokens * content * item
    one_run = heads == 1 or head == head_bytes
    if order == "cells":
        cells = Component(0, head, token, channel, content, item)
        return Interior(heads, tokens, head_bytes if one_run else 0, [cells])
    if not one_run:
        raise ConfigError(f"a head of a KV block must be one contiguous run; got shape {tensor.shape}")
    if order == "opaque":
        return Interior(heads, tokens, head_bytes, [])
    width = content // 2
    keys = Component(0, head_bytes, item, tokens * item, width, item)
    values = Component(tokens * width * item, head_bytes, width * item, item, width, item)
    return Interior(heads, tokens, head_bytes, [keys, values])
