"""`block_copy` on a CPU, compiled by numba: one thread, without the GIL, so that an I/O thread can copy beside compute.

Runs are copied by memcpy, transposed items in tiles that fit into vector registers, whatever else item by item.
"""

from typing import Any

import numpy as np

from vllm_llmd.kernels.block_copy import Bytes, Grid, Offsets, check_copy
from vllm_llmd.kernels.block_loops import Loops, loops_of
from vllm_llmd.kernels.memory_cpu import VECTOR_BYTES, compiled, move_item, move_run, transpose_tile

TILED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Item bytes -> kind, of items that are transposed in tiles."""

ITEMS: dict[int, Any] = {**TILED, 16: np.complex128}
"""Item bytes -> kind, of items that are copied by a load and a store."""

Steps = tuple[int, int, int]
"""Counts or strides in bytes of the three axes, outermost first."""


def copy_blocks(
    source: Bytes, source_offsets: Offsets, destination: Bytes, destination_offsets: Offsets, grid: Grid
) -> None:
    """As the reference. Offsets and strides need no alignment."""
    check_copy(source, source_offsets, destination, destination_offsets, grid.reach)
    copy_at(source.ctypes.data + source_offsets, destination.ctypes.data + destination_offsets, grid)


def copy_at(sources: Offsets, destinations: Offsets, grid: Grid) -> None:
    """`copy_blocks` from addresses to addresses, shape (n,); nothing is checked."""
    loops = loops_of(grid)
    if loops.transposed and loops.run_bytes in TILED:
        _copy_transposed(sources, destinations, *_steps(loops), TILED[loops.run_bytes])
    elif loops.run_bytes in ITEMS:
        _copy_items(sources, destinations, *_steps(loops), ITEMS[loops.run_bytes])
    else:
        _copy_runs(sources, destinations, *_steps(loops), loops.run_bytes)


def compile_ahead() -> None:
    """Compiles every kernel or loads it from numba's cache, so that no copy has to wait for that."""
    nowhere = np.empty(0, np.int64)
    nothing = (nowhere, nowhere, (0, 0, 0), (0, 0, 0), (0, 0, 0))
    for kind in TILED.values():
        _copy_transposed(*nothing, kind)
    for kind in ITEMS.values():
        _copy_items(*nothing, kind)
    _copy_runs(*nothing, 0)


def _steps(loops: Loops) -> tuple[Steps, Steps, Steps]:
    a, b, c = loops.axes
    return (a.count, b.count, c.count), (a.source, b.source, c.source), (a.destination, b.destination, c.destination)


@compiled
def _copy_runs(sources: Offsets, destinations: Offsets, counts: Steps, froms: Steps, tos: Steps, size: int) -> None:
    """`sources` and `destinations` are addresses, here and below."""
    for i in range(len(sources)):
        for a in range(counts[0]):
            for b in range(counts[1]):
                source = sources[i] + a * froms[0] + b * froms[1]
                destination = destinations[i] + a * tos[0] + b * tos[1]
                for c in range(counts[2]):
                    move_run(destination + c * tos[2], source + c * froms[2], size)


@compiled
def _copy_items(sources: Offsets, destinations: Offsets, counts: Steps, froms: Steps, tos: Steps, kind: Any) -> None:
    for i in range(len(sources)):
        for a in range(counts[0]):
            for b in range(counts[1]):
                source = sources[i] + a * froms[0] + b * froms[1]
                destination = destinations[i] + a * tos[0] + b * tos[1]
                for c in range(counts[2]):
                    move_item(destination + c * tos[2], source + c * froms[2], kind)


@compiled
def _copy_transposed(
    sources: Offsets, destinations: Offsets, counts: Steps, froms: Steps, tos: Steps, kind: Any
) -> None:
    item = froms[1]
    side = VECTOR_BYTES // max(item, 1)
    whole_b, whole_c = counts[1] - counts[1] % side, counts[2] - counts[2] % side
    for i in range(len(sources)):
        for a in range(counts[0]):
            source, destination = sources[i] + a * froms[0], destinations[i] + a * tos[0]
            for c in range(0, whole_c, side):
                for b in range(0, whole_b, side):
                    transpose_tile(
                        destination + b * tos[1] + c * item, tos[1], source + b * item + c * froms[2], froms[2], kind
                    )
            for b in range(counts[1]):
                for c in range(whole_c if b < whole_b else 0, counts[2]):
                    move_item(destination + b * tos[1] + c * item, source + b * item + c * froms[2], kind)
