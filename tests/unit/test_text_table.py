"""The text table and its plain twin, compared."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.kernels.hash_chain_cpu import piece_names
from vllm_llmd.kernels.text_table import PAGE_BLOCKS, PlainTextTable, TextTableLike
from vllm_llmd.kernels.text_table_cpu import TextTable

CHUNK = 4


def keys(text: bytes, seed: int = 1) -> np.ndarray:
    return piece_names(text, CHUNK, seed)


def names(text: bytes) -> np.ndarray:
    """A text of one block per byte."""
    return piece_names(text, 1, 2)


def depths(text: bytes, scale: float = 1.0) -> np.ndarray:
    return np.minimum(np.arange(1, len(keys(text)) + 1) * CHUNK * scale, len(text)).astype(np.int64)


def teach(table: TextTableLike, text: bytes, scale: float = 1.0) -> None:
    table.learn(keys(text), depths(text, scale), names(text))


pieces = st.lists(st.sampled_from([b"a" * 7, b"b" * 16, b"c", b"d" * 33]), max_size=6).map(b"".join)
garbage = st.lists(st.integers(0, 3), max_size=3 * PAGE_BLOCKS).map(lambda numbers: np.array(numbers, np.uint64))
steps = st.lists(
    st.tuples(st.just("learn"), pieces, st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    | st.tuples(st.just("wrong"), pieces, garbage)
    | st.tuples(st.just("predict"), pieces, st.just(0)),
    max_size=25,
)


@settings(max_examples=300)
@given(steps, st.sampled_from([(1, 1), (3, 2), (10, 4), (40, 9), (1000, 1000)]))
def test_the_compiled_table_does_what_the_plain_one_does_at_any_size_and_with_any_names(
    story: list[tuple[str, bytes, object]], size: tuple[int, int]
) -> None:
    plain, compiled = PlainTextTable(*size), TextTable(*size)
    for what, text, detail in story:
        for table in (plain, compiled):
            if what == "learn":
                teach(table, text, detail)  # type: ignore[arg-type]
            elif what == "wrong":
                table.learn(keys(text), depths(text), detail)  # type: ignore[arg-type]
        assert compiled.predict(keys(text)).tolist() == plain.predict(keys(text)).tolist()
        assert len(compiled) == len(plain) <= size[0]
        assert compiled.pages == len(plain._pages) <= size[1]


@pytest.mark.parametrize("kind", [PlainTextTable, TextTable])
@pytest.mark.parametrize("blocks", [1, PAGE_BLOCKS - 1, PAGE_BLOCKS, PAGE_BLOCKS + 1, 5 * PAGE_BLOCKS + 3])
def test_a_chain_comes_back_whole_whatever_its_length(kind: type, blocks: int) -> None:
    table, text = kind(100, 100), bytes(blocks)
    teach(table, text)
    assert table.predict(keys(text)).tolist() == names(text).tolist()


@pytest.mark.parametrize("kind", [PlainTextTable, TextTable])
def test_a_longer_text_keeps_no_second_copy_of_the_pages_it_shares(kind: type) -> None:
    table = kind(1000, 1000)
    for blocks in range(PAGE_BLOCKS, 20 * PAGE_BLOCKS + 1, PAGE_BLOCKS):
        teach(table, bytes(blocks))
    assert len(table._pages if kind is PlainTextTable else table._pages.names) >= 20
    assert (len(table._pages) if kind is PlainTextTable else table.pages) == 20


@pytest.mark.parametrize("kind", [PlainTextTable, TextTable])
def test_a_chain_too_long_for_the_table_is_known_as_far_as_there_is_room(kind: type) -> None:
    table, text = kind(1000, 2), bytes(5 * PAGE_BLOCKS)
    teach(table, text)
    assert table.predict(keys(text)).tolist() == names(text)[: 2 * PAGE_BLOCKS].tolist()


def test_a_table_costs_what_it_says() -> None:
    chunks, pages = TextTable(1 << 14, 1).bytes_reserved, TextTable(1, 1 << 14).bytes_reserved
    assert 33 <= chunks / (1 << 14) <= 58
    assert 150 <= pages / (1 << 14) <= 190
