"""What a bank of the prefix table promises, held against the plain one and the compiled one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_llmd.kernels import prefix_table, prefix_table_cpu
from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.prefix_table import BANK_ENGINES, BankLike, Contents, Depths, PlainBank
from vllm_llmd.kernels.prefix_table_cpu import Bank

MakeBank = Callable[[int], BankLike]


@pytest.fixture(params=[PlainBank, Bank])
def make(request: pytest.FixtureRequest) -> MakeBank:
    made: MakeBank = request.param
    return made


def names(*values: int) -> Names:
    return np.array(values, np.uint64)


def match(bank: BankLike, chain: Names) -> Depths:
    depths = np.zeros(BANK_ENGINES, np.int32)
    bank.match(chain, depths)
    return depths


def depths(bank: BankLike, chain: Names) -> dict[int, int]:
    found = match(bank, chain)
    return {int(engine): int(found[engine]) for engine in np.flatnonzero(found)}


def test_each_engine_matches_as_far_as_it_holds_without_a_hole(make: MakeBank) -> None:
    bank = make(1000)
    bank.store(names(1, 2, 3), 0)
    bank.store(names(1, 3), 5)
    bank.store(names(2, 3), 63)
    assert depths(bank, names(1, 2, 3, 4)) == {0: 3, 5: 1}
    assert depths(bank, names(2, 3)) == {0: 2, 63: 2}
    assert depths(bank, names(9, 1)) == {}
    assert depths(bank, names()) == {}


def test_holders_are_told_name_by_name(make: MakeBank) -> None:
    bank = make(1000)
    bank.store(names(1, 2), 0)
    bank.store(names(2, 3), 63)
    assert bank.holders(names(1, 2, 3, 4, 0)).tolist() == [1, 1 | 1 << 63, 1 << 63, 0, 0]
    assert bank.holders(names()).tolist() == []


@given(st.lists(st.integers(0, 2**64 - 1) | st.just(2**64 - 1), max_size=5))
def test_depths_of_holders_are_as_far_as_each_goes_without_a_hole(bits: list[int]) -> None:
    holders = np.array(bits, np.uint64)
    compiled, plain = np.zeros((2, BANK_ENGINES), np.int32)
    prefix_table_cpu.depths_of(holders, compiled)
    prefix_table.depths_of(holders, plain)
    assert compiled.tolist() == plain.tolist()


def test_what_is_stored_twice_is_held_once(make: MakeBank) -> None:
    bank = make(1000)
    assert bank.store(names(5, 6, 5), 2) == 0
    bank.store(names(6), 2)
    assert bank.contents(2) == Contents(2, 5 ^ 6)
    bank.remove(names(5, 5, 77), 2)
    assert (bank.held(2).tolist(), bank.contents(2)) == ([6], Contents(1, 6))


def test_one_engines_loss_is_no_others(make: MakeBank) -> None:
    bank = make(1000)
    bank.store(names(1, 2), 0)
    bank.store(names(1, 2), 1)
    bank.remove(names(1), 0)
    bank.clear(1)
    assert (bank.held(0).tolist(), bank.held(1).tolist()) == ([2], [])
    assert bank.contents(1) == Contents(0, 0)


def test_what_finds_no_room_is_told(make: MakeBank) -> None:
    bank = make(1)
    missed = bank.store(random_names(2000, 7), 0)
    assert missed > 0
    assert bank.contents(0).blocks == 2000 - missed
    assert len(bank.held(0)) == 2000 - missed


def test_nothing_is_named_0(make: MakeBank) -> None:
    bank = make(1000)
    assert bank.store(names(0, 4, 0), 0) == 0
    bank.remove(names(0), 0)
    assert bank.contents(0) == Contents(1, 4)
    assert depths(bank, names(0, 4)) == {}
    assert depths(bank, names(4, 0)) == {0: 1}


def random_names(count: int, seed: int) -> Names:
    return np.random.default_rng(seed).integers(1, 2**64, count, np.uint64)


def test_many_names_come_and_go_and_leave_nothing_behind() -> None:
    """Deletions do not rot the table: after any number of them, as much room is in use as before."""
    bank = Bank(20_000)
    for turn in range(30):
        some = random_names(10_000, turn)
        assert bank.store(some, turn % BANK_ENGINES) == 0
        assert len(set(bank.held(turn % BANK_ENGINES).tolist()) ^ set(some.tolist())) == 0
        bank.remove(some, turn % BANK_ENGINES)
    assert not bank._slots.any()
    assert not bank._filled.any()
    assert bank.store(random_names(20_000, 99), 0) == 0


def test_clearing_one_engine_keeps_what_others_hold_findable() -> None:
    bank = Bank(20_000)
    shared, own = random_names(5000, 1), random_names(5000, 2)
    bank.store(np.concatenate([own, shared]), 0)
    bank.store(shared, 1)
    bank.clear(0)
    assert match(bank, shared)[:2].tolist() == [0, 5000]
    assert int(bank._filled.sum()) == 5000


def test_a_resident_block_costs_no_more_than_is_said() -> None:
    for count in (10_000, 50_000, 70_000, 100_000):
        bank = Bank(count)
        assert bank.store(random_names(count, count), 0) == 0
        assert 18 <= bank.bytes_in_use / count <= 40


def test_names_that_count_up_or_have_few_bits_find_room_too() -> None:
    bank = Bank(60_000)
    for some in (np.arange(1, 20_001), np.arange(1, 20_001) << 40, np.arange(1, 20_001) * 512):
        assert bank.store(some.astype(np.uint64), 0) == 0


crowded = st.lists(st.sampled_from([n << shift for n in range(1, 40) for shift in (0, 9, 55)]), max_size=30)
"""Names that want the same slots and the same segments."""


class Twins(RuleBasedStateMachine):
    """The compiled bank and the plain one, told the same."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.compiled = PlainBank(10**9), Bank(10**4)

    def both(self, call: Callable[[BankLike], Any]) -> tuple[Any, Any]:
        return call(self.plain), call(self.compiled)

    @rule(some=crowded, engine=st.integers(0, 2))
    def store(self, some: list[int], engine: int) -> None:
        self.both(lambda bank: bank.store(names(*some), engine))

    @rule(count=st.integers(1, 2000), seed=st.integers(0, 5), engine=st.integers(0, 2))
    def store_many(self, count: int, seed: int, engine: int) -> None:
        self.both(lambda bank: bank.store(random_names(count, seed), engine))

    @rule(some=crowded, engine=st.integers(0, 2))
    def remove(self, some: list[int], engine: int) -> None:
        self.both(lambda bank: bank.remove(names(*some), engine))

    @rule(engine=st.integers(0, 2))
    def clear(self, engine: int) -> None:
        self.both(lambda bank: bank.clear(engine))

    @rule(some=crowded)
    def match(self, some: list[int]) -> None:
        plain, compiled = self.both(lambda bank: match(bank, names(*some)).tolist())
        assert plain == compiled
        plain, compiled = self.both(lambda bank: bank.holders(names(*some)).tolist())
        assert plain == compiled

    @invariant()
    def hold_the_same(self) -> None:
        plain, compiled = self.both(
            lambda bank: [(bank.contents(engine), sorted(bank.held(engine).tolist())) for engine in range(3)]
        )
        assert plain == compiled
        assert int(self.compiled._filled.sum()) == int((self.compiled._slots[:, prefix_table_cpu.KEY] > 0).sum())


TestTwins = Twins.TestCase
TestTwins.settings = settings(max_examples=60, stateful_step_count=30)
