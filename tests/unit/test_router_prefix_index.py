"""The index over banks: engines come, go and are many."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.prefix_table import BANK_ENGINES, Contents
from vllm_llmd.names import EngineId
from vllm_llmd.router.prefix_index import Difference, PrefixIndex

A, B, C = EngineId("a"), EngineId("b"), EngineId("c")
engines = st.sampled_from([A, B, C])
names = st.lists(st.integers(1, 12), max_size=8)
operations = st.one_of(
    st.tuples(st.just("apply"), engines, names, names),
    st.tuples(st.just("clear"), engines, names, names),
    st.tuples(st.just("forget"), engines, names, names),
    st.tuples(st.just("replace"), engines, names, names),
)


def of(some: list[int]) -> Names:
    return np.array(some, np.uint64)


@settings(deadline=None)
@given(st.lists(operations), names)
def test_the_index_answers_as_a_plain_set_per_engine_would(
    history: list[tuple[str, EngineId, list[int], list[int]]], prompt: list[int]
) -> None:
    index, model = PrefixIndex(1000), {engine: set[int]() for engine in (A, B, C)}
    for kind, engine, removed, stored in history:
        match kind:
            case "apply":
                index.apply(engine, of(removed), of(stored))
                model[engine] = (model[engine] - set(removed)) | set(stored)
            case "clear":
                index.clear_engine(engine)
                model[engine] = set()
            case "forget":
                index.forget_engine(engine)
                model[engine] = set()
            case "replace":
                wrong = Difference(len(set(stored) - model[engine]), len(model[engine] - set(stored)))
                assert index.compare(engine, of(stored)) == wrong
                assert index.replace_engine(engine, of(stored)) == wrong
                model[engine] = set(stored)
    for engine, held in model.items():
        assert set(index.held(engine).tolist()) == held
        assert index.contents(engine).blocks == len(held)
        depth = next((depth for depth, name in enumerate(prompt) if name not in held), len(prompt))
        assert index.match(of(prompt)).of(engine) == depth


def test_engines_beyond_a_bank_are_told_apart() -> None:
    index = PrefixIndex(1000)
    fleet = [EngineId(f"e{number}") for number in range(3 * BANK_ENGINES + 1)]
    for number, engine in enumerate(fleet):
        index.apply(engine, of([]), of(list(range(1, number + 2))))
    depths = index.match(of(list(range(1, 1000))))
    assert [depths.of(engine) for engine in fleet] == list(range(1, len(fleet) + 1))
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
    index.replace_engine(A, of([5, 6]))
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
    assert [depths.of(engine) for engine in (A, B, C)] == [0, 2, 0]
    assert (index.contents(A), index.contents(C)) == (Contents(0, 0), Contents(1, 2))
    assert len(index._banks) == 1
