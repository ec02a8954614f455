"""`block_pack` on a CPU, compiled by numba, to the same bits as the reference, without the GIL.

A few copies at a time are gathered into a dense scratch by `block_copy_cpu`, converted, and scattered from there.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels import block_copy_cpu
from vllm_llmd.kernels.block_copy import Bytes, Grid, Offsets, Strides, check_copy
from vllm_llmd.kernels.block_copy_cpu import copy_at
from vllm_llmd.kernels.block_pack import LARGEST, SMALLEST_SCALE, Float, Packing, Scales, check_scales
from vllm_llmd.kernels.float_bits_cpu import (
    F32,
    INFINITY,
    MAGNITUDE,
    U32,
    from_bfloat16,
    from_e4m3,
    from_float16,
    to_bfloat16,
    to_e4m3,
    to_float16,
)
from vllm_llmd.kernels.memory_cpu import bits_of, compiled, float_of, load, store

SCRATCH_BYTES = 1 << 17
"""Of floats at a time, so that they stay in a core's own cache."""

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
NUMBER: dict[Float, int] = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}

Bits = npt.NDArray[np.uint32]
"""Of float32 numbers, shape (n,)."""


def pack_blocks(
    source: Bytes,
    source_offsets: Offsets,
    destination: Bytes,
    destination_offsets: Offsets,
    scales: Scales,
    packing: Packing,
) -> None:
    """As the reference. Offsets and strides need no alignment."""
    check_copy(source, source_offsets, destination, destination_offsets, packing.reach_to_pack)
    check_scales(scales, len(source_offsets), packing.grid.heads)
    grid = packing.grid
    floats, codes = _Scratch(grid, grid.item_bytes), _Scratch(grid, 1)
    gather, scatter = replace(grid, destination=floats.strides), replace(grid, item_bytes=1, source=codes.strides)
    sources, destinations = source.ctypes.data + source_offsets, destination.ctypes.data + destination_offsets
    for part in _parts(len(scales), grid):
        copies = len(scales[part])
        copy_at(sources[part], floats.addresses[:copies], gather)
        _pack(
            floats.addresses[0], codes.addresses[0], scales[part].reshape(-1), _head_items(grid), NUMBER[packing.dtype]
        )
        copy_at(codes.addresses[:copies], destinations[part], scatter)


def unpack_blocks(
    source: Bytes,
    source_offsets: Offsets,
    destination: Bytes,
    destination_offsets: Offsets,
    scales: Scales,
    packing: Packing,
) -> None:
    """As the reference. Offsets and strides need no alignment."""
    check_copy(source, source_offsets, destination, destination_offsets, packing.reach_to_unpack)
    check_scales(scales, len(source_offsets), packing.grid.heads)
    grid = packing.grid
    floats, codes = _Scratch(grid, grid.item_bytes), _Scratch(grid, 1)
    gather, scatter = replace(grid, item_bytes=1, destination=codes.strides), replace(grid, source=floats.strides)
    sources, destinations = source.ctypes.data + source_offsets, destination.ctypes.data + destination_offsets
    for part in _parts(len(scales), grid):
        copies = len(scales[part])
        copy_at(sources[part], codes.addresses[:copies], gather)
        _unpack(
            codes.addresses[0], floats.addresses[0], scales[part].flatten(), _head_items(grid), NUMBER[packing.dtype]
        )
        copy_at(floats.addresses[:copies], destinations[part], scatter)


def compile_ahead() -> None:
    """Compiles every kernel, the copy's too, or loads it from numba's cache."""
    block_copy_cpu.compile_ahead()
    _pack(0, 0, np.empty(0, np.float32), 0, FLOAT32)
    _unpack(0, 0, np.empty(0, np.float32), 0, FLOAT32)


class _Scratch:
    """Copies of `grid` one after another, dense, with items of `item_bytes`; `addresses` are where each begins."""

    def __init__(self, grid: Grid, item_bytes: int) -> None:
        self.strides = Strides(_head_items(grid) * item_bytes, grid.channels * item_bytes, item_bytes)
        copies, size = _copies_at_a_time(grid), grid.heads * self.strides.head
        self._memory = np.empty(copies * size, np.uint8)
        self.addresses = self._memory.ctypes.data + np.arange(copies, dtype=np.int64) * size


def _parts(places: int, grid: Grid) -> list[slice]:
    step = _copies_at_a_time(grid)
    return [slice(first, first + step) for first in range(0, places, step)]


def _copies_at_a_time(grid: Grid) -> int:
    return max(1, SCRATCH_BYTES // grid.bytes)


def _head_items(grid: Grid) -> int:
    return grid.tokens * grid.channels


@compiled
def _pack(floats: int, codes: int, scales: Scales, items: int, dtype: int) -> None:
    """`floats` and `codes` are addresses of dense items, `items` per scale."""
    bits = np.empty(items, np.uint32)
    item_bytes = 4 if dtype == FLOAT32 else 2
    for h in range(len(scales)):
        _load_floats(floats + h * items * item_bytes, dtype, bits)
        scale = max(float_of(_peak(bits)) / F32(LARGEST), F32(SMALLEST_SCALE))
        scales[h] = scale
        _store_codes(codes + h * items, F32(1) / scale, bits)


@compiled
def _unpack(codes: int, floats: int, scales: Scales, items: int, dtype: int) -> None:
    bits = np.empty(items, np.uint32)
    item_bytes = 4 if dtype == FLOAT32 else 2
    for h in range(len(scales)):
        _load_codes(codes + h * items, scales[h], bits)
        _store_floats(floats + h * items * item_bytes, dtype, bits)


@compiled
def _peak(bits: Bits) -> np.uint32:
    """The largest finite magnitude."""
    peak = U32(0)
    for i in range(len(bits)):
        magnitude = bits[i] & MAGNITUDE
        peak = max(peak, magnitude if magnitude < INFINITY else U32(0))
    return peak


@compiled
def _load_floats(address: int, dtype: int, bits: Bits) -> None:
    if dtype == FLOAT32:
        for i in range(len(bits)):
            bits[i] = load(address, i * 4, np.uint32)
    elif dtype == BFLOAT16:
        for i in range(len(bits)):
            bits[i] = from_bfloat16(load(address, i * 2, np.uint16))
    else:
        for i in range(len(bits)):
            bits[i] = from_float16(load(address, i * 2, np.uint16))


@compiled
def _store_floats(address: int, dtype: int, bits: Bits) -> None:
    if dtype == FLOAT32:
        for i in range(len(bits)):
            store(address, i * 4, bits[i])
    elif dtype == BFLOAT16:
        for i in range(len(bits)):
            store(address, i * 2, to_bfloat16(bits[i]))
    else:
        for i in range(len(bits)):
            store(address, i * 2, to_float16(bits[i]))


@compiled
def _load_codes(address: int, scale: np.float32, bits: Bits) -> None:
    for i in range(len(bits)):
        bits[i] = bits_of(from_e4m3(load(address, i, np.uint8)) * scale)


@compiled
def _store_codes(address: int, inverse: np.float32, bits: Bits) -> None:
    for i in range(len(bits)):
        store(address, i, to_e4m3(bits[i], inverse))
