"""8-bit floats: the reference within its stated error, and numba's against the reference, to the last bit."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.errors import ConfigError
from vllm_llmd.kernels import block_pack, block_pack_cpu
from vllm_llmd.kernels.block_copy import Bytes, Grid, Offsets, Strides
from vllm_llmd.kernels.block_pack import ITEM_BYTES, Float, Packing, Scales

Pack = Callable[[Bytes, Offsets, Bytes, Offsets, Scales, Packing], None]


@dataclass(frozen=True)
class Implementation:
    pack: Pack
    unpack: Pack


REFERENCE = Implementation(block_pack.pack_blocks, block_pack.unpack_blocks)
NUMBA = Implementation(block_pack_cpu.pack_blocks, block_pack_cpu.unpack_blocks)

BOTH = pytest.mark.parametrize("made", [REFERENCE, NUMBA], ids=["reference", "numba"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", ITEM_BYTES)

MANTISSA_BITS: dict[Float, int] = {"float32": 23, "float16": 10, "bfloat16": 7}
SMALLEST_STEP: dict[Float, float] = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


@dataclass(frozen=True)
class Packed:
    """Of shape (copies, heads, items): codes and what they become again; scales of shape (copies, heads)."""

    codes: npt.NDArray[np.uint8]
    scales: Scales
    back: torch.Tensor


def through(made: Implementation, values: torch.Tensor) -> Packed:
    """Packs and unpacks dense values of shape (copies, heads, items)."""
    copies, heads, items = values.shape
    dtype: Float = str(values.dtype).removeprefix("torch.")  # type: ignore[assignment]
    wide = values.element_size()
    floats, codes = Strides(items * wide, 0, wide), Strides(items, 0, 1)
    source = values.contiguous().view(torch.uint8).reshape(-1).numpy()
    packed, back = np.zeros(values.numel(), np.uint8), np.zeros_like(source)
    scales = np.zeros((copies, heads), np.float32)
    at_floats = np.arange(copies, dtype=np.int64) * heads * items * wide
    at_codes = np.arange(copies, dtype=np.int64) * heads * items
    made.pack(source, at_floats, packed, at_codes, scales, Packing(Grid(heads, 1, items, wide, floats, codes), dtype))
    made.unpack(packed, at_codes, back, at_floats, scales, Packing(Grid(heads, 1, items, wide, codes, floats), dtype))
    return Packed(packed.reshape(values.shape), scales, torch.from_numpy(back).view(values.dtype).reshape(values.shape))


def every(dtype: Float) -> torch.Tensor:
    """Every number of 16 bits, NaN and infinities included, or a million of 32 bits; shape (copies, 1, 512)."""
    if dtype == "float32":
        bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.uint8)
    else:
        bits = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    return torch.from_numpy(bits).view(getattr(torch, dtype)).reshape(-1, 1, 512)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit; one NaN is as good as another."""
    width = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return bool(((one.view(width) == other.view(width)) | (one.isnan() & other.isnan())).all())


# --- rounding -----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_with_a_scale_of_one_every_number_is_rounded_as_torch_does(made: Implementation, dtype: Float) -> None:
    values = every(dtype).reshape(-1)
    values = values[values.abs() <= 448]
    values = torch.nn.functional.pad(values, (0, -len(values) % 127), value=448).reshape(-1, 1, 127)
    packed = through(made, torch.nn.functional.pad(values, (0, 1), value=448))
    assert (packed.scales == 1).all()
    expected = values.float().to(torch.float8_e4m3fn)
    assert np.array_equal(packed.codes[..., :-1], expected.view(torch.uint8).numpy())
    assert same(packed.back[..., :-1], expected.float().to(values.dtype))


@BOTH
def test_halves_between_two_codes_are_rounded_to_the_even_one(made: Implementation) -> None:
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[:-1] + codes[1:]) / 2
    around = torch.cat([halves, halves.nextafter(torch.tensor(0.0)), halves.nextafter(torch.tensor(999.0)), -halves])
    packed = through(made, torch.cat([around, torch.tensor([448.0])]).reshape(1, 1, -1))
    expected = around.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(packed.codes[0, 0, :-1], expected)


