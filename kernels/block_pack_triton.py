"""`block_pack` on a GPU: a Triton program per copy and head, to the same bits as the reference.

Rounding is done with integers, so that every GPU can do it, and in the same way.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from vllm_llmd.errors import ConfigError
from vllm_llmd.kernels.block_copy import Strides
from vllm_llmd.kernels.block_copy_triton import OPTIONS, alignment_of, check_copy, kernel, start_of
from vllm_llmd.kernels.block_loops import ONCE, Axis
from vllm_llmd.kernels.block_pack import ITEM_BYTES, Float, Packing

FLOAT32, FLOAT16, BFLOAT16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
NUMBER: dict[Float, int] = {"float32": 0, "float16": 1, "bfloat16": 2}
WORDS: dict[Float, Any] = {"float32": tl.uint32, "float16": tl.uint16, "bfloat16": tl.uint16}

TILE_ITEMS = 2048


def pack_blocks(
    source: torch.Tensor,
    source_offsets: torch.Tensor,
    destination: torch.Tensor,
    destination_offsets: torch.Tensor,
    scales: torch.Tensor,
    packing: Packing,
) -> None:
    """As the reference, with tensors of one device, queued as `block_copy_triton.copy_blocks` says.

    Raises ConfigError, too, if a float is not at a multiple of its size.
    """
    aligned = check_copy(source, source_offsets, destination, destination_offsets, packing.reach_to_pack)
    floats, codes = Lane(packing.grid.source, aligned[0]), Lane(packing.grid.destination, aligned[1])
    check_floats(floats, packing.dtype)
    check_scales(scales, (len(source_offsets), packing.grid.heads), source.device)
    if not len(source_offsets):
        return
    with torch.cuda.device_of(source):
        _pack[(scales.numel(),)](
            source,
            source_offsets.to(source.device, non_blocking=True),
            destination,
            destination_offsets.to(source.device, non_blocking=True),
            scales,
            **_arguments(packing, floats, codes),
            **OPTIONS,
        )


def unpack_blocks(
    source: torch.Tensor,
    source_offsets: torch.Tensor,
    destination: torch.Tensor,
    destination_offsets: torch.Tensor,
    scales: torch.Tensor,
    packing: Packing,
) -> None:
    """As the reference; otherwise as `pack_blocks`."""
    aligned = check_copy(source, source_offsets, destination, destination_offsets, packing.reach_to_unpack)
    codes, floats = Lane(packing.grid.source, aligned[0]), Lane(packing.grid.destination, aligned[1])
    check_floats(floats, packing.dtype)
    check_scales(scales, (len(source_offsets), packing.grid.heads), source.device)
    if not len(source_offsets):
        return
    with torch.cuda.device_of(source):
        _unpack[(scales.numel(),)](
            source,
            source_offsets.to(source.device, non_blocking=True),
            destination,
            destination_offsets.to(source.device, non_blocking=True),
            scales,
            **_arguments(packing, floats, codes),
            **OPTIONS,
        )


@dataclass(frozen=True)
class Lane:
    """One side's strides in bytes, and what all its offsets are multiples of."""

    strides: Strides
    aligned: int


def check_floats(floats: Lane, dtype: Float) -> None:
    """Raises ConfigError unless all floats lie at multiples of their size."""
    strides, item_bytes = floats.strides, ITEM_BYTES[dtype]
    if alignment_of(floats.aligned, strides.head, strides.token, strides.channel) < item_bytes:
        raise ConfigError(f"on a GPU every {dtype} must be at a multiple of {item_bytes} bytes; got {floats}")


def check_scales(scales: torch.Tensor, shape: tuple[int, int], device: torch.device) -> None:
    """Raises ConfigError unless `scales` is float32 of `shape` (n, heads), row after row, on `device`."""
    good = scales.dtype == torch.float32 and scales.shape == shape and scales.is_contiguous()
    if not good or scales.device != device:
        got = f"{scales.dtype} of {tuple(scales.shape)} on {scales.device}"
        raise ConfigError(f"scales must be float32 of shape {shape} on {device}; got {got}")


