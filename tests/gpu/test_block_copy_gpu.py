"""Triton's copy and packing against the reference, on a GPU, or under TRITON_INTERPRET=1 on CPU tensors.

Interpreted, this says that the kernels are right, and nothing about the compiler, streams or speed.
"""

import os
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from vllm_llmd.errors import ConfigError
from vllm_llmd.kernels import block_copy, block_copy_triton, block_pack, block_pack_triton
from vllm_llmd.kernels.block_copy import Bytes, Grid, Offsets, Strides
from vllm_llmd.kernels.block_pack import ITEM_BYTES, Float, Packing

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="there is no GPU, and TRITON_INTERPRET is not 1"
)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")

HEADS, TOKENS, CHANNELS, BLOCKS = 3, 17, 40, 6
SLOTS = np.array([4, 0, 5, 1], dtype=np.int64)
ORDERS = {"HND": "htc", "NHD": "thc", "transposed": "hct"}


def block(order: str, item_bytes: int, gap_bytes: int = 0) -> tuple[Strides, int]:
    """Strides of a block whose axes stand in `order`, and the bytes from block to block."""
    sizes = {"h": HEADS, "t": TOKENS, "c": CHANNELS}
    steps, step = {}, item_bytes
    for axis in reversed(order):
        steps[axis], step = step, step * sizes[axis] + gap_bytes
    return Strides(*(steps[axis] for axis in "htc")), step


def random_bytes(size: int) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)


def here(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).to(DEVICE)


def assert_same_copy(source: Bytes, froms: Offsets, destination: Bytes, tos: Offsets, grid: Grid) -> None:
    """Also outside of what is copied, and wherever the offsets are."""
    expected = destination.copy()
    block_copy.copy_blocks(source, froms, expected, tos, grid)
    got = here(destination)
    block_copy_triton.copy_blocks(here(source), torch.from_numpy(froms), got, here(tos), grid)
    assert np.array_equal(got.cpu().numpy(), expected)


# --- copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item_bytes", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("order", "other"), list(product(ORDERS, ORDERS)))
def test_blocks_of_any_order_are_copied_into_any_other(order: str, other: str, item_bytes: int) -> None:
    (froms, from_block), (tos, to_block) = block(ORDERS[order], item_bytes), block(ORDERS[other], item_bytes)
    grid = Grid(HEADS, TOKENS, CHANNELS, item_bytes, froms, tos)
    source, destination = random_bytes(BLOCKS * from_block), random_bytes(BLOCKS * to_block)
    assert_same_copy(source, SLOTS * from_block, destination, SLOTS[::-1].copy() * to_block, grid)


@pytest.mark.parametrize(("first", "gap"), [(1, 0), (4, 0), (8, 0), (0, 1), (0, 2), (0, 8)])
@pytest.mark.parametrize("other", ORDERS)
def test_neither_offsets_nor_strides_need_any_alignment(other: str, first: int, gap: int) -> None:
    (froms, from_block), (tos, to_block) = block("htc", 4, gap), block(ORDERS[other], 4)
    grid = Grid(HEADS, TOKENS, CHANNELS, 4, froms, tos)
    apart = from_block + -from_block % 16
    source, destination = random_bytes(first + BLOCKS * apart), random_bytes(BLOCKS * to_block)
    assert_same_copy(source, first + SLOTS * apart, destination, SLOTS * to_block, grid)


@pytest.mark.parametrize("order", ORDERS)
def test_a_slice_of_heads_and_part_of_the_tokens_are_taken(order: str) -> None:
    froms, from_block = block(ORDERS[order], 2)
    grid = Grid(2, 5, CHANNELS, 2, froms, Strides(5 * CHANNELS * 2, CHANNELS * 2, 2))
    begins = SLOTS * from_block + froms.head + 7 * froms.token
    assert_same_copy(
        random_bytes(BLOCKS * from_block), begins, random_bytes(BLOCKS * grid.bytes), SLOTS * grid.bytes, grid
    )


