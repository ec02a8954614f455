"""Prompts that are being computed count for whoever asks for the same beginning."""

from array import array
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Coming
from vllm_llmd.router.decide import Supply
from vllm_llmd.router.index.texts import cut
from vllm_llmd.router.index.under_way import LOOKED_AT, UnderWay, shared
from vllm_llmd.router.request import Facts

A, B = EngineId("a"), EngineId("b")
NOTHING = Facts("m", None, b"", b"", 0, None)


def tokens(*ids: int) -> Facts:
    return replace(NOTHING, tokens=array("I", ids), prompt_tokens=len(ids))


def text(content: str) -> Facts:
    return replace(NOTHING, text=content.encode(), prompt_tokens=len(content) // 4)


def found(under_way: UnderWay, asked: Facts) -> dict[EngineId, int]:
    return {engine: each.tokens for engine, each in under_way.coming(asked, cut(asked, 256)).items()}


def begin(under_way: UnderWay, name: str, asked: Facts, *engines: EngineId) -> None:
    under_way.began(name, asked, cut(asked, 256), engines)


@pytest.mark.parametrize(
    ("first", "second"),
    [(tokens(*range(640)), tokens(*range(320), *range(9000, 9320))), (text("x" * 2560), text("x" * 1280 + "y" * 1280))],
)
def test_half_a_prompt_that_is_under_way_counts_until_its_request_ends(first: Facts, second: Facts) -> None:
    under_way = UnderWay()
    assert found(under_way, second) == {}
    begin(under_way, "r", first, A, B)
    assert found(under_way, second) == {A: second.prompt_tokens // 2, B: second.prompt_tokens // 2}
    under_way.ended("r")
    assert found(under_way, second) == {} and len(under_way) == 0
    under_way.ended("r")


def test_the_longest_of_an_engine_counts() -> None:
    under_way, asked = UnderWay(), tokens(*range(640))
    begin(under_way, "short", tokens(*range(128), 5, 5), A)
    begin(under_way, "long", tokens(*range(512), 5, 5), A)
    begin(under_way, "other", tokens(7, *range(512)), B)
    assert found(under_way, asked) == {A: 512}


def test_what_comes_from_a_source_is_told_with_it_for_its_destination_alone() -> None:
    under_way, asked = UnderWay(), tokens(*range(640))
    under_way.began("r", asked, cut(asked, 256), (A, B), Supply(A, B, 500))
    half = tokens(*range(320), *range(9000, 9320))
    assert under_way.coming(asked, cut(asked, 256)) == {A: Coming(640, B, 500), B: Coming(640)}
    assert under_way.coming(half, cut(half, 256)) == {A: Coming(320, B, 320), B: Coming(320)}
    begin(under_way, "longer", tokens(*range(700)), A)
    assert under_way.coming(asked, cut(asked, 256))[A] == Coming(640, B, 500)


@pytest.mark.parametrize("other", [{"model": "n"}, {"salt": "tenant"}])
def test_the_same_tokens_of_another_model_or_salt_are_others(other: dict[str, str]) -> None:
    under_way, asked = UnderWay(), tokens(*range(640))
    begin(under_way, "r", asked, A)
    assert found(under_way, replace(asked, **other)) == {}


def test_a_request_that_is_placed_anew_counts_where_it_is_now() -> None:
    under_way, asked = UnderWay(), tokens(*range(640))
    begin(under_way, "r", asked, A)
    begin(under_way, "r", asked, B)
    assert found(under_way, asked) == {B: 640}


def test_of_a_crowd_the_latest_are_looked_at() -> None:
    under_way, asked = UnderWay(), tokens(*range(640))
    begin(under_way, "first", asked, A)
    for number in range(LOOKED_AT):
        begin(under_way, str(number), asked, B)
    assert found(under_way, asked) == {B: 640}


def test_a_prompt_without_tokens_or_text_is_nobodys() -> None:
    under_way = UnderWay()
    begin(under_way, "r", NOTHING, A)
    assert len(under_way) == 0 and found(under_way, NOTHING) == {}


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_chains_share_what_is_before_they_part(common: int, mine: int, theirs: int) -> None:
    same = np.arange(common, dtype=np.uint64)
    some = np.concatenate([same, 1000 + np.arange(mine, dtype=np.uint64)])
    others = np.concatenate([same, 2000 + np.arange(theirs, dtype=np.uint64)])
    assert shared(some, others) == common
