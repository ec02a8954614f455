"""The strided copy: the reference against a copy byte by byte, and numba's against the reference, at odd sizes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.errors import ConfigError
from vllm_llmd.kernels import block_copy, block_copy_cpu, memory_cpu
from vllm_llmd.kernels.block_copy import ITEM_BYTES, Bytes, Grid, Offsets, Strides
from vllm_llmd.kernels.block_loops import ONCE, Axis, Loops, loops_of

Copy = Callable[[Bytes, Offsets, Bytes, Offsets, Grid], None]

COPIES: dict[str, Copy] = {"reference": block_copy.copy_blocks, "numba": block_copy_cpu.copy_blocks}

PLACES = 5


@dataclass(frozen=True)
class Places:
    """Where copies begin, so far apart that they do not overlap, in memory of `size` bytes."""

    offsets: Offsets
    size: int


@dataclass(frozen=True)
class Case:
    grid: Grid
    source: Places
    destination: Places

    def memories(self) -> tuple[Bytes, Bytes]:
        chance = np.random.default_rng(0)
        sizes = self.source.size, self.destination.size
        source, destination = (chance.integers(0, 256, size, dtype=np.uint8) for size in sizes)
        return source, destination


@st.composite
def strides(draw: st.DrawFn, counts: tuple[int, int, int], item_bytes: int) -> Strides:
    """Of a block with its axes in any order, with gaps anywhere."""
    steps = [0, 0, 0]
    step = item_bytes
    for axis in draw(st.permutations([2, 1, 0])):
        steps[axis] = step
        step = step * counts[axis] + draw(st.sampled_from([0, 0, 0, item_bytes, 1]))
    return Strides(*steps)


@st.composite
def places(draw: st.DrawFn, grid: Grid, of: Strides) -> Places:
    low, end = block_copy.Reach.of(grid, of, grid.item_bytes).low, block_copy.Reach.of(grid, of, grid.item_bytes).end
    first = draw(st.integers(0, 3)) - low
    slots = draw(st.permutations(range(PLACES)))[: draw(st.integers(0, PLACES))]
    return Places(first + np.array(slots, dtype=np.int64) * (end - low), first + PLACES * (end - low))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    counts = draw(st.tuples(st.integers(1, 4), st.integers(1, 35), st.integers(1, 35)))
    item_bytes = draw(st.sampled_from(ITEM_BYTES))
    froms, tos = draw(strides(counts, item_bytes)), draw(strides(counts, item_bytes))
    if draw(st.booleans()):
        froms = replace(froms, token=-froms.token)
    grid = Grid(*counts, item_bytes, froms, tos)
    source, destination = draw(places(grid, froms)), draw(places(grid, tos))
    both = min(len(source.offsets), len(destination.offsets))
    return Case(
        grid, replace(source, offsets=source.offsets[:both]), replace(destination, offsets=destination.offsets[:both])
    )


def touched(offsets: Offsets, grid: Grid, of: Strides) -> list[int]:
    """Every byte of every item, in order."""
    items = product(offsets.tolist(), range(grid.heads), range(grid.tokens), range(grid.channels))
    starts = [offset + h * of.head + t * of.token + c * of.channel for offset, h, t, c in items]
    return [start + byte for start in starts for byte in range(grid.item_bytes)]


# --- what a copy is ---------------------------------------------------------------------------------------------


@given(cases())
def test_the_reference_copies_byte_for_byte_and_touches_nothing_else(case: Case) -> None:
    source, destination = case.memories()
    expected = destination.copy()
    froms = touched(case.source.offsets, case.grid, case.grid.source)
    expected[touched(case.destination.offsets, case.grid, case.grid.destination)] = source[froms]
    block_copy.copy_blocks(source, case.source.offsets, destination, case.destination.offsets, case.grid)
    assert np.array_equal(destination, expected)


@given(cases())
def test_numba_copies_as_the_reference_does(case: Case) -> None:
    source, expected = case.memories()
    destination = expected.copy()
    block_copy.copy_blocks(source, case.source.offsets, expected, case.destination.offsets, case.grid)
    block_copy_cpu.copy_blocks(source, case.source.offsets, destination, case.destination.offsets, case.grid)
    assert np.array_equal(destination, expected)


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
@given(cases())
def test_a_gather_that_is_scattered_back_changes_nothing(copy: Copy, case: Case) -> None:
    source, destination = case.memories()
    before = source.copy()
    back = replace(case.grid, source=case.grid.destination, destination=case.grid.source)
    copy(source, case.source.offsets, destination, case.destination.offsets, case.grid)
    taken = source.copy()
    taken[touched(case.source.offsets, case.grid, case.grid.source)] = 0
    copy(destination, case.destination.offsets, taken, case.source.offsets, back)
    assert np.array_equal(taken, before)


# --- what it is for -----------------------------------------------------------------------------------------------

HEADS, TOKENS, CHANNELS, BLOCKS = 4, 6, 10, 7


def cache(*shape: int) -> npt.NDArray[np.uint16]:
    """Every item different."""
    return np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)


def strides_of(block: npt.NDArray[np.uint16], order: str) -> Strides:
    """`order` names the axes of a block: h, t and c."""
    return Strides(*(block.strides[order.index(axis)] for axis in "htc"))


def flat(array: npt.NDArray[np.uint16]) -> Bytes:
    return array.reshape(-1).view(np.uint8)


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_scattered_blocks_of_all_layers_are_gathered_into_one_run(copy: Copy) -> None:
    layers = cache(3, BLOCKS, HEADS, TOKENS, CHANNELS)
    run = np.zeros((6, HEADS, TOKENS, CHANNELS), np.uint16)
    grid = Grid(HEADS, TOKENS, CHANNELS, 2, strides_of(layers[0, 0], "htc"), strides_of(run[0], "htc"))
    begins = [layer * layers.strides[0] + block * layers.strides[1] for layer in range(3) for block in (5, 2)]
    copy(flat(layers), np.array(begins), flat(run), np.arange(6) * run.strides[0], grid)
    assert np.array_equal(run, layers[:, [5, 2]].reshape(run.shape))


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_slice_of_heads_with_tokens_outermost_is_taken(copy: Copy) -> None:
    whole, part = cache(BLOCKS, TOKENS, HEADS, CHANNELS), np.zeros((2, 2, TOKENS, CHANNELS), np.uint16)
    grid = Grid(2, TOKENS, CHANNELS, 2, strides_of(whole[0], "thc"), strides_of(part[0], "htc"))
    begins = np.array([6, 3]) * whole.strides[0] + 1 * whole.strides[2]
    copy(flat(whole), begins, flat(part), np.arange(2) * part.strides[0], grid)
    assert np.array_equal(part, whole[[6, 3], :, 1:3].swapaxes(1, 2))


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_block_of_six_tokens_becomes_two_of_three(copy: Copy) -> None:
    large, small = cache(BLOCKS, HEADS, 6, CHANNELS), np.zeros((2, HEADS, 3, CHANNELS), np.uint16)
    grid = Grid(HEADS, 3, CHANNELS, 2, strides_of(large[0], "htc"), strides_of(small[0], "htc"))
    begins = 4 * large.strides[0] + np.arange(2) * 3 * large.strides[2]
    copy(flat(large), begins, flat(small), np.arange(2) * small.strides[0], grid)
    assert np.array_equal(small, np.stack([large[4, :, :3], large[4, :, 3:]]))


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("tokens", [1, 8, 9, 33])
@pytest.mark.parametrize("item", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_keys_are_transposed(copy: Copy, tokens: int, item: type[np.unsignedinteger]) -> None:
    plain = np.arange(BLOCKS * HEADS * tokens * 37).astype(item).reshape(BLOCKS, HEADS, tokens, 37)
    keys = np.zeros((BLOCKS, HEADS, 37, tokens), item)
    grid = Grid(HEADS, tokens, 37, plain.itemsize, strides_of(plain[0], "htc"), strides_of(keys[0], "hct"))
    copy(flat(plain), np.arange(BLOCKS) * plain.strides[0], flat(keys), np.arange(BLOCKS)[::-1] * keys.strides[0], grid)
    assert np.array_equal(keys, plain[::-1].swapaxes(2, 3))


# --- loops ---------------------------------------------------------------------------------------------------------

HND, NHD, TRANSPOSED = Strides(2048, 128, 2), Strides(128, 1024, 2), Strides(2048, 2, 32)


def test_what_is_contiguous_on_both_sides_is_one_run() -> None:
    assert loops_of(Grid(8, 16, 64, 2, HND, HND)) == Loops((ONCE, ONCE, ONCE), 16384)
    assert loops_of(Grid(8, 16, 64, 2, HND, NHD)) == Loops((ONCE, Axis(16, 128, 1024), Axis(8, 2048, 128)), 128)


def test_keys_that_are_transposed_on_both_sides_are_runs() -> None:
    assert loops_of(Grid(8, 16, 64, 2, TRANSPOSED, TRANSPOSED)).run_bytes == 16384


def test_a_transposition_has_its_two_axes_innermost_in_both_directions() -> None:
    there, back = loops_of(Grid(8, 16, 64, 2, HND, TRANSPOSED)), loops_of(Grid(8, 16, 64, 2, TRANSPOSED, HND))
    assert there == Loops((Axis(8, 2048, 2048), Axis(64, 2, 32), Axis(16, 128, 2)), 2)
    assert back == Loops((Axis(8, 2048, 2048), Axis(16, 2, 128), Axis(64, 32, 2)), 2)
    assert there.transposed
    assert back.transposed
    assert not loops_of(Grid(8, 16, 64, 2, HND, HND)).transposed


# --- what is refused -------------------------------------------------------------------------------------------------

GRID = Grid(1, 2, 4, 2, Strides(16, 8, 2), Strides(16, 8, 2))
FLAT = np.zeros(64, np.uint8)


def at(*offsets: int) -> Offsets:
    return np.array(offsets, dtype=np.int64)


def refused(copy: Copy, message: str, *arguments: object) -> None:
    with pytest.raises(ConfigError, match=message):
        copy(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_copy_that_leaves_its_memory_is_refused(copy: Copy) -> None:
    refused(copy, "source offsets -1 to 0 are out of bounds", FLAT, at(-1, 0), FLAT.copy(), at(0, 16), GRID)
    refused(copy, "destination offsets 0 to 49 .* has 64", FLAT, at(0, 16), FLAT.copy(), at(49, 0), GRID)
    backwards = replace(GRID, source=Strides(16, -8, 2))
    refused(copy, "touches bytes -8 to 8", FLAT, at(7), FLAT.copy(), at(0), backwards)
    copy(FLAT, at(8, 48), FLAT.copy(), at(0, 48), GRID)


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_an_offset_near_the_end_of_the_numbers_is_refused(copy: Copy) -> None:
    refused(copy, "out of bounds", FLAT, at(2**63 - 1), FLAT.copy(), at(0), GRID)


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_offsets_that_do_not_pair_up_are_refused(copy: Copy) -> None:
    refused(copy, "got 2 and 1", FLAT, at(0, 16), FLAT.copy(), at(0), GRID)


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_memory_and_offsets_of_another_kind_are_refused(copy: Copy) -> None:
    refused(copy, "source must be flat memory of uint8", FLAT.view(np.int8), at(0), FLAT.copy(), at(0), GRID)
    refused(copy, "destination must be flat memory", FLAT, at(0), FLAT.copy().reshape(2, 32), at(0), GRID)
    refused(copy, "source must be flat", FLAT[::2], at(0), FLAT.copy(), at(0), GRID)
    refused(copy, "int64", FLAT, at(0).astype(np.int32), FLAT.copy(), at(0), GRID)
    refused(copy, "shape", FLAT, at(0), FLAT.copy(), at(0).reshape(1, 1), GRID)


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_destination_that_cannot_be_written_is_refused_and_a_source_may_be_so(copy: Copy) -> None:
    fixed = np.zeros(64, np.uint8)
    fixed.flags.writeable = False
    refused(copy, "writable", FLAT, at(0), fixed, at(0), GRID)
    copy(fixed, at(0), FLAT.copy(), at(0), GRID)


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_no_place_is_no_copy(copy: Copy) -> None:
    destination = FLAT.copy()
    copy(np.zeros(0, np.uint8), at(), destination, at(), GRID)
    assert np.array_equal(destination, FLAT)


@pytest.mark.parametrize("item_bytes", [0, 3, 32])
def test_an_item_size_that_no_kernel_has_is_refused(item_bytes: int) -> None:
    with pytest.raises(ConfigError, match=f"item_bytes must be one of .* got {item_bytes}"):
        replace(GRID, item_bytes=item_bytes)


def test_an_empty_grid_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        replace(GRID, tokens=0)


# --- numba -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["_copy_runs", "_copy_items", "_copy_transposed"])
def test_no_kernel_holds_the_gil_and_each_is_compiled_ahead(kernel: str) -> None:
    block_copy_cpu.compile_ahead()
    dispatcher = getattr(block_copy_cpu, kernel)
    assert dispatcher.targetoptions["nogil"]
    assert len(dispatcher.signatures) == {"_copy_runs": 1, "_copy_items": 5, "_copy_transposed": 4}[kernel]


def test_no_copy_needs_a_kernel_that_was_not_compiled_ahead() -> None:
    block_copy_cpu.compile_ahead()
    kernels = block_copy_cpu._copy_runs, block_copy_cpu._copy_items, block_copy_cpu._copy_transposed
    before = [len(kernel.signatures) for kernel in kernels]  # type: ignore[attr-defined]
    fixed = at(0)
    fixed.flags.writeable = False
    for froms, item_bytes in product((GRID.source, Strides(0, 2, 4), Strides(0, 40, 1)), (1, 2, 4, 8, 16)):
        grid = replace(GRID, source=froms, item_bytes=item_bytes, destination=Strides(0, 16, 64))
        block_copy_cpu.copy_blocks(np.zeros(999, np.uint8), fixed, np.zeros(999, np.uint8), fixed, grid)
    assert [len(kernel.signatures) for kernel in kernels] == before  # type: ignore[attr-defined]


def test_what_numba_has_kept_is_used_until_any_file_of_kernels_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def one_more(number: int) -> int:
        return number + 1

    def calls_that_hit() -> int:
        kernel = memory_cpu.compiled(one_more)
        assert kernel(1) == 2
        return sum(kernel.stats.cache_hits.values())  # type: ignore[attr-defined]

    one_state, another = tmp_path / "one_state.py", tmp_path / "another.py"
    one_state.touch()
    another.touch()
    monkeypatch.setattr(memory_cpu, "SOURCES", (one_state,))
    calls_that_hit()
    assert calls_that_hit() == 1
    monkeypatch.setattr(memory_cpu, "SOURCES", (another,))
    assert calls_that_hit() == 0
