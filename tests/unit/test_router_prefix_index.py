"""The index over banks: engines come, go and are many."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.prefix_table import BANK_ENGINES, Contents
from vllm_llmd.names import TIERS, EngineId, Tier
from vllm_llmd.router.index.prefixes import Difference, PrefixIndex

A, B, C = EngineId("a"), EngineId("b"), EngineId("c")
engines = st.sampled_from([A, B, C])
names = st.lists(st.integers(1, 12), max_size=8)
tiers = st.sampled_from(TIERS)
kinds = st.sampled_from(["apply", "clear", "clear tier", "forget", "replace"])
operations = st.tuples(kinds, engines, tiers, names, names)


def of(some: list[int]) -> Names:
    return np.array(some, np.uint64)


@given(st.lists(operations), names)
def test_the_index_answers_as_a_plain_set_per_engine_and_tier_would(
    history: list[tuple[str, EngineId, Tier, list[int], list[int]]], prompt: list[int]
) -> None:
    index = PrefixIndex(1000)
    model = {engine: {tier: set[int]() for tier in TIERS} for engine in (A, B, C)}
    for kind, engine, tier, removed, stored in history:
        holds = model[engine]
        match kind:
            case "apply":
                index.apply(engine, of(removed), of(stored), tier)
                holds[tier] = (holds[tier] - set(removed)) | set(stored)
            case "clear tier":
                index.clear_tier(engine, tier)
                holds[tier] = set()
            case "clear" | "forget":
                (index.clear_engine if kind == "clear" else index.forget_engine)(engine)
                model[engine] = {each: set() for each in TIERS}
            case "replace":
                told = {"gpu": set(removed)} | {tier: set(stored)}
                wrong = Difference(
                    sum(len(told.get(each, set()) - holds[each]) for each in TIERS),
                    sum(len(holds[each] - told.get(each, set())) for each in TIERS),
                )
                held = {each: of(list(some)) for each, some in told.items()}
                assert index.compare(engine, held) == wrong
                assert index.replace_engine(engine, held) == wrong
                model[engine] = {each: set(told.get(each, set())) for each in TIERS}
    for engine, holds in model.items():
        for tier in TIERS:
            assert set(index.held(engine, tier).tolist()) == holds[tier]
            assert index.contents(engine, tier).blocks == len(holds[tier])
        places = index.places([engine])
        depths = index.match(of(prompt))
        assert depths.at(places).tolist() == [depth(prompt, holds["gpu"])]
        assert depths.with_offloaded_at(places).tolist() == [depth(prompt, set().union(*holds.values()))]


def depth(prompt: list[int], held: set[int]) -> int:
    return next((depth for depth, name in enumerate(prompt) if name not in held), len(prompt))


def test_engines_beyond_a_bank_are_told_apart() -> None:
    index = PrefixIndex(1000)
    fleet = [EngineId(f"e{number}") for number in range(3 * BANK_ENGINES + 1)]
    for number, engine in enumerate(fleet):
        index.apply(engine, of([]), of(list(range(1, number + 2))))
    depths = index.match(of(list(range(1, 1000))))
    assert depths.at(index.places(fleet)).tolist() == list(range(1, len(fleet) + 1))
    some = [fleet[-1], fleet[0], fleet[70]]
    assert depths.at(index.places(some)).tolist() == [len(fleet), 1, 71]


def test_an_engine_that_holds_nothing_has_a_place_too() -> None:
    index = PrefixIndex(1000)
    places = index.places([A, B])
    assert index.match(of([1])).at(places).tolist() == [0, 0]
    index.apply(B, of([]), of([1]))
    assert index.match(of([1])).at(places).tolist() == [0, 1]
    assert index.match(of([1])).at(index.places([])).tolist() == []


def test_what_finds_no_room_is_counted_until_it_is_told_anew(log: pytest.LogCaptureFixture) -> None:
    index = PrefixIndex(1)
    index.apply(A, of([]), of(list(range(1, 2001))))
    missing = index.without_room(A)
    assert missing + index.contents(A).blocks == 2000
    assert missing > 0
    assert log.text.count("the prefix index is full") == 1
    index.replace_engine(A, {"gpu": of([5, 6])})
    assert (index.without_room(A), set(index.held(A).tolist())) == (0, {5, 6})
    index.apply(A, of([]), of(list(range(1, 2001))))
    index.clear_engine(A)
    assert index.without_room(A) == 0


def test_a_newcomer_takes_the_place_of_one_that_is_gone_and_nothing_of_it() -> None:
    index = PrefixIndex(1000)
    for engine in (A, B):
        index.apply(engine, of([]), of([1, 2]))
    index.forget_engine(A)
    index.apply(C, of([]), of([2]))
    depths = index.match(of([1, 2]))
    assert depths.at(index.places((A, B, C))).tolist() == [0, 2, 0]
    assert (index.contents(A), index.contents(C)) == (Contents(0, 0), Contents(1, 2))
    assert len(index._banks) == 1


def test_a_tier_that_nobody_uses_costs_nothing() -> None:
    index = PrefixIndex(1000)
    index.apply(A, of([]), of([1, 2]))
    index.apply(A, of([3]), of([]), "cpu")
    assert list(index._banks[0]) == ["gpu"]
    index.apply(A, of([]), of([3]), "disk")
    assert list(index._banks[0]) == ["gpu", "disk"]