def test_a_gather_that_is_scattered_back_changes_nothing() -> None:
    strides, size = block("thc", 2)
    run, run_size = block("htc", 2)
    cache, staging = here(random_bytes(BLOCKS * size)), here(np.zeros(len(SLOTS) * run_size, np.uint8))
    begins, dense = torch.from_numpy(SLOTS * size), torch.arange(len(SLOTS)) * run_size
    before = cache.clone()
    gather = Grid(HEADS, TOKENS, CHANNELS, 2, strides, run)
    block_copy_triton.copy_blocks(cache, begins, staging, dense, gather)
    for begin in begins.tolist():
        cache[begin : begin + size] = 0
    block_copy_triton.copy_blocks(staging, dense, cache, begins, replace(gather, source=run, destination=strides))
    assert torch.equal(cache, before)


def test_a_row_longer_than_a_tile_is_copied_to_its_end() -> None:
    size = 3 * 8 * block_copy_triton.TILE_COLUMNS + 8
    grid = Grid(1, 1, size // 8, 8, Strides(0, 0, 8), Strides(0, 0, 8))
    assert_same_copy(random_bytes(2 * size), np.array([0, size]), random_bytes(2 * size), np.array([size, 0]), grid)


def test_tiles_of_a_transposition_that_do_not_come_out_even_are_copied_to_their_ends() -> None:
    side = block_copy_triton.TRANSPOSED_SIDE + 3
    grid = Grid(2, side, side, 2, Strides(side * side * 2, side * 2, 2), Strides(side * side * 2, 2, side * 2))
    assert_same_copy(random_bytes(grid.bytes), np.array([0]), random_bytes(grid.bytes), np.array([0]), grid)


def test_compiling_ahead_copies_nothing_that_is_seen() -> None:
    strides, _ = block("htc", 2)
    block_copy_triton.compile_ahead(Grid(HEADS, TOKENS, CHANNELS, 2, strides, strides), DEVICE)


@on_a_gpu
def test_a_copy_waits_for_what_its_stream_did_before_and_later_work_waits_for_it() -> None:
    size = 1 << 26
    grid = Grid(1, 1, size // 8, 8, Strides(0, 0, 8), Strides(0, 0, 8))
    source, middle, end = (torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(3))
    stream, nowhere = torch.cuda.Stream(), torch.zeros(1, dtype=torch.int64)
    block_copy_triton.compile_ahead(grid, DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for value in range(1, 6):
            torch.cuda._sleep(10_000_000)
            source.fill_(value)
            block_copy_triton.copy_blocks(source, nowhere, middle, nowhere, grid)
            source.fill_(0)
            end.copy_(middle)
        done = stream.record_event()
    done.synchronize()
    assert bool((end == 5).all())


@on_a_gpu
def test_offsets_beyond_four_gigabytes_are_reached() -> None:
    far = (1 << 32) + (1 << 20)
    if torch.cuda.mem_get_info()[0] < 2 * far:
        pytest.skip("needs 9 GB of GPU memory")
    strides, size = block("htc", 2)
    memory, out = torch.zeros(far + size, dtype=torch.uint8, device=DEVICE), here(np.zeros(size, np.uint8))
    memory[far:] = here(random_bytes(size))
    block_copy_triton.copy_blocks(
        memory, torch.tensor([far]), out, torch.tensor([0]), Grid(HEADS, TOKENS, CHANNELS, 2, strides, strides)
    )
    assert torch.equal(out, memory[far:])


# --- 8-bit floats ----------------------------------------------------------------------------------------------------


def numbers(dtype: Float, count: int) -> Bytes:
    """Of all sizes, some of them infinite or NaN."""
    with np.errstate(all="ignore"):
        bits = random_bytes(count * 4).view(np.uint32)
        return torch.from_numpy(bits.view(np.float32)).to(getattr(torch, dtype)).view(torch.uint8).numpy().copy()


def one_nan(floats: torch.Tensor, dtype: Float) -> Bytes:
    values = floats.cpu().view(getattr(torch, dtype)).clone()
    values[values.isnan()] = float("nan")
    return values.view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("order", ORDERS)
def test_packing_and_unpacking_are_those_of_the_reference_to_the_bit(dtype: Float, order: str) -> None:
    (floats, float_block), (codes, code_block) = block(ORDERS[order], ITEM_BYTES[dtype]), block("htc", 1, 3)
    there = Packing(Grid(HEADS, TOKENS, CHANNELS, ITEM_BYTES[dtype], floats, codes), dtype)
    back = Packing(replace(there.grid, source=codes, destination=floats), dtype)
    source, packed = numbers(dtype, BLOCKS * HEADS * TOKENS * CHANNELS), random_bytes(BLOCKS * code_block)
    scales, unpacked = np.zeros((len(SLOTS), HEADS), np.float32), np.zeros_like(source)
    places = SLOTS * float_block, SLOTS[::-1].copy() * code_block
    got = here(packed), here(scales), here(unpacked)
    block_pack.pack_blocks(source, places[0], packed, places[1], scales, there)
    block_pack.unpack_blocks(packed, places[1], unpacked, places[0], scales, back)
    on_device = [torch.from_numpy(place) for place in places]
    with np.errstate(all="ignore"):
        block_pack_triton.pack_blocks(here(source), on_device[0], got[0], on_device[1], got[1], there)
        block_pack_triton.unpack_blocks(got[0], on_device[1], got[2], on_device[0], got[1], back)
    assert np.array_equal(got[0].cpu().numpy(), packed)
    assert np.array_equal(got[1].cpu().numpy(), scales)
    assert np.array_equal(one_nan(got[2], dtype), one_nan(torch.from_numpy(unpacked), dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_16_bits_is_packed_as_the_reference_does(dtype: Float) -> None:
    source = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    copies, heads, items = 4, 8, 2048
    grid = Grid(heads, 1, items, 2, Strides(items * 2, 0, 2), Strides(items, 0, 1))
    begins = torch.arange(copies) * heads * items
    codes, scales = np.zeros(1 << 16, np.uint8), np.zeros((copies, heads), np.float32)
    got, got_scales = here(codes), here(scales)
    block_pack.pack_blocks(source, (2 * begins).numpy(), codes, begins.numpy(), scales, Packing(grid, dtype))
    with np.errstate(all="ignore"):
        block_pack_triton.pack_blocks(here(source), 2 * begins, got, begins, got_scales, Packing(grid, dtype))
    assert np.array_equal(got.cpu().numpy(), codes)
    assert np.array_equal(got_scales.cpu().numpy(), scales)


# --- what is refused --------------------------------------------------------------------------------------------------

GRID = Grid(1, 2, 4, 2, Strides(16, 8, 2), Strides(16, 8, 2))
NOWHERE = torch.zeros(1, dtype=torch.int64)


def flat(size: int = 64) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("source offsets 49 to 49 are out of bounds", lambda: (flat(), NOWHERE + 49, flat(), NOWHERE)),
        ("destination offsets -1 to -1 are", lambda: (flat(), NOWHERE, flat(), NOWHERE - 1)),
        ("got 1 and 2", lambda: (flat(), NOWHERE, flat(), NOWHERE.repeat(2))),
        ("source must be flat memory of uint8", lambda: (flat().view(torch.int8), NOWHERE, flat(), NOWHERE)),
        ("destination must be flat", lambda: (flat(), NOWHERE, flat().reshape(2, 32), NOWHERE)),
        ("int64", lambda: (flat(), NOWHERE.int(), flat(), NOWHERE)),
        ("one device", lambda: (flat(), NOWHERE, flat().to("meta"), NOWHERE)),
    ],
)
def test_what_does_not_fit_is_refused(message: str, arguments: object) -> None:
    with pytest.raises(ConfigError, match=message):
        block_copy_triton.copy_blocks(*arguments(), GRID)  # type: ignore[operator]


def test_no_place_is_no_copy() -> None:
    block_copy_triton.copy_blocks(flat(), NOWHERE[:0], flat(), NOWHERE[:0], GRID)


def test_floats_that_are_not_aligned_and_scales_that_do_not_fit_are_refused() -> None:
    packing = Packing(replace(GRID, destination=Strides(8, 4, 1)), "float16")
    scales = torch.zeros(1, 1, device=DEVICE)
    with pytest.raises(ConfigError, match="every float16 must be at a multiple of 2 bytes"):
        block_pack_triton.pack_blocks(flat(), NOWHERE + 1, flat(), NOWHERE, scales, packing)
    with pytest.raises(ConfigError, match=r"scales must be float32 of shape \(1, 1\)"):
        block_pack_triton.pack_blocks(flat(), NOWHERE, flat(), NOWHERE, scales[0], packing)