@EVERY_DTYPE
def test_numba_packs_and_unpacks_every_number_to_the_bits_of_the_reference(dtype: Float) -> None:
    expected, packed = through(REFERENCE, every(dtype)), through(NUMBA, every(dtype))
    assert np.array_equal(packed.codes, expected.codes)
    assert np.array_equal(packed.scales, expected.scales)
    assert same(packed.back, expected.back)


# --- what is promised -----------------------------------------------------------------------------------------------


@BOTH
@EVERY_DTYPE
@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-140, 120), spread=st.integers(0, 30))
def test_the_error_is_within_its_bound(
    made: Implementation, dtype: Float, seed: int, exponent: int, spread: int
) -> None:
    chance = torch.Generator().manual_seed(seed)
    sizes = 2.0 ** (exponent - spread * torch.rand(2, 3, 65, generator=chance, dtype=torch.float64))
    values = (torch.randn(2, 3, 65, generator=chance, dtype=torch.float64) * sizes).to(getattr(torch, dtype))
    largest = torch.finfo(values.dtype).max
    values = values.clamp(-largest, largest)
    packed = through(made, values)
    exact, back = values.double(), packed.back.double()
    scales = torch.from_numpy(packed.scales).double()[..., None]
    bound = torch.maximum(exact.abs() / 16, scales / 1024) * (1 + 2**-20)
    half_a_step = torch.clamp((exact.abs() + bound) * 2.0 ** -(1 + MANTISSA_BITS[dtype]), min=SMALLEST_STEP[dtype] / 2)
    assert ((back - exact).abs() <= bound + half_a_step).all()


@BOTH
@EVERY_DTYPE
def test_the_largest_magnitude_sets_the_scale_of_its_head_alone(made: Implementation, dtype: Float) -> None:
    values = torch.tensor([[[1.0, -896.0], [7.0, 3.5]]], dtype=getattr(torch, dtype))
    packed = through(made, values)
    assert packed.scales.tolist() == [[2.0, 1 / 64]]
    assert packed.codes[0, 0, 1] == 0xFE
    assert torch.equal(packed.back, values)


@BOTH
@EVERY_DTYPE
def test_zeros_stay_zeros_and_keep_their_sign(made: Implementation, dtype: Float) -> None:
    values = torch.tensor([[[0.0, -0.0, 0.0]]], dtype=getattr(torch, dtype))
    packed = through(made, values)
    assert packed.codes.tolist() == [[[0, 0x80, 0]]]
    assert packed.scales.tolist() == [[2.0**-126]]
    assert same(packed.back, values)


@BOTH
@EVERY_DTYPE
def test_no_finite_number_becomes_nan_or_infinite(made: Implementation, dtype: Float) -> None:
    values = every(dtype)
    values = values[values.isfinite()][: 1 << 15].reshape(-1, 1, 8)
    largest = torch.finfo(values.dtype).max
    assert through(made, values).back.isfinite().all()
    assert through(made, torch.full((1, 1, 3), largest, dtype=values.dtype)).back.tolist() == [[[largest] * 3]]


@BOTH
@EVERY_DTYPE
def test_infinities_become_the_largest_and_nan_touches_nothing_else(made: Implementation, dtype: Float) -> None:
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([[[3.5, inf, -inf, nan, 1.75], [nan, inf, nan, nan, nan]]], dtype=getattr(torch, dtype))
    packed = through(made, values)
    assert packed.codes.tolist()[0][0] == [0x7E, 0x7E, 0xFE, 0x7F, 0x76]
    assert packed.scales[0].tolist() == [3.5 / 448, 2.0**-126]
    assert packed.back[0, 0, [0, 1, 2, 4]].tolist() == [3.5, 3.5, -3.5, 1.75]
    assert packed.back.isnan().tolist() == values.isnan().tolist()


# --- places ----------------------------------------------------------------------------------------------------------


