"""vLLM's block events to names and net changes."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.kernels.block_names import BlockEvent, BlockNamer, Cleared, Removed, Stored
from vllm_llmd.kernels.hash_chain import chain_names

SIZE = 4


def stored(tokens: list[int], first: int = 0) -> Stored:
    """The blocks of `tokens` from block `first` on; a block's hash is everything up to its end."""
    hashes = [tuple(tokens[: (i + 1) * SIZE]) for i in range(len(tokens) // SIZE)]
    parent = hashes[first - 1] if first else None
    return Stored(tuple(hashes[first:]), parent, tokens[first * SIZE : len(hashes) * SIZE], None)


def test_names_are_those_that_the_token_ids_give() -> None:
    namer, tokens = BlockNamer(SIZE), list(range(12))
    assert namer.apply([stored(tokens)]).stored == set(chain_names(tokens, SIZE))


def test_a_later_event_continues_its_parents_chain() -> None:
    namer, tokens = BlockNamer(SIZE), list(range(12))
    namer.apply([stored(tokens[:8])])
    assert namer.apply([stored(tokens, first=2)]).stored == {chain_names(tokens, SIZE)[2]}


def test_salted_blocks_have_other_names() -> None:
    plain = BlockNamer(SIZE).apply([Stored(("a",), None, [1, 2, 3, 4], None)]).stored
    salted = BlockNamer(SIZE).apply([Stored(("a",), None, [1, 2, 3, 4], [("salt",)])]).stored
    assert plain != salted


def test_a_block_cached_twice_is_removed_with_its_last_copy() -> None:
    namer, tokens = BlockNamer(SIZE), list(range(4))
    (name,) = namer.apply([stored(tokens), stored(tokens)]).stored
    assert not namer.apply([Removed((tuple(tokens),))])
    assert namer.apply([Removed((tuple(tokens),))]).removed == {name}


def test_stored_and_removed_in_one_step_is_no_change() -> None:
    tokens = list(range(4))
    assert not BlockNamer(SIZE).apply([stored(tokens), Removed((tuple(tokens),))])


def test_partial_blocks_are_left_out() -> None:
    namer = BlockNamer(SIZE)
    assert not namer.apply([Stored(("half",), None, [1, 2], None)])
    assert not namer.apply([Removed(("half",))])


def test_a_child_of_an_unknown_parent_is_counted_and_left_out() -> None:
    namer = BlockNamer(SIZE)
    assert not namer.apply([stored(list(range(8)), first=1)])
    assert namer.unnamed == 1


prompts = st.lists(st.integers(0, 1), min_size=SIZE, max_size=SIZE * 3)
steps = st.lists(st.one_of(st.tuples(st.just("store"), prompts), st.tuples(st.just("remove"), prompts), st.just(None)))


@given(steps=steps, batch=st.integers(1, 4))
def test_net_changes_keep_a_mirror_equal_to_the_pool(steps: list[tuple[str, list[int]] | None], batch: int) -> None:
    """The pool is a bag of blocks; a mirror that only sees net changes must equal the set of names in it."""
    namer, mirror = BlockNamer(SIZE), set()
    pool: dict[tuple[int, ...], int] = {}
    pending: list[BlockEvent] = []
    for i, step in enumerate([*steps, ("flush", [])]):
        match step:
            case None:
                pool.clear()
                pending.append(Cleared())
            case ("store", tokens):
                event = stored(tokens)
                pending.append(event)
                for block_hash in event.hashes:
                    pool[block_hash] = pool.get(block_hash, 0) + 1
            case ("remove", tokens) if tuple(tokens[:SIZE]) in pool and not _has_child(pool, tuple(tokens[:SIZE])):
                block_hash = tuple(tokens[:SIZE])
                pool[block_hash] -= 1
                if not pool[block_hash]:
                    del pool[block_hash]
                pending.append(Removed((block_hash,)))
        if i % batch == 0 or step == ("flush", []):
            change = namer.apply(pending)
            pending = []
            mirror = set() if change.cleared else mirror
            assert not change.removed & change.stored
            mirror = (mirror - change.removed) | change.stored
    assert mirror == {chain_names(list(block_hash), SIZE)[-1] for block_hash in pool}


def _has_child(pool: dict[tuple[int, ...], int], block_hash: tuple[int, ...]) -> bool:
    return any(len(other) > len(block_hash) and other[: len(block_hash)] == block_hash for other in pool)
