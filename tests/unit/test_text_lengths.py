"""How long texts are in tokens is learned from answers."""

from array import array
from dataclasses import replace

import pytest

from vllm_llmd.router.learning.text_lengths import MODELS_KEPT, TEMPLATE_TOKENS, TextLengths
from vllm_llmd.router.request import Facts

TEXT = Facts("m", None, b"", b"x" * 12_000, 3000, None)


def test_a_text_is_as_long_as_others_were() -> None:
    lengths = TextLengths()
    assert lengths.estimated(TEXT) is TEXT
    for _ in range(30):
        lengths.told(TEXT, 12_000, 2000)
    assert lengths.estimated(TEXT).prompt_tokens == pytest.approx(2000, rel=0.05)
    a_twentieth = lengths.estimated(replace(TEXT, text=b"x" * 600)).prompt_tokens
    assert a_twentieth - TEMPLATE_TOKENS == pytest.approx(100, rel=0.05)


def test_short_prompts_with_a_long_template_do_not_make_long_ones_longer() -> None:
    lengths = TextLengths()
    for number in range(100):
        text_bytes = 200 + 100 * (number % 5)
        lengths.told(TEXT, text_bytes, text_bytes // 5 + 40)
    assert lengths.estimated(TEXT).prompt_tokens == pytest.approx(12_000 / 5 + 40, rel=0.1)


def test_a_greeting_asked_again_and_again_says_little_of_long_texts() -> None:
    lengths = TextLengths()
    for _ in range(100):
        lengths.told(TEXT, 60, 50)
    assert lengths.estimated(replace(TEXT, text=b"x" * 60)).prompt_tokens == pytest.approx(50, rel=0.05)
    assert 3000 <= lengths.estimated(TEXT).prompt_tokens <= 6000


def test_each_model_has_a_tokenizer_of_its_own() -> None:
    lengths = TextLengths()
    lengths.told(TEXT, 12_000, 2000)
    other = replace(TEXT, model="other")
    assert lengths.estimated(other) is other


def test_long_ago_counts_less() -> None:
    lengths = TextLengths()
    for tokens in [2000] * 300 + [4000] * 300:
        lengths.told(TEXT, 12_000, tokens)
    assert lengths.estimated(TEXT).prompt_tokens == pytest.approx(4000, rel=0.05)


def test_tokens_that_are_known_are_not_estimated() -> None:
    lengths = TextLengths()
    lengths.told(TEXT, 12_000, 2000)
    known = replace(TEXT, tokens=array("I", [1, 2]), prompt_tokens=2)
    assert lengths.estimated(known) is known


@pytest.mark.parametrize("tokens", [0, -5, 12_001, 10])
def test_what_cannot_be_of_this_text_is_not_believed(tokens: int) -> None:
    lengths = TextLengths()
    lengths.told(TEXT, 12_000, tokens)
    assert lengths.estimated(TEXT) is TEXT


def test_several_prompts_and_their_sum_teach_nothing() -> None:
    lengths = TextLengths()
    lengths.told(replace(TEXT, prompts=2), 12_000, 5000)
    lengths.told(replace(TEXT, tokens=array("I", [1])), 12_000, 5000)
    assert lengths.estimated(TEXT) is TEXT


def test_models_that_were_not_heard_of_for_long_are_forgotten() -> None:
    lengths = TextLengths()
    for number in range(MODELS_KEPT + 1):
        lengths.told(replace(TEXT, model=str(number)), 12_000, 2000)
    first = replace(TEXT, model="0")
    assert lengths.estimated(first) is first
