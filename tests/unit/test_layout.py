"""Where blocks lie, from the strides of a cache's tensors."""

import pytest

from vllm_llmd.errors import ConfigError
from vllm_llmd.kv_connector.layout import LayerView, Memory, Order, TensorView, pack_regions, regions_of
from vllm_llmd.wire import Component, Interior

SHAPES = {
    "blocks outermost": ((6, 2, 4, 8), (64, 32, 8, 1)),
    "keys and values apart": ((2, 6, 4, 8), (6 * 32, 32, 8, 1)),
    "layers inside a block": ((6, 2, 4, 8), (256, 32, 8, 1)),
}


def view(name: str, address: int = 4096) -> TensorView:
    shape, strides = SHAPES[name]
    return TensorView(address, shape, strides, itemsize=2)


def places(name: str, order: Order = "opaque") -> list[tuple[int, int, int]]:
    return [(region.base, region.stride, region.block_bytes) for region in regions_of(view(name), 6, order)]


def test_a_layer_with_blocks_outermost_is_one_dense_region() -> None:
    assert places("blocks outermost") == [(4096, 128, 128)]


def test_keys_and_values_apart_are_two_regions_of_whole_blocks() -> None:
    assert places("keys and values apart") == [(4096, 64, 64), (4096 + 6 * 64, 64, 64)]
    assert {region.interior.tokens for region in regions_of(view("keys and values apart"), 6, "cells")} == {0}


def test_blocks_of_interleaved_layers_keep_their_wide_stride() -> None:
    assert places("layers inside a block") == [(4096, 512, 128)]


@pytest.mark.parametrize(
    ("order", "components"),
    [
        ("cells", [Component(0, 64, 16, 2, 8, 2)]),
        ("keys transposed", [Component(0, 64, 2, 8, 4, 2), Component(32, 64, 8, 2, 4, 2)]),
        ("opaque", []),
    ],
)
def test_heads_outermost_are_runs_whatever_stands_in_them(order: Order, components: list[Component]) -> None:
    (region,) = regions_of(view("blocks outermost"), 6, order)
    assert region.interior == Interior(2, 4, 64, components)


def test_tokens_outermost_leave_heads_in_pieces() -> None:
    tokens_first = TensorView(0, (6, 2, 4, 8), (64, 8, 16, 1), itemsize=2)
    (region,) = regions_of(tokens_first, 6, "cells")
    assert region.interior == Interior(2, 4, 0, [Component(0, 16, 32, 2, 8, 2)])
    with pytest.raises(ConfigError, match="one contiguous run"):
        regions_of(tokens_first, 6, "keys transposed")


def test_regions_travel_with_each_interior_told_once() -> None:
    layers = [LayerView(layer, layer % 2, view("blocks outermost", 4096 * layer), "cells") for layer in range(4)]
    packed = pack_regions(layers, Memory(6, "DRAM", 0))
    assert (packed.layers, packed.groups, packed.kinds) == ([0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 0, 0])
    assert packed.interiors == [Interior(2, 4, 64, [Component(0, 64, 16, 2, 8, 2)])]
    assert packed.bases == [0, 4096, 8192, 12288]


def test_heads_outside_the_blocks_are_a_region_each() -> None:
    heads_first = TensorView(0, (3, 6, 4, 8), (6 * 32, 32, 8, 1), itemsize=1)
    assert [region.base for region in regions_of(heads_first, 6)] == [0, 192, 384]


def test_a_block_with_holes_is_refused() -> None:
    with pytest.raises(ConfigError, match="contiguous"):
        regions_of(TensorView(0, (6, 4, 8), (64, 16, 1), itemsize=2), 6)


def test_a_cache_without_a_block_dimension_is_refused() -> None:
    with pytest.raises(ConfigError, match="7 blocks"):
        regions_of(view("blocks outermost"), 7)
