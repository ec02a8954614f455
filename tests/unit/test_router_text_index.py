from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.kernels.hash_chain import chain_names
from vllm_llmd.names import BlockName
from vllm_llmd.router.index.texts import Chunks, TextIndex, cut
from vllm_llmd.router.request import Facts

BLOCK = 4
CHUNK = 16


def names(text: bytes) -> list[BlockName]:
    """A text whose tokens are its bytes."""
    return chain_names(text, BLOCK)


def chunks(text: bytes, seed: bytes = b"") -> Chunks:
    return cut(Facts(None, None, seed, text, len(text), None), CHUNK)


def teach(index: TextIndex, text: bytes, seed: bytes = b"") -> None:
    index.forwarded("r", chunks(text, seed))
    index.learn("r", BLOCK, names(text))


def predict(index: TextIndex, of: Chunks) -> list[int]:
    return index.predict(BLOCK, of).tolist()


def common(one: list[BlockName], two: list[BlockName]) -> int:
    return next((depth for depth, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), min(len(one), len(two)))


def test_the_same_text_leads_to_its_whole_chain() -> None:
    index, text = TextIndex(1000), bytes(range(100))
    teach(index, text)
    assert predict(index, chunks(text)) == names(text)


def test_a_shared_prefix_leads_to_the_chain_of_its_whole_chunks() -> None:
    index, text = TextIndex(1000), bytes(range(100))
    teach(index, text)
    assert predict(index, chunks(text[:50] + b"other")) == names(text[: 50 - 50 % CHUNK])


def test_another_seed_or_block_size_or_an_unknown_text_leads_nowhere() -> None:
    index, text = TextIndex(1000), bytes(range(100))
    teach(index, text, b"salt")
    assert predict(index, chunks(text)) == []
    assert not len(index.predict(BLOCK * 2, chunks(text, b"salt")))
    assert predict(index, chunks(b"unknown")) == []
    assert predict(index, chunks(b"")) == []


def test_a_request_that_was_not_forwarded_teaches_nothing_and_one_report_is_enough() -> None:
    index, text = TextIndex(1000), bytes(range(100))
    index.learn("other", BLOCK, names(text))
    assert len(index) == 0
    teach(index, text)
    index.learn("r", BLOCK, names(b"x" * 100))
    assert predict(index, chunks(text)) == names(text)


def test_a_request_of_several_prompts_finds_what_was_learned_and_teaches_nothing() -> None:
    index, text = TextIndex(1000), bytes(range(100))
    batch = cut(Facts(None, None, b"", text, len(text), None, prompts=2), CHUNK)
    index.forwarded("r", batch)
    index.learn("r", BLOCK, names(text))
    assert predict(index, batch) == []
    teach(index, text)
    assert predict(index, batch) == names(text)


def test_texts_that_wait_for_their_blocks_are_bounded_in_number_and_size() -> None:
    index, text = TextIndex(10), bytes(CHUNK * 6)
    for request in ("a", "b"):
        index.forwarded(request, chunks(text))
    index.learn("a", BLOCK, names(text))
    assert predict(index, chunks(text)) == [], "it gave way to the later one"
    index.learn("b", BLOCK, names(text))
    assert predict(index, chunks(text)) == names(text)
    long = bytes(CHUNK * 50)
    index.forwarded("long", chunks(long))
    index.learn("long", BLOCK, names(long))
    assert predict(index, chunks(long)) == names(long[: CHUNK * 10])


def test_a_position_guessed_too_far_is_corrected_by_the_next_request() -> None:
    """Tokens lie far from where proportion puts them: the prefix is dense at its end."""
    index = TextIndex(1000)
    prefix, one, two = b"p" * CHUNK * 4, b"1" * CHUNK * 4, b"2" * CHUNK * 4
    shared = names(b"short")
    chain_one = [*shared, *map(BlockName, range(100, 131))]
    chain_two = [*shared, *map(BlockName, range(200, 231))]
    for request, text, chain in (("a", prefix + one, chain_one), ("b", prefix + two, chain_two)):
        index.forwarded(request, chunks(text))
        index.learn(request, BLOCK, chain)
    assert predict(index, chunks(prefix + b"3" * 64)) == shared
    assert predict(index, chunks(prefix + one)) == chain_one


texts = st.lists(st.sampled_from([b"a" * 10, b"b" * 23, b"c"]), max_size=12).map(b"".join)


@given(st.lists(texts, max_size=8), texts)
def test_a_prediction_never_leaves_a_chain_that_was_learned_and_is_right_where_bytes_are_tokens(
    learned: list[bytes], text: bytes
) -> None:
    index = TextIndex(1000)
    for each in learned:
        teach(index, each)
    predicted = predict(index, chunks(text))
    shared = max((common(names(each), names(text)) for each in learned), default=0)
    assert predicted == names(text)[: len(predicted)]
    assert len(predicted) >= min(shared, len(names(text))) - 2 * CHUNK // BLOCK


def test_what_is_used_least_recently_is_forgotten_first_and_memory_is_bounded() -> None:
    index, kept = TextIndex(20), bytes(range(100))
    teach(index, kept)
    for number in range(50):
        teach(index, b"%d" % number * 30)
        index.predict(BLOCK, chunks(kept))
    assert predict(index, chunks(kept)) == names(kept)
    assert len(index) <= 20 and index._table.pages <= 10
    assert predict(index, chunks(b"%d" % 0 * 30)) == []
