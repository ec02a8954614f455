"""Texts, prompts and answers of a simulated engine."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.sim import text
from vllm_llmd.sim.asks import AskError, Room, read_ask

ROOM = Room(("base", "adapter"), 1000, 50)


def test_four_bytes_are_a_token_and_pieces_do_not_share_one() -> None:
    assert text.tokenize("abcdef").tolist() == [0x64636261, 0x6665]
    assert text.tokenize("ab", "cd").tolist() == [0x6261, 0x6463]
    assert text.tokenize("", "").tolist() == []


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_tokens_spell_the_text(said: str) -> None:
    assert text.detokenize(text.tokenize(said)) == said


@given(st.text(), st.text())
def test_a_longer_text_begins_with_the_tokens_of_its_beginning(first: str, second: str) -> None:
    tokens = text.tokenize(first)
    whole = len(first.encode("utf-8", "surrogatepass")) // 4
    assert text.tokenize(first + second)[:whole].tolist() == tokens[:whole].tolist()


def test_an_answer_depends_on_its_prompt_alone_and_a_shorter_one_is_its_beginning() -> None:
    prompt = text.tokenize("what?")
    answer = text.answer_words(prompt, 100)
    assert text.answer_words(prompt, 20).tolist() == answer[:20].tolist()
    assert text.answer_words(text.tokenize("what!"), 100).tolist() != answer.tolist()
    said = text.detokenize(answer)
    assert len(said.split()) == 100 and text.tokenize(said).tolist() == answer.tolist()


def test_answers_have_the_mean_length_that_is_wanted() -> None:
    lengths = [text.answer_length(np.array([number], np.uint32), 50) for number in range(2000)]
    assert min(lengths) >= 1 and max(lengths) <= 99
    assert 45 < sum(lengths) / len(lengths) < 55


def test_what_was_answered_has_the_same_tokens_in_the_next_turn() -> None:
    messages = [{"role": "user", "content": "hi!"}]
    prompt = text.tokenize(*text.chat_pieces(messages, None))
    answer = text.answer_words(prompt, 9)
    messages += [{"role": "assistant", "content": text.detokenize(answer)}, {"role": "user", "content": "more"}]
    again = text.tokenize(*text.chat_pieces(messages, None))
    known = [*prompt.tolist(), *answer.tolist()]
    assert again[: len(known)].tolist() == known


def test_tools_and_parts_of_messages_are_part_of_the_prompt() -> None:
    plain: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
    parts: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    prompts = [text.chat_pieces(messages, tools) for messages in (plain, parts) for tools in (None, [{"name": "t"}])]
    assert len({tuple(pieces) for pieces in prompts}) == 4


@pytest.mark.parametrize(
    ("body", "tokens", "end"),
    [
        ({}, None, "stop"),
        ({"max_tokens": 1}, 1, "length"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, 2, "length"),
        ({"max_tokens": 300, "ignore_eos": True}, 300, "length"),
        ({"max_tokens": 400, "min_tokens": 300}, 300, "stop"),
        ({"max_tokens": 10**9, "ignore_eos": True}, 1000 - 10, "length"),
    ],
)
def test_an_answer_ends_where_the_client_the_model_or_the_room_ends_it(
    body: dict[str, Any], tokens: int | None, end: str
) -> None:
    ask = read_ask("chat", {"messages": [{"role": "user", "content": "hello"}], **body}, ROOM)
    assert ask.ends == [end]
    assert tokens is None or len(ask.answers[0]) == tokens


def test_a_completion_that_says_nothing_gets_few_tokens() -> None:
    asks = [read_ask("completion", {"prompt": [number], "model": "base"}, ROOM) for number in range(50)]
    assert max(len(ask.answers[0]) for ask in asks) == 16


def test_the_first_model_is_the_base_and_others_are_adapters() -> None:
    names = [read_ask("completion", {"prompt": "x", **model}, ROOM).adapter for model in ({}, {"model": "adapter"})]
    assert names == [None, "adapter"]
    with pytest.raises(AskError, match="does not exist") as refused:
        read_ask("completion", {"prompt": "x", "model": 7}, ROOM)
    assert refused.value.status == 404
