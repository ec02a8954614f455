"""The block pool of a simulated engine, against a plain reference that only lists what happened."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_llmd.names import BlockName
from vllm_llmd.sim.block_pool import BlockId, BlockPool
from vllm_llmd.sim.offload import OffloadTier

SIZE = 12


def names(*values: int) -> list[BlockName]:
    return [BlockName(value) for value in values]


def filled(pool: BlockPool, *values: int) -> list[BlockId]:
    blocks = pool.take(len(values))
    for block, name in zip(blocks, names(*values), strict=True):
        pool.name(block, name)
    return blocks


def test_what_is_let_go_stays_cached_until_its_blocks_are_taken() -> None:
    pool = BlockPool(4)
    pool.release(filled(pool, 1, 2, 3))
    assert pool.free == 4
    assert len(pool.cached(names(1, 2, 3, 4), 9)) == 3
    assert len(pool.cached(names(1, 2, 3, 4), 2)) == 2
    assert pool.cached(names(7, 1), 9) == []


def test_the_last_blocks_of_what_was_let_go_first_are_taken_first() -> None:
    pool = BlockPool(4)
    pool.release(filled(pool, 1, 2))
    pool.release(filled(pool, 3, 4))
    gone = []
    for _ in range(4):
        pool.changes.drain()
        pool.take(1)
        change = pool.changes.drain()
        assert change is not None
        gone += change.removed
    assert gone == [2, 1, 4, 3]


def test_blocks_without_a_name_are_taken_before_anything_cached() -> None:
    pool = BlockPool(3)
    pool.release(filled(pool, 1, 2))
    nameless = pool.take(1)
    pool.release(nameless)
    assert pool.take(1) == nameless
    assert len(pool.cached(names(1, 2), 2)) == 2


def test_what_is_used_again_is_evicted_last() -> None:
    pool = BlockPool(2)
    pool.release(filled(pool, 1))
    pool.release(filled(pool, 2))
    again = pool.cached(names(1), 1)
    pool.hold(again)
    pool.release(again)
    pool.take(1)
    assert list(pool.names) == [1]


def test_a_name_is_gone_with_the_last_block_that_holds_it() -> None:
    pool = BlockPool(2)
    pool.release(filled(pool, 1))
    twin = filled(pool, 1)
    pool.changes.drain()
    pool.take(1)
    assert pool.changes.drain() is None
    assert pool.cached(names(1), 1) == twin


def test_changes_are_net() -> None:
    pool = BlockPool(1)
    pool.release(filled(pool, 1))
    pool.release(filled(pool, 2))
    change = pool.changes.drain()
    assert change is not None and (change.removed, change.stored) == ([], [2])
    pool.release(filled(pool, 3))
    pool.release(filled(pool, 2))
    assert pool.changes.drain() is None


def test_after_a_clear_nothing_is_cached_and_everyone_keeps_their_blocks() -> None:
    pool = BlockPool(3)
    held = filled(pool, 1)
    pool.release(filled(pool, 2))
    pool.changes.drain()
    pool.clear()
    change = pool.changes.drain()
    assert change is not None and change.cleared and not change.removed and not change.stored
    assert pool.free == 2 and not list(pool.names)
    pool.release(held)
    assert pool.free == 3


def test_letting_go_twice_is_our_own_mistake() -> None:
    pool = BlockPool(1)
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(blocks)


class PoolMachine(RuleBasedStateMachine):
    """The reference: an order of eviction as a plain list, names and references as plain dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(SIZE)
        self.order: list[BlockId] = [BlockId(block) for block in range(SIZE)]
        self.content: dict[BlockId, BlockName] = {}
        self.held: list[list[BlockId]] = []
        self.told: set[BlockName] = set()

    @rule(count=st.integers(0, 5))
    def take(self, count: int) -> None:
        if count > self.pool.free:
            return
        expected, self.order = self.order[:count], self.order[count:]
        for block in expected:
            self.content.pop(block, None)
        assert self.pool.take(count) == expected
        self.held.append(expected)

    @precondition(lambda self: self.held)
    @rule(which=st.randoms(use_true_random=False), name=st.integers(1, 15))
    def name(self, which: random.Random, name: int) -> None:
        blocks = which.choice(self.held)
        if not blocks:
            return
        block = which.choice(blocks)
        self.pool.name(block, BlockName(name))
        self.content.setdefault(block, BlockName(name))

    @precondition(lambda self: self.held)
    @rule(which=st.randoms(use_true_random=False))
    def release(self, which: random.Random) -> None:
        blocks = self.held.pop(which.randrange(len(self.held)))
        self.pool.release(blocks)
        free = [block for block in reversed(blocks) if not any(block in each for each in self.held)]
        self.order = [block for block in free if block not in self.content] + self.order
        self.order += [block for block in free if block in self.content]

    @rule(wanted=st.lists(st.integers(1, 15), max_size=5, unique=True))
    def hold_cached(self, wanted: list[int]) -> None:
        blocks = self.pool.cached(names(*wanted), 5)
        prefix = next((at for at, name in enumerate(wanted) if name not in self.content.values()), len(wanted))
        assert [self.content[block] for block in blocks] == wanted[:prefix]
        assert self.pool.unheld(blocks) == sum(block in self.order for block in blocks)
        self.pool.hold(blocks)
        self.order = [block for block in self.order if block not in blocks]
        self.held.append(blocks)

    @rule()
    def tell(self) -> None:
        change = self.pool.changes.drain()
        if change is not None:
            assert not set(change.removed) & set(change.stored)
            assert set(change.removed) <= self.told and not set(change.stored) & self.told
            self.told = (self.told - set(change.removed)) | set(change.stored)
        assert self.told == set(self.content.values())

    @invariant()
    def no_block_is_lost(self) -> None:
        held = {block for blocks in self.held for block in blocks}
        assert self.pool.free == SIZE - len(held) == len(self.order)
        assert set(self.pool.names) == set(self.content.values())


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40)


def test_an_offload_tier_keeps_what_was_used_last() -> None:
    tier = OffloadTier(3)
    tier.store(names(1, 2, 3))
    assert tier.held_from(names(1, 2, 9), 0, 9) == 2
    tier.store(names(4))
    assert set(tier.names) == {1, 2, 4}
    change = tier.changes.drain()
    assert change is not None and set(change.stored) == {1, 2, 4} and change.removed == []
    assert tier.held_from(names(9, 1, 4, 8), 1, 9) == 2
    tier.clear()
    assert tier.held_from(names(1), 0, 1) == 0
