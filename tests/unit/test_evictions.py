"""What evicted blocks were worth: a share learned from those that are asked for again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.prefix_table import BANK_ENGINES
from vllm_llmd.names import EngineId
from vllm_llmd.router.index.evictions import SLOTS, Evictions
from vllm_llmd.router.index.prefixes import PrefixIndex

A, B = EngineId("a"), EngineId("b")
NOWHERE = np.zeros((1, BANK_ENGINES), np.int32)


def of(blocks: int) -> Evictions:
    found = Evictions()
    found.sized(blocks)
    return found


def some_names(count: int, seed: int = 0) -> Names:
    return np.random.default_rng(seed).integers(1, 1 << 63, count).astype(np.uint64)


def depths(*each: int) -> np.ndarray:
    found = NOWHERE.copy()
    found[0, : len(each)] = each
    return found


def test_before_anything_is_evicted_the_share_of_hits_is_all_that_is_known() -> None:
    assert Evictions().wanted_again(0.3) == 0.3
    assert of(1000).wanted_again(0.3) == pytest.approx(0.3)


def test_what_is_evicted_and_never_asked_for_makes_evictions_cheap() -> None:
    evictions, shares = of(1000), []
    for seed in range(50):
        evictions.evicted(some_names(100, seed))
        shares.append(evictions.wanted_again(0.9))
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(0.9 / (1 + 1 / np.log(2)), rel=0.05)


def test_what_is_asked_for_again_makes_them_dear() -> None:
    evictions = of(1000)
    for seed in range(50):
        names = some_names(100, seed)
        evictions.evicted(names)
        evictions.asked(names, NOWHERE)
    assert evictions.wanted_again(0.1) > 0.55


def test_a_block_is_wanted_again_once_and_only_if_no_engine_has_it() -> None:
    evictions, names = of(1000), some_names(20)
    evictions.evicted(names)
    evictions.asked(names, depths(5, 20))
    assert evictions.wanted_again(0.0) == 0
    evictions.asked(names, depths(12, 3))
    once = evictions.wanted_again(0.0)
    assert once == pytest.approx(8 / 1020)
    evictions.asked(names, depths(12, 3))
    assert evictions.wanted_again(0.0) == once


@given(st.integers(-10, 1 << 62), st.integers(0, 3000), st.floats(0, 1))
def test_it_is_a_share_whatever_the_size_of_the_fleet(blocks: int, count: int, hit_share: float) -> None:
    evictions, names = of(blocks), some_names(count)
    for _ in range(3):
        evictions.evicted(names)
        evictions.asked(names, NOWHERE)
        assert 0 <= evictions.wanted_again(hit_share) <= 1


def test_of_a_large_fleet_a_sample_says_as_much_and_takes_no_more_memory() -> None:
    large, small = of(100 * SLOTS), of(1000)
    for evictions, blocks in (large, 100 * SLOTS), (small, 1000):
        names = some_names(4 * blocks // 10)
        evictions.evicted(names)
        evictions.asked(names[: 2 * blocks // 10], NOWHERE)
    assert 0.1 < large.wanted_again(0.0) == pytest.approx(small.wanted_again(0.0), rel=0.15)
    assert len(large._slots) <= SLOTS


def test_a_fleet_that_grows_is_followed_and_one_that_shrinks_remembers() -> None:
    evictions, names = of(100), some_names(50)
    evictions.sized(5000)
    evictions.evicted(names)
    evictions.sized(10)
    evictions.asked(names, NOWHERE)
    assert evictions.wanted_again(0.0) == pytest.approx(50 / 5050)


def test_the_index_counts_what_leaves_gpus_and_is_nowhere_when_it_is_asked_for() -> None:
    index, names = PrefixIndex(1000), some_names(10)
    index.evictions.sized(100)
    for engine in (A, B):
        index.apply(engine, names[:0], names)
    index.apply(A, names, names[:0])
    index.match(names)
    assert index.evictions.wanted_again(0.0) == 0, "b has them"
    index.apply(B, names[5:], names[:0])
    index.match(names)
    assert index.evictions.wanted_again(0.0) == pytest.approx(5 / 115, rel=0.05)


def test_what_is_offloaded_is_not_lost() -> None:
    index, names = PrefixIndex(1000), some_names(10)
    index.evictions.sized(100)
    index.apply(A, names[:0], names)
    index.apply(A, names[:0], names, "cpu")
    index.apply(A, names, names[:0])
    index.match(names)
    assert index.evictions.wanted_again(0.0) == 0


def test_a_cache_that_is_emptied_has_evicted_nothing() -> None:
    index, names = PrefixIndex(1000), some_names(10)
    index.evictions.sized(100)
    index.apply(A, names[:0], names)
    index.clear_engine(A)
    index.match(names)
    assert index.evictions.wanted_again(0.0) == 0
