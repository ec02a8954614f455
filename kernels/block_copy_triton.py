"""`block_copy` on a GPU: a Triton kernel that copies tiles of words, queued on the current stream.

Under TRITON_INTERPRET=1 it runs on CPU tensors, slowly. Owns no stream and no memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from vllm_llmd.errors import ConfigError
from vllm_llmd.kernels.block_copy import Grid, Reach, Side, check_pairs
from vllm_llmd.kernels.block_loops import ONCE, Axis, loops_of

WIDEST = 16
"""Bytes that a thread can load at once: what addresses and strides are divisible by is used up to this."""

WORDS = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

TILE_WORDS, TILE_COLUMNS, TRANSPOSED_SIDE = 2048, 1024, 64


def kernel(function: Callable[..., Any]) -> Any:
    """`function`, compiled by Triton for the types of its arguments and each set of its constants."""
    return triton.jit(function)


def copy_blocks(
    source: torch.Tensor,
    source_offsets: torch.Tensor,
    destination: torch.Tensor,
    destination_offsets: torch.Tensor,
    grid: Grid,
) -> None:
    """As the reference, with tensors of one device; the copy has been queued when this returns.

    Offsets on the CPU are checked at once and sent along; in pinned memory they must stay as they are until the copy
    is done. Those on the device are taken too, but to check them waits for the stream. Any alignment is right; where
    all offsets and strides are multiples of 16 the copy is fastest.
    """
    alignment = min(check_copy(source, source_offsets, destination, destination_offsets, grid.reach))
    if not len(source_offsets):
        return
    tiles = Tiles.of(grid, alignment)
    with torch.cuda.device_of(source):
        _copy_tiles[(len(source_offsets) * tiles.per_copy,)](
            source,
            source_offsets.to(source.device, non_blocking=True),
            destination,
            destination_offsets.to(source.device, non_blocking=True),
            **tiles.arguments,
            **OPTIONS,
        )


def compile_ahead(grid: Grid, device: torch.device) -> None:
    """Compiles the kernel for copies of `grid` where all offsets are multiples of 16, so that none waits for that."""
    first = -(min(reach.low for reach in grid.reach) // WIDEST) * WIDEST
    offsets = torch.tensor([first])
    source, destination = (torch.zeros(first + reach.end, dtype=torch.uint8, device=device) for reach in grid.reach)
    copy_blocks(source, offsets, destination, offsets, grid)


@dataclass(frozen=True)
class Tiles:
    """How one copy is cut: into `per_copy` programs, by what the kernel is told in `arguments`."""

    per_copy: int
    arguments: dict[str, Any]

    @classmethod
    def of(cls, grid: Grid, alignment: int) -> "Tiles":
        """`alignment` is a power of two that all addresses are multiples of."""
        loops = loops_of(grid)
        word = min(alignment_of(alignment, loops.run_bytes, *_strides(*loops.axes)), max(WORDS))
        a, b, rows = loops.axes
        columns = Axis(loops.run_bytes // word, word, word)
        most_words, most_columns = TILE_WORDS, TILE_COLUMNS
        if loops.transposed and columns.count == 1:
            b, rows, columns = ONCE, *loops.axes[1:]
            most_words, most_columns = TRANSPOSED_SIDE**2, TRANSPOSED_SIDE
        lines = b.count * rows.count
        tile_columns = min(triton.next_power_of_2(columns.count), most_columns)
        tile_lines = min(triton.next_power_of_2(lines), most_words // tile_columns)
        line_tiles, column_tiles = triton.cdiv(lines, tile_lines), triton.cdiv(columns.count, tile_columns)
        arguments = {
            "a_count": a.count,
            "a_source": a.source // word,
            "a_destination": a.destination // word,
            "line_tiles": line_tiles,
            "column_tiles": column_tiles,
            "B": b.count,
            "B_SOURCE": b.source // word,
            "B_DESTINATION": b.destination // word,
            "ROWS": rows.count,
            "ROW_SOURCE": rows.source // word,
            "ROW_DESTINATION": rows.destination // word,
            "COLUMNS": columns.count,
            "COLUMN_SOURCE": columns.source // word,
            "COLUMN_DESTINATION": columns.destination // word,
            "TILE_LINES": tile_lines,
            "TILE_COLUMNS": tile_columns,
            "WORD": WORDS[word],
            "WORD_BYTES": word,
            "ALIGNED": alignment_of(alignment, *_strides(a)),
        }
        return cls(a.count * line_tiles * column_tiles, arguments)


def _strides(*axes: Axis) -> list[int]:
    return [stride for axis in axes for stride in (axis.source, axis.destination)]


def alignment_of(*values: int) -> int:
    """The largest power of two, at most `WIDEST`, that all values are multiples of."""
    bits = WIDEST
    for value in values:
        bits |= value
    return bits & -bits


def check_copy(
    source: torch.Tensor,
    source_offsets: torch.Tensor,
    destination: torch.Tensor,
    destination_offsets: torch.Tensor,
    reach: tuple[Reach, Reach],
) -> tuple[int, int]:
    """What the addresses at the source and at the destination are multiples of, each at most `WIDEST`.

    Raises ConfigError as the reference does, and if memories are on different devices.
    """
    if source.device != destination.device:
        raise ConfigError(f"source and destination must be on one device; got {source.device}, {destination.device}")
    check_pairs(len(source_offsets), len(destination_offsets))
    return (
        check_side("source", source, source_offsets, reach[0]),
        check_side("destination", destination, destination_offsets, reach[1]),
    )


def check_side(side: Side, memory: torch.Tensor, offsets: torch.Tensor, reach: Reach) -> int:
    """As `check_copy`, for one side."""
    if memory.dtype != torch.uint8 or memory.ndim != 1 or not memory.is_contiguous():
        raise ConfigError(f"the {side} must be flat memory of uint8; got {memory.dtype} of {tuple(memory.shape)}")
    if offsets.dtype != torch.int64 or offsets.ndim != 1:
        raise ConfigError(f"{side} offsets must be int64 of shape (n,); got {offsets.dtype} of {tuple(offsets.shape)}")
    if not len(offsets):
        return WIDEST
    lowest_bits = (offsets | WIDEST) & -(offsets | WIDEST)
    lowest, highest, alignment = torch.stack([offsets.min(), offsets.max(), lowest_bits.min()]).tolist()
    reach.check(side, lowest, highest, len(memory))
    return alignment_of(alignment, memory.data_ptr())


@kernel
def start_of(offset: tl.tensor, step: tl.tensor, ALIGNED: tl.constexpr, WORD_BYTES: tl.constexpr) -> tl.tensor:
    """In words, what is `step` words behind the offset that stands at `offset`; a multiple of `ALIGNED` bytes.

    Triton is told twice: where the step is known to be 0 it drops the addition, and what it was told about that.
    """
    words = tl.multiple_of(tl.load(offset), ALIGNED) // WORD_BYTES + step
    return tl.multiple_of(words, ALIGNED // WORD_BYTES)


@kernel
def _copy_tiles(
    source: tl.tensor,
    source_offsets: tl.tensor,
    destination: tl.tensor,
    destination_offsets: tl.tensor,
    a_count: tl.tensor,
    a_source: tl.tensor,
    a_destination: tl.tensor,
    line_tiles: tl.tensor,
    column_tiles: tl.tensor,
    B: tl.constexpr,
    B_SOURCE: tl.constexpr,
    B_DESTINATION: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_SOURCE: tl.constexpr,
    ROW_DESTINATION: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_SOURCE: tl.constexpr,
    COLUMN_DESTINATION: tl.constexpr,
    TILE_LINES: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """One tile of step a of one copy; lines are the rows of all steps b. Strides are in words."""
    tile = tl.program_id(0)
    columns = tile % column_tiles * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    tile = tile // column_tiles
    lines = tile % line_tiles * TILE_LINES + tl.arange(0, TILE_LINES)
    tile = tile // line_tiles
    a = (tile % a_count).to(tl.int64)
    copy = tile // a_count
    inside = (lines[:, None] < B * ROWS) & (columns[None, :] < COLUMNS)
    columns = columns.to(tl.int64)[None, :]
    if B > 1:
        b = (lines // ROWS).to(tl.int64)[:, None]
        rows = (lines % ROWS).to(tl.int64)[:, None]
    else:
        b = tl.zeros((TILE_LINES, 1), tl.int64)
        rows = lines.to(tl.int64)[:, None]
    start = start_of(source_offsets + copy, a * a_source, ALIGNED, WORD_BYTES)
    places = start + b * B_SOURCE + rows * ROW_SOURCE + columns * COLUMN_SOURCE
    words = tl.load(source.to(tl.pointer_type(WORD)) + places, mask=inside)
    start = start_of(destination_offsets + copy, a * a_destination, ALIGNED, WORD_BYTES)
    places = start + b * B_DESTINATION + rows * ROW_DESTINATION + columns * COLUMN_DESTINATION
    tl.store(destination.to(tl.pointer_type(WORD)) + places, words, mask=inside)
