from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.names import BlockName, EngineId
from vllm_llmd.router.prefix_index import PrefixIndex

A, B, C = EngineId("a"), EngineId("b"), EngineId("c")
engines = st.sampled_from([A, B, C])
names = st.lists(st.integers(0, 12).map(BlockName), max_size=8)
operations = st.one_of(
    st.tuples(st.just("apply"), engines, names, names),
    st.tuples(st.just("clear"), engines, names, names),
    st.tuples(st.just("replace"), engines, names, names),
)


@given(st.lists(operations), names)
def test_the_index_answers_as_a_plain_set_per_engine_would(
    history: list[tuple[str, EngineId, list[BlockName], list[BlockName]]], prompt: list[BlockName]
) -> None:
    index, model = PrefixIndex(), {engine: set[BlockName]() for engine in (A, B, C)}
    for kind, engine, removed, stored in history:
        match kind:
            case "apply":
                index.apply(engine, removed, stored)
                model[engine] = (model[engine] - set(removed)) | set(stored)
            case "clear":
                index.clear_engine(engine)
                model[engine] = set()
            case "replace":
                index.replace_engine(engine, stored)
                model[engine] = set(stored)
    for engine, held in model.items():
        assert set(index.held(engine)) == held
        assert index.size(engine) == len(held)
        depth = next((depth for depth, name in enumerate(prompt) if name not in held), len(prompt))
        assert index.match(prompt).get(engine, 0) == depth


def test_a_hole_ends_the_match() -> None:
    index = PrefixIndex()
    index.apply(A, [], [BlockName(1), BlockName(3)])
    index.apply(B, [], [BlockName(2), BlockName(3)])
    assert index.match([BlockName(1), BlockName(2), BlockName(3)]) == {A: 1}


def test_a_name_nobody_holds_any_more_takes_no_memory() -> None:
    index = PrefixIndex()
    index.apply(A, [], [BlockName(1)])
    index.apply(B, [], [BlockName(1)])
    index.clear_engine(A)
    index.apply(B, [BlockName(1)], [])
    assert not index._holders
