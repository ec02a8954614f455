"""Cells to bytes, between caches of any two cuts: checked against what every byte should hold in the end."""

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.errors import ConfigError
from vllm_llmd.kv_connector.bridge import Bridge, ReadWork, merge
from vllm_llmd.kv_connector.layout import CellCopy, LayerView, Memory, Order, Runs, TensorView, pack_regions
from vllm_llmd.kv_connector.reads import batches
from vllm_llmd.kv_connector.staging import HostStaging
from vllm_llmd.kv_connector.topology import HeadSlice
from vllm_llmd.wire import Regions

BLOCKS, LAYERS, CHANNELS = 6, 3, 8
"""Channels of keys and values together."""

LAYOUTS = ("layers, blocks, heads, tokens", "blocks, layers, heads, tokens", "layers, blocks, tokens, heads")


@dataclass
class Cache:
    """A cache of one rank; `values` is its memory seen as (layer, block, head, token, channel) of float32."""

    regions: Regions
    memory: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]
    order: Order

    def content(self) -> npt.NDArray[np.float32]:
        """What it means, as (layer, block, head, token, channel), keys first, whatever the order of bytes."""
        if self.order == "cells":
            return self.values
        heads, tokens = self.values.shape[2:4]
        inside = self.values.reshape(LAYERS, BLOCKS, heads, 2, tokens * CHANNELS // 2)
        keys = inside[..., 0, :].reshape(LAYERS, BLOCKS, heads, CHANNELS // 2, tokens).swapaxes(-1, -2)
        values = inside[..., 1, :].reshape(LAYERS, BLOCKS, heads, tokens, CHANNELS // 2)
        return np.concatenate([keys, values], axis=-1)


def cache(layout: str, heads: int, tokens: int, order: Order = "cells") -> Cache:
    sizes = {"layers": LAYERS, "blocks": BLOCKS, "heads": heads, "tokens": tokens}
    names = layout.split(", ")
    memory = np.zeros((*(sizes[name] for name in names), CHANNELS), dtype=np.float32)
    axes = [names.index(name) for name in ("layers", "blocks", "heads", "tokens")]
    values = memory.transpose(*axes, 4)
    views = []
    for layer in range(LAYERS):
        one = values[layer]
        strides = tuple(stride // 4 for stride in one.strides)
        views.append(LayerView(layer, 0, TensorView(one.ctypes.data, one.shape, strides, 4), order))
    return Cache(pack_regions(views, Memory(BLOCKS, "DRAM", 0)), memory, values, order)


def carry_out(work: ReadWork) -> None:
    copy(work.local, work.remote)
    staging = HostStaging()
    for batch in batches(work.staged):
        local = batch.remote.copy()
        local[:, 0] = np.uint64(staging.address) + batch.offsets
        copy(local, batch.remote)
        assert staging.place(0, batch.placements)()


def copy(local: Runs, remote: Runs) -> None:
    for (to, length, _), (start, _, _) in zip(local.tolist(), remote.tolist(), strict=True):
        ctypes.memmove(to, start, length)


def filled(layout: str, heads: int, tokens: int, order: Order) -> Cache:
    made = cache(layout, heads, tokens, order)
    made.memory[:] = np.arange(made.memory.size, dtype=np.float32).reshape(made.memory.shape) + 1
    return made


@given(
    here=st.sampled_from(LAYOUTS),
    there=st.sampled_from(LAYOUTS),
    sizes=st.sampled_from([(4, 4), (2, 4), (4, 2), (6, 2)]),
    part=st.sampled_from([None, HeadSlice(0, 1, 1), HeadSlice(1, 0, 2), HeadSlice(2, 1, 1)]),
    order=st.sampled_from(["cells", "keys transposed"]),
    layers=st.sampled_from([(0, 0), (0, 1), (1, 3)]),
    data=st.data(),
)
def test_a_read_puts_exactly_the_cells_asked_for_in_place(
    here: str,
    there: str,
    sizes: tuple[int, int],
    part: HeadSlice | None,
    order: Order,
    layers: tuple[int, int],
    data: st.DataObject,
) -> None:
    if order == "keys transposed":
        here, there = LAYOUTS[0], LAYOUTS[1]
    heads = (3, 3) if part is None else (2, 3)
    local, remote = cache(here, heads[0], sizes[0], order), filled(there, heads[1], sizes[1], order)
    cell = min(sizes)
    ours = data.draw(
        st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(0, sizes[0] // cell - 1)), min_size=1, unique=True)
    )
    theirs = [data.draw(st.tuples(st.integers(0, BLOCKS - 1), st.integers(0, sizes[1] // cell - 1))) for _ in ours]
    cells = [CellCopy(0, b, p, a, q) for (a, q), (b, p) in zip(ours, theirs, strict=True)]
    expected = np.zeros_like(local.content())
    first, end = layers if layers[1] else (0, LAYERS)
    got = part or HeadSlice(0, 0, 3)
    for each in cells:
        expected[
            first:end,
            each.local,
            got.destination_first : got.destination_first + got.count,
            each.local_part * cell : (each.local_part + 1) * cell,
        ] = remote.content()[
            first:end,
            each.remote,
            got.source_first : got.source_first + got.count,
            each.remote_part * cell : (each.remote_part + 1) * cell,
        ]
    work = Bridge(local.regions, remote.regions, part).plan(cells, *layers)
    carry_out(work)
    assert (local.content() == expected).all()
    assert work.bytes == len(cells) * (end - first) * got.count * cell * CHANNELS * 4


def test_blocks_with_all_layers_side_by_side_are_one_run_each() -> None:
    local, remote = cache(LAYOUTS[1], 2, 4), cache(LAYOUTS[1], 2, 4)
    work = Bridge(local.regions, remote.regions, None).plan([CellCopy(0, r, 0, d, 0) for r, d in ((5, 1), (2, 3))])
    block = LAYERS * 2 * 4 * CHANNELS * 4
    assert work.local[:, 1].tolist() == [block, block]


def test_blocks_that_follow_each_other_on_both_sides_are_one_run() -> None:
    local, remote = cache(LAYOUTS[0], 2, 4), cache(LAYOUTS[0], 2, 4)
    work = Bridge(local.regions, remote.regions, None).plan(
        [CellCopy(0, r, 0, d, 0) for r, d in ((1, 3), (2, 4), (4, 5))]
    )
    assert len(work.local) == 2 * LAYERS


def test_heads_are_read_straight_into_place_where_each_is_a_run() -> None:
    local, remote = cache(LAYOUTS[0], 1, 32, "keys transposed"), cache(LAYOUTS[0], 2, 32, "keys transposed")
    work = Bridge(local.regions, remote.regions, HeadSlice(1, 0, 1)).plan([CellCopy(0, 0, 0, 0, 0)])
    assert not work.staged
    assert work.local[:, 1].tolist() == [32 * CHANNELS * 4] * LAYERS


def test_another_block_size_is_read_straight_into_place_where_tokens_are_runs() -> None:
    local, remote = cache(LAYOUTS[0], 1, 64), cache(LAYOUTS[0], 1, 32)
    work = Bridge(local.regions, remote.regions, None).plan([CellCopy(0, 3, 0, 0, 1)])
    assert not work.staged
    assert work.local[:, 1].tolist() == [32 * CHANNELS * 4] * LAYERS


def test_keys_that_must_be_reordered_are_staged_and_their_values_are_not() -> None:
    local, remote = cache(LAYOUTS[0], 1, 128, "keys transposed"), cache(LAYOUTS[0], 1, 64, "keys transposed")
    work = Bridge(local.regions, remote.regions, None).plan([CellCopy(0, 3, 0, 0, 1)])
    assert [len(staged.local) for staged in work.staged] == [1] * LAYERS
    assert work.local[:, 1].tolist() == [64 * CHANNELS // 2 * 4] * LAYERS


@pytest.mark.parametrize("cell", [CellCopy(0, BLOCKS, 0, 0, 0), CellCopy(0, 0, 0, BLOCKS, 0), CellCopy(0, -1, 0, 0, 0)])
def test_a_block_out_of_range_is_refused(cell: CellCopy) -> None:
    one = cache(LAYOUTS[0], 1, 4)
    with pytest.raises(ConfigError, match="out of range"):
        Bridge(one.regions, one.regions, None).plan([cell])


def test_caches_that_cannot_be_brought_together_are_refused() -> None:
    one, opaque = cache(LAYOUTS[0], 1, 4), cache(LAYOUTS[0], 1, 4, "opaque")
    with pytest.raises(ConfigError, match="cannot be taken apart"):
        Bridge(one.regions, opaque.regions, None)
    with pytest.raises(ConfigError, match="hold different things"):
        Bridge(one.regions, cache(LAYOUTS[0], 1, 4, "keys transposed").regions, None)
    fewer = pack_regions([], Memory(BLOCKS, "DRAM", 0))
    with pytest.raises(ConfigError, match="3 regions here, 0 at the source"):
        Bridge(one.regions, fewer, None)


def test_runs_are_merged_only_where_both_sides_go_on() -> None:
    def runs(*starts: int) -> Runs:
        return np.array([[start, 10, 0] for start in starts], dtype=np.uint64)

    local, remote = merge(runs(0, 10, 20, 40), runs(100, 110, 130, 150))
    assert local[:, :2].tolist() == [[0, 20], [20, 10], [40, 10]]
    assert remote[:, :2].tolist() == [[100, 20], [130, 10], [150, 10]]