def _arguments(packing: Packing, floats: Lane, codes: Lane) -> dict[str, Any]:
    grid, item_bytes = packing.grid, packing.grid.item_bytes
    tokens = Axis(grid.tokens, floats.strides.token // item_bytes, codes.strides.token)
    channels = Axis(grid.channels, floats.strides.channel // item_bytes, codes.strides.channel)
    items = grid.tokens * grid.channels
    if tokens.continues(channels):
        tokens, channels = ONCE, Axis(items, channels.source, channels.destination)
    return {
        "heads": grid.heads,
        "float_head": floats.strides.head // item_bytes,
        "code_head": codes.strides.head,
        "ITEMS": items,
        "CHANNELS": channels.count,
        "FLOAT_TOKEN": tokens.source,
        "FLOAT_CHANNEL": channels.source,
        "FLOAT_ALIGNED": alignment_of(floats.aligned, floats.strides.head),
        "CODE_TOKEN": tokens.destination,
        "CODE_CHANNEL": channels.destination,
        "CODE_ALIGNED": alignment_of(codes.aligned, codes.strides.head),
        "FLOAT": NUMBER[packing.dtype],
        "WORD": WORDS[packing.dtype],
        "WORD_BYTES": item_bytes,
        "TILE": min(TILE_ITEMS, triton.next_power_of_2(items)),
    }


@kernel
def _pack(
    source: tl.tensor,
    source_offsets: tl.tensor,
    destination: tl.tensor,
    destination_offsets: tl.tensor,
    scales: tl.tensor,
    heads: tl.tensor,
    float_head: tl.tensor,
    code_head: tl.tensor,
    ITEMS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FLOAT_TOKEN: tl.constexpr,
    FLOAT_CHANNEL: tl.constexpr,
    FLOAT_ALIGNED: tl.constexpr,
    CODE_TOKEN: tl.constexpr,
    CODE_CHANNEL: tl.constexpr,
    CODE_ALIGNED: tl.constexpr,
    FLOAT: tl.constexpr,
    WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One head of one copy. Strides of floats are in floats, those of codes in bytes."""
    copy = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    start = start_of(source_offsets + copy, head * float_head, FLOAT_ALIGNED, WORD_BYTES)
    floats = source.to(tl.pointer_type(WORD)) + start
    codes = destination + start_of(destination_offsets + copy, head * code_head, CODE_ALIGNED, 1)
    peaks = tl.zeros((TILE,), tl.float32)
    for first in range(0, ITEMS, TILE):
        items = first + tl.arange(0, TILE)
        tokens, channels = (items // CHANNELS).to(tl.int64), (items % CHANNELS).to(tl.int64)
        words = tl.load(floats + tokens * FLOAT_TOKEN + channels * FLOAT_CHANNEL, mask=items < ITEMS, other=0)
        magnitudes = tl.abs(_widened(words, FLOAT))
        peaks = tl.maximum(peaks, tl.where(magnitudes < float("inf"), magnitudes, 0.0))
    scale = tl.maximum(tl.div_rn(tl.max(peaks), 448.0), 2.0**-126)
    tl.store(scales + tl.program_id(0), scale)
    inverse = tl.div_rn(1.0, scale)
    for first in range(0, ITEMS, TILE):
        items = first + tl.arange(0, TILE)
        tokens, channels = (items // CHANNELS).to(tl.int64), (items % CHANNELS).to(tl.int64)
        words = tl.load(floats + tokens * FLOAT_TOKEN + channels * FLOAT_CHANNEL, mask=items < ITEMS, other=0)
        packed = _to_e4m3(_widened(words, FLOAT), inverse)
        tl.store(codes + tokens * CODE_TOKEN + channels * CODE_CHANNEL, packed, mask=items < ITEMS)


@kernel
def _unpack(
    source: tl.tensor,
    source_offsets: tl.tensor,
    destination: tl.tensor,
    destination_offsets: tl.tensor,
    scales: tl.tensor,
    heads: tl.tensor,
    float_head: tl.tensor,
    code_head: tl.tensor,
    ITEMS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FLOAT_TOKEN: tl.constexpr,
    FLOAT_CHANNEL: tl.constexpr,
    FLOAT_ALIGNED: tl.constexpr,
    CODE_TOKEN: tl.constexpr,
    CODE_CHANNEL: tl.constexpr,
    CODE_ALIGNED: tl.constexpr,
    FLOAT: tl.constexpr,
    WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """As `_pack`, the other way."""
    copy = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    start = start_of(destination_offsets + copy, head * float_head, FLOAT_ALIGNED, WORD_BYTES)
    floats = destination.to(tl.pointer_type(WORD)) + start
    codes = source + start_of(source_offsets + copy, head * code_head, CODE_ALIGNED, 1)
    scale = tl.load(scales + tl.program_id(0))
    for first in range(0, ITEMS, TILE):
        items = first + tl.arange(0, TILE)
        tokens, channels = (items // CHANNELS).to(tl.int64), (items % CHANNELS).to(tl.int64)
        packed = tl.load(codes + tokens * CODE_TOKEN + channels * CODE_CHANNEL, mask=items < ITEMS, other=0)
        words = _narrowed(_from_e4m3(packed) * scale, FLOAT)
        tl.store(floats + tokens * FLOAT_TOKEN + channels * FLOAT_CHANNEL, words, mask=items < ITEMS)


@kernel
def _to_e4m3(numbers: tl.tensor, factor: tl.tensor) -> tl.tensor:
    """The codes nearest to `numbers * factor`, ties to even, at most 448 in magnitude."""
    scaled = (numbers * factor).to(tl.uint32, bitcast=True)
    magnitude = tl.minimum(scaled & 0x7FFFFFFF, 0x43E00000)
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Beside 2^14 a float32 has steps of 2^-9, as the e4m3 below 2^-6: the addition rounds.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude >= 0x3C800000, normal, small) | ((scaled >> 24) & 0x80)
    return tl.where(numbers == numbers, code, 0x7F).to(tl.uint8)


@kernel
def _from_e4m3(codes: tl.tensor) -> tl.tensor:
    """As float32."""
    magnitude = codes.to(tl.uint32) & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    number = tl.where(magnitude >= 8, normal, (normal - 2.0**-7) * 2.0)
    number = tl.where(magnitude == 0x7F, float("nan"), number)
    sign = (codes.to(tl.uint32) & 0x80) << 24  # Triton's own minus is 0 - x, which knows no -0
    return (number.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@kernel
def _widened(words: tl.tensor, FLOAT: tl.constexpr) -> tl.tensor:
    """The float32 of words that hold floats."""
    if FLOAT == FLOAT32:
        numbers = words.to(tl.float32, bitcast=True)
    elif FLOAT == FLOAT16:
        numbers = words.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        numbers = (words.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return numbers


@kernel
def _narrowed(numbers: tl.tensor, FLOAT: tl.constexpr) -> tl.tensor:
    """The words of the nearest floats, ties to even."""
    if FLOAT == FLOAT32:
        words = numbers.to(tl.uint32, bitcast=True)
    elif FLOAT == FLOAT16:
        words = numbers.to(tl.float16).to(tl.uint16, bitcast=True)
    else:
        bits = numbers.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        words = tl.where(numbers == numbers, rounded, 0x7FC0).to(tl.uint16)
    return words
