"""Who reads whom, and which heads: checked against the plainest model of what each rank holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.errors import ConfigError
from vllm_llmd.kv_connector.topology import Edge, HeadSlice, edges, objection, readers_of, sources_of
from vllm_llmd.wire import Geometry, GroupShape


@pytest.mark.parametrize(
    ("source_tp", "destination_tp", "expected"),
    [
        (1, 2, (Edge(0, 0, HeadSlice(0, 0, 2)), Edge(1, 0, HeadSlice(2, 0, 2)))),
        (2, 1, (Edge(0, 0, HeadSlice(0, 0, 2)), Edge(0, 1, HeadSlice(0, 2, 2)))),
        (2, 2, (Edge(0, 0, None), Edge(1, 1, None))),
        (
            4,
            2,
            (
                Edge(0, 0, HeadSlice(0, 0, 1)),
                Edge(0, 1, HeadSlice(0, 1, 1)),
                Edge(1, 2, HeadSlice(0, 0, 1)),
                Edge(1, 3, HeadSlice(0, 1, 1)),
            ),
        ),
    ],
)
def test_four_heads_are_dealt_out(source_tp: int, destination_tp: int, expected: tuple[Edge, ...]) -> None:
    assert edges(source_tp, destination_tp, 4) == expected


def test_a_cache_that_every_rank_holds_is_read_once_by_each() -> None:
    assert edges(4, 2, 0) == (Edge(0, 0, None), Edge(1, 2, None))
    assert edges(2, 4, 0) == tuple(Edge(rank, rank // 2, None) for rank in range(4))


def test_more_ranks_than_heads_share_them_and_readers_spread() -> None:
    assert edges(1, 4, 2) == (
        Edge(0, 0, HeadSlice(0, 0, 1)),
        Edge(1, 0, HeadSlice(0, 0, 1)),
        Edge(2, 0, HeadSlice(1, 0, 1)),
        Edge(3, 0, HeadSlice(1, 0, 1)),
    )
    assert {edge.source for edge in edges(4, 2, 2)} == {0, 3}


@pytest.mark.parametrize(("source_tp", "destination_tp", "kv_heads"), [(3, 2, 4), (2, 3, 4), (1, 5, 2)])
def test_heads_that_cannot_be_dealt_out_are_refused(source_tp: int, destination_tp: int, kv_heads: int) -> None:
    with pytest.raises(ConfigError, match="heads"):
        edges(source_tp, destination_tp, kv_heads)


@given(source=st.integers(0, 4), destination=st.integers(0, 4), heads=st.integers(0, 4))
def test_every_rank_gets_each_of_its_heads_once_from_who_holds_it(source: int, destination: int, heads: int) -> None:
    source_tp, destination_tp, kv_heads = 1 << source, 1 << destination, 1 << heads
    between = edges(source_tp, destination_tp, kv_heads)
    for rank in range(destination_tp):
        got: list[int] = []
        for edge in sources_of(rank, between):
            theirs, mine = range_of(edge.source, source_tp, kv_heads), range_of(rank, destination_tp, kv_heads)
            part = edge.heads or HeadSlice(0, 0, len(theirs))
            wanted = mine[part.destination_first : part.destination_first + part.count]
            assert list(theirs[part.source_first : part.source_first + part.count]) == list(wanted)
            got += wanted
        assert got == list(range_of(rank, destination_tp, kv_heads))
    assert sum(len(readers_of(rank, between)) for rank in range(source_tp)) == len(between)


def range_of(rank: int, tp: int, kv_heads: int) -> range:
    """The heads a rank holds, as vLLM deals them out."""
    if tp >= kv_heads:
        head = rank // (tp // kv_heads)
        return range(head, head + 1)
    each = kv_heads // tp
    return range(rank * each, rank * each + each)


def geometry(tp: int = 1, kv_heads: int = 4, interior: str = "cells", *groups: tuple[int, int]) -> Geometry:
    shapes = [GroupShape(block_size, 2, window) for block_size, window in groups or ((32, 0),)]
    return Geometry(tp, kv_heads, interior, shapes)


def test_engines_cut_up_alike_understand_each_other_whatever_their_blocks_look_like() -> None:
    assert objection(geometry(1, 4, ""), geometry(1, 4, "")) is None
    assert objection(geometry(1, 4, "opaque amx"), geometry(1, 4, "opaque amx")) is None


@pytest.mark.parametrize(
    "theirs", [geometry(2), geometry(4), geometry(1, 4, "cells", (64, 0)), geometry(2, 4, "cells", (16, 0))]
)
def test_other_sizes_are_understood_where_they_divide(theirs: Geometry) -> None:
    assert objection(geometry(), theirs) is None


@pytest.mark.parametrize(
    ("mine", "theirs", "words"),
    [
        (geometry(), geometry(1, 4, "cells", (48, 0)), "divide"),
        (geometry(), geometry(3), "3 ranks"),
        (geometry(), geometry(1, 4, "other"), "laid out differently"),
        (geometry(1, 4, ""), geometry(2, 4, ""), "laid out differently"),
        (geometry(1, 4, "opaque amx"), geometry(1, 4, "opaque amx", (64, 0)), "must be equal"),
        (geometry(), geometry(1, 4, "cells", (32, 0), (32, 128)), "groups differ"),
        (geometry(1, 4, "cells", (32, 0), (32, 64)), geometry(1, 4, "cells", (32, 0), (32, 128)), "groups differ"),
        (
            geometry(1, 4, "cells", (32, 0), (32, 64)),
            geometry(1, 4, "cells", (64, 0), (64, 64)),
            "one KV cache group only",
        ),
    ],
)
def test_what_cannot_be_brought_together_is_said(mine: Geometry, theirs: Geometry, words: str) -> None:
    reason = objection(mine, theirs)
    assert reason is not None
    assert words in reason
