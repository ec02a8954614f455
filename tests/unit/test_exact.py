"""Exact mode beside the event loop, and what it does when tokens differ, come late or cannot be told."""

import json
import threading
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from vllm_llmd.kernels.hash_chain import Names, chain_names, salt_of
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.index.agreement import TOO_MANY, Agreement, Guess
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.request import Facts, Kind, Unsupported, read_facts
from vllm_llmd.router.serving.exact import Exact
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.testing.clock import FakeClock

BODY = {"model": "m", "prompt": "some text"}
FACTS = read_facts("completion", BODY)


class Site:
    """Exact mode with a tokenizer that does as told."""

    def __init__(self, tokenize: Any, wait_ms: int = 60_000) -> None:
        settings = RouterSettings(tokenizer_wait_ms=wait_ms)
        self.fleet = Fleet(settings, FakeClock(), "r")
        self.metrics = Metrics(self.fleet)
        self.exact = Exact(settings, self.fleet.agreement, self.metrics)
        self.exact._tokenizers[""] = tokenize

    async def facts(self, facts: Facts = FACTS) -> Facts:
        return await self.exact.facts(facts, "completion", json.dumps(BODY).encode())

    def counted(self, result: str) -> bool:
        return f'vllm_llmd_exact_prompts_total{{result="{result}"}} 1.0' in self.metrics.exposition().decode()


def three(kind: Kind, body: Mapping[str, Any]) -> "array[int]":
    return array("I", [1, 2, 3])


def names(*tokens: int) -> Names:
    return np.array(chain_names(tokens, 1), np.uint64)


async def test_a_text_gets_token_ids_and_keeps_all_that_learning_needs() -> None:
    site = Site(three)
    facts = await site.facts()
    assert facts.tokens == array("I", [1, 2, 3]) and facts.prompt_tokens == 3
    assert (facts.text, facts.seed) == (FACTS.text, FACTS.seed)
    chunks = site.fleet.cut(facts)
    assert chunks.guess == Guess("m", array("I", [1, 2, 3]), None)
    assert site.fleet.cut(FACTS).guess is None
    assert site.counted("tokenized")


async def test_what_cannot_be_tokenized_or_fails_is_counted_and_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    def unsupported(kind: Kind, body: Mapping[str, Any]) -> "array[int]":
        raise Unsupported("images")

    def failing(kind: Kind, body: Mapping[str, Any]) -> "array[int]":
        raise ZeroDivisionError

    for tokenize, result in ((unsupported, "unsupported"), (failing, "failed")):
        site = Site(tokenize)
        assert await site.facts() == FACTS
        assert site.counted(result)


async def test_a_request_does_not_wait_for_ever() -> None:
    gate = threading.Event()

    def slow(kind: Kind, body: Mapping[str, Any]) -> "array[int]":
        gate.wait(30)
        return array("I")

    site = Site(slow, wait_ms=1)
    assert await site.facts() == FACTS
    gate.set()
    assert site.counted("late")


async def test_token_prompts_and_batches_and_empty_ones_are_not_tokenized() -> None:
    site = Site(three)
    for prompt in ([1, 2], ["a", "b"], "", None):
        facts = read_facts("completion", {"model": "m", "prompt": prompt})
        assert await site.facts(facts) == facts


async def test_a_model_whose_tokens_differ_too_often_is_given_up_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    site, guess = Site(three), Guess("m", array("I", [1, 2, 3]), None)
    agreement = site.fleet.agreement
    agreement.compare(guess, 1, None, names(1, 2, 3))
    for _ in range(TOO_MANY + 3):
        assert agreement.trusted("m") == (agreement.counts["disagree"] < TOO_MANY)
        agreement.compare(guess, 1, None, names(1, 2, 4))
    assert not agreement.trusted("m") and agreement.trusted("other")
    assert agreement.counts == {"agree": 1, "disagree": TOO_MANY + 3}
    assert len(caplog.records) == 1
    assert await site.facts() == FACTS


def test_a_guess_agrees_block_by_block_with_its_adapter_and_salt() -> None:
    agreement, tokens = Agreement(), array("I", range(10))
    plain, poets = (np.array(chain_names(tokens, 4, salt_of(keys)), np.uint64) for keys in ([], ["poet"]))
    agreement.compare(Guess(None, tokens, None), 4, None, plain)
    agreement.compare(Guess(None, tokens, None), 4, "poet", poets)
    assert agreement.counts == {"agree": 2, "disagree": 0}
    agreement.compare(Guess(None, tokens, "tenant"), 4, None, plain)
    agreement.compare(Guess(None, tokens, None), 4, "poet", plain)
    assert agreement.counts == {"agree": 2, "disagree": 2}
