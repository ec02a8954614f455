"""KV blocks as 8-bit floats for the wire: the strided copy of `block_copy`, from floats to e4m3 and back, with scales.

Values, checks and the plain reference, whose rounding is torch's. `block_pack_cpu` and `block_pack_triton` do the same
to the last bit. Never decides whether blocks are packed.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from vllm_llmd.errors import ConfigError
from vllm_llmd.kernels.block_copy import Bytes, Grid, Offsets, Reach, check_copy, items_at

Float = Literal["float32", "float16", "bfloat16"]

Scales = npt.NDArray[np.float32]
"""What a code of 1 stands for, per copy and head: shape (n, heads)."""

ITEM_BYTES: dict[Float, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

LARGEST = 448.0
"""The largest e4m3."""

SMALLEST_SCALE = 2.0**-126
"""Scales and their inverses are never 0, infinite or subnormal: a head of zeros is packed as zeros."""

NAN_CODE = 0x7F


@dataclass(frozen=True)
class Packing:
    """`grid` in floats of `dtype`: its item_bytes is that of the floats; on the packed side, items are of 1 byte.

    Raises ConfigError if item_bytes is not what `dtype` has.
    """

    grid: Grid
    dtype: Float

    def __post_init__(self) -> None:
        if self.grid.item_bytes != ITEM_BYTES[self.dtype]:
            raise ConfigError(f"{self.dtype} has items of {ITEM_BYTES[self.dtype]} bytes; got {self.grid.item_bytes}")

    @property
    def reach_to_pack(self) -> tuple[Reach, Reach]:
        """Of the floats at the source and of the codes at the destination."""
        return self.grid.reach[0], Reach.of(self.grid, self.grid.destination, 1)

    @property
    def reach_to_unpack(self) -> tuple[Reach, Reach]:
        """Of the codes at the source and of the floats at the destination."""
        return Reach.of(self.grid, self.grid.source, 1), self.grid.reach[1]


def pack_blocks(
    source: Bytes,
    source_offsets: Offsets,
    destination: Bytes,
    destination_offsets: Offsets,
    scales: Scales,
    packing: Packing,
) -> None:
    """Copies as `copy_blocks` does, and writes item x of copy i, head h as e4m3(x / scales[i, h]).

    The scale is the head's largest finite magnitude / 448, at least 2^-126; it is written to `scales`. Unpacked, a
    finite item differs by at most max(|x| / 16, scale / 1024) * (1 + 2^-20), and then by half a step of `dtype`.
    Infinities become the largest magnitude. NaN stays NaN where it is, and touches nothing else.
    Raises ConfigError as `copy_blocks`, and if `scales` is not float32 of shape (n, heads).
    """
    check_copy(source, source_offsets, destination, destination_offsets, packing.reach_to_pack)
    check_scales(scales, len(source_offsets), packing.grid.heads)
    grid = packing.grid
    for i, (begin, end) in enumerate(zip(source_offsets, destination_offsets, strict=True)):
        values = _floats(items_at(source, begin, grid.source, _shape(grid, grid.item_bytes)), packing.dtype)
        magnitudes = torch.where(values.isfinite(), values.abs(), 0)
        scale = (magnitudes.amax(dim=(1, 2)) / LARGEST).clamp(min=SMALLEST_SCALE)
        scaled = (values * (1 / scale)[:, None, None]).clamp(-LARGEST, LARGEST)
        codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        codes[values.isnan()] = NAN_CODE
        items_at(destination, end, grid.destination, _shape(grid, 1))[..., 0] = codes.numpy()
        scales[i] = scale.numpy()


def unpack_blocks(
    source: Bytes,
    source_offsets: Offsets,
    destination: Bytes,
    destination_offsets: Offsets,
    scales: Scales,
    packing: Packing,
) -> None:
    """Copies back, and writes code c of copy i, head h as the float of `dtype` nearest to c * scales[i, h].

    The error bound is that of `pack_blocks`. Raises as it does.
    """
    check_copy(source, source_offsets, destination, destination_offsets, packing.reach_to_unpack)
    check_scales(scales, len(source_offsets), packing.grid.heads)
    grid = packing.grid
    for i, (begin, end) in enumerate(zip(source_offsets, destination_offsets, strict=True)):
        codes = torch.from_numpy(items_at(source, begin, grid.source, _shape(grid, 1))[..., 0].copy())
        values = codes.view(torch.float8_e4m3fn).float() * torch.from_numpy(scales[i].copy())[:, None, None]
        items_at(destination, end, grid.destination, _shape(grid, grid.item_bytes))[:] = _bytes(values, packing.dtype)


def check_scales(scales: Scales, places: int, heads: int) -> None:
    """Raises ConfigError unless `scales` is float32 of shape (places, heads), row after row."""
    if scales.dtype != np.float32 or scales.shape != (places, heads) or not scales.flags.c_contiguous:
        raise ConfigError(f"scales must be float32 of shape {(places, heads)}; got {scales.dtype} of {scales.shape}")


def _shape(grid: Grid, item_bytes: int) -> tuple[int, int, int, int]:
    return grid.heads, grid.tokens, grid.channels, item_bytes


def _floats(items: Bytes, dtype: Float) -> torch.Tensor:
    """Shape (heads, tokens, channels), in float32."""
    return torch.from_numpy(items.copy()).view(getattr(torch, dtype))[..., 0].float()


def _bytes(values: torch.Tensor, dtype: Float) -> Bytes:
    """Shape (heads, tokens, channels, item bytes)."""
    items: Bytes = values.to(getattr(torch, dtype))[..., None].contiguous().view(torch.uint8).numpy()
    return items
