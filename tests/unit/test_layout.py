"""Block ids to byte runs, against the plainest possible copy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.errors import ConfigError
from vllm_llmd.kv_connector.layout import BlockPair, Region, TensorView, pack_regions, read_runs, regions_of

SHAPES = {
    "blocks outermost": ((6, 2, 4, 8), (64, 32, 8, 1)),
    "keys and values apart": ((2, 6, 4, 8), (6 * 32, 32, 8, 1)),
    "layers inside a block": ((6, 2, 4, 8), (256, 32, 8, 1)),
}


def view(name: str, address: int = 4096) -> TensorView:
    shape, strides = SHAPES[name]
    return TensorView(address, shape, strides, itemsize=2)


def test_a_layer_with_blocks_outermost_is_one_dense_region() -> None:
    assert regions_of(view("blocks outermost"), 6) == [Region(4096, 128, 128)]


def test_keys_and_values_apart_are_two_regions() -> None:
    assert regions_of(view("keys and values apart"), 6) == [Region(4096, 64, 64), Region(4096 + 6 * 64, 64, 64)]


def test_blocks_of_interleaved_layers_keep_their_wide_stride() -> None:
    assert regions_of(view("layers inside a block"), 6) == [Region(4096, 512, 128)]


def test_heads_outside_the_blocks_are_a_region_each() -> None:
    heads_first = TensorView(0, (3, 6, 4, 8), (6 * 32, 32, 8, 1), itemsize=1)
    assert [region.base for region in regions_of(heads_first, 6)] == [0, 192, 384]


def test_a_block_with_holes_is_refused() -> None:
    with pytest.raises(ConfigError, match="contiguous"):
        regions_of(TensorView(0, (6, 4, 8), (64, 16, 1), itemsize=2), 6)


def test_a_cache_without_a_block_dimension_is_refused() -> None:
    with pytest.raises(ConfigError, match="7 blocks"):
        regions_of(view("blocks outermost"), 7)


def test_consecutive_blocks_of_dense_regions_are_one_run() -> None:
    dense = pack_regions([Region(1000, 10, 10), Region(5000, 10, 10)], 20, 0, "DRAM")
    pairs = [BlockPair(remote=r, local=d) for r, d in ((4, 9), (5, 10), (6, 12))]
    local, remote = read_runs(dense, dense, pairs)
    assert local[:, :2].tolist() == [[1090, 20], [1120, 10], [5090, 20], [5120, 10]]
    assert remote[:, :2].tolist() == [[1040, 20], [1060, 10], [5040, 20], [5060, 10]]


def test_different_kinds_of_cache_are_refused() -> None:
    one, other = (pack_regions([Region(0, n, n)], 4, 0, "DRAM") for n in (8, 16))
    with pytest.raises(ConfigError, match="differ"):
        read_runs(one, other, [BlockPair(0, 0)])


@pytest.mark.parametrize("pair", [BlockPair(4, 0), BlockPair(0, 4), BlockPair(-1, 0)])
def test_a_block_out_of_range_is_refused(pair: BlockPair) -> None:
    regions = pack_regions([Region(0, 8, 8)], 4, 0, "DRAM")
    with pytest.raises(ConfigError, match="out of range"):
        read_runs(regions, regions, [pair])


@given(
    name=st.sampled_from(sorted(SHAPES)),
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6, unique_by=lambda p: p[1]),
)
def test_runs_copy_exactly_the_blocks_asked_for(name: str, pairs: list[tuple[int, int]]) -> None:
    shape, strides = SHAPES[name]
    size = (max(s * (n - 1) for s, n in zip(strides, shape, strict=True)) + 4096) * 2
    source = np.random.default_rng(1).integers(0, 255, size, dtype=np.uint8)
    target, expected = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    regions = pack_regions(regions_of(TensorView(0, shape, strides, 2), 6), 6, 0, "DRAM")
    for remote_block, local_block in pairs:
        for base, stride, length in zip(regions.bases, regions.strides, regions.block_bytes, strict=True):
            start, end = base + remote_block * stride, base + local_block * stride
            expected[end : end + length] = source[start : start + length]
    local, remote = read_runs(regions, regions, [BlockPair(remote=r, local=d) for r, d in pairs])
    for (to, length, _), (start, _, _) in zip(local.astype(int), remote.astype(int), strict=True):
        target[to : to + length] = source[start : start + length]
    assert (target == expected).all()