@EVERY_DTYPE
@pytest.mark.parametrize("order", ["htc", "thc", "hct"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 17, 33), (2, 128, 320)])
def test_numba_packs_in_any_order_and_touches_nothing_else(
    dtype: Float, order: str, shape: tuple[int, int, int]
) -> None:
    """Copies begin at odd bytes; the largest does not fit into the scratch twice."""
    sizes, wide, places = dict(zip("htc", shape, strict=True)), ITEM_BYTES[dtype], 4
    steps, step = {}, wide
    for axis in reversed(order):
        steps[axis], step = step, step * sizes[axis] + wide
    floats = Strides(*(steps[axis] for axis in "htc"))
    codes = Strides(shape[1] * shape[2] + 3, 1, shape[1])
    span = 3 + shape[0] * (shape[1] * shape[2] + 3)
    chance = np.random.default_rng(0)
    numbers = torch.from_numpy(chance.standard_normal(places * step // wide, dtype=np.float32)).to(
        getattr(torch, dtype)
    )
    source = np.concatenate([np.zeros(3, np.uint8), numbers.view(torch.uint8).numpy()])
    at_floats = 3 + np.array([2, 0, 3], dtype=np.int64) * step
    at_codes = 3 + np.array([1, 3, 0], dtype=np.int64) * span
    there = Packing(Grid(*shape, wide, floats, codes), dtype)
    back = Packing(Grid(*shape, wide, codes, floats), dtype)
    results = []
    for made in (REFERENCE, NUMBA):
        packed, scales = np.full(3 + places * span, 0xAA, np.uint8), np.zeros((3, shape[0]), np.float32)
        unpacked = np.full(len(source), 0xAA, np.uint8)
        made.pack(source, at_floats, packed, at_codes, scales, there)
        made.unpack(packed, at_codes, unpacked, at_floats, scales, back)
        results.append((packed, scales, unpacked))
    for expected, got in zip(*results, strict=True):
        assert np.array_equal(expected, got)


# --- what is refused --------------------------------------------------------------------------------------------------

DENSE = Packing(Grid(1, 1, 4, 2, Strides(8, 8, 2), Strides(4, 4, 1)), "float16")


def test_items_of_another_size_than_the_dtype_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="float32 has items of 4 bytes; got 2"):
        replace(DENSE, dtype="float32")


@BOTH
def test_places_and_scales_that_do_not_fit_are_refused(made: Implementation) -> None:
    memory, codes, scales = np.zeros(16, np.uint8), np.zeros(8, np.uint8), np.zeros((2, 1), np.float32)
    places = np.array([0, 8], dtype=np.int64)
    for pack in (made.pack, made.unpack):
        with pytest.raises(ConfigError, match="out of bounds"):
            pack(memory, places, codes, places, scales, DENSE)
        with pytest.raises(ConfigError, match=r"scales must be float32 of shape \(2, 1\)"):
            pack(memory, places, memory.copy(), places // 2, scales[:1], DENSE)
        with pytest.raises(ConfigError, match="got float64"):
            pack(memory, places, memory.copy(), places // 2, scales.astype(np.float64), DENSE)
        with pytest.raises(ConfigError, match="got 2 and 1"):
            pack(memory, places, codes, places[:1], scales, DENSE)


def test_scales_that_cannot_be_written_may_be_unpacked_by() -> None:
    scales = np.ones((1, 1), np.float32)
    scales.flags.writeable = False
    back, places = np.zeros(8, np.uint8), np.zeros(1, np.int64)
    packing = Packing(Grid(1, 1, 4, 2, Strides(4, 4, 1), Strides(8, 8, 2)), "float16")
    block_pack_cpu.unpack_blocks(np.full(4, 0x38, np.uint8), places, back, places, scales, packing)
    assert back.view(np.float16).tolist() == [1, 1, 1, 1]


def test_no_packing_needs_a_kernel_that_was_not_compiled_ahead() -> None:
    block_pack_cpu.compile_ahead()
    kernels = block_pack_cpu._pack, block_pack_cpu._unpack
    for dtype in ITEM_BYTES:
        through(NUMBA, torch.ones(2, 2, 3, dtype=getattr(torch, dtype)))
    assert [len(kernel.signatures) for kernel in kernels] == [1, 1]  # type: ignore[attr-defined]
    assert all(kernel.targetoptions["nogil"] for kernel in kernels)  # type: ignore[attr-defined]
