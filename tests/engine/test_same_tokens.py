"""Greedy output with the KV from another engine equals the output of one engine alone."""

from concurrent.futures import ThreadPoolExecutor
from math import ceil

import pytest

BLOCK = 32


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 500, 1500])
def test_output_is_that_of_one_engine_alone(lab, tokens: int) -> None:
    prompt, gained = lab.prompt(tokens), lab.gained(lab.decode)
    assert lab.decode.complete(prompt, source="prefill-0") == lab.decode.alone(prompt)
    lab.until(lambda: gained("kv_blocks_loaded") == ceil((tokens - 1) / BLOCK), "blocks were not loaded")
    assert gained("orders_failed") == 0


def test_different_prompts_give_different_answers(lab) -> None:
    """Else the comparisons above would prove nothing."""
    assert len({tuple(lab.decode.alone(lab.prompt(500))) for _ in range(4)}) == 4


def test_chunks_arrive_while_the_prefill_runs(lab) -> None:
    prompt, gained = lab.prompt(4000), lab.gained(lab.decode)
    assert lab.decode.complete(prompt, source="slow-0") == lab.decode.alone(prompt)
    assert gained("kv_ranges_read") > 100
    assert gained("kv_ranges_read_before_prefill_ended") > 0


def test_only_what_the_destination_lacks_is_loaded(lab) -> None:
    prompt = lab.prompt(500)
    lab.decode.complete(prompt[:330])
    gained = lab.gained(lab.decode)
    assert lab.decode.complete(prompt, source="prefill-0") == lab.decode.alone(prompt)
    lab.until(lambda: gained("kv_blocks_loaded") == ceil(499 / BLOCK) - 330 // BLOCK, "not the missing blocks alone")


def test_a_prefix_that_the_source_holds_is_not_computed_again(lab) -> None:
    prompt = lab.prompt(1500)
    lab.prefill.complete(prompt)
    gained = lab.gained(lab.decode)
    assert lab.decode.complete(prompt, source="prefill-0") == lab.decode.alone(prompt)
    assert gained("kv_ranges_read") == 2, "what is cached is announced before the step, its last block after it"


def test_eight_requests_at_once(lab) -> None:
    prompts = [lab.prompt(tokens) for tokens in (40, 200, 333, 512, 700, 900, 1100, 1300)]
    gained = lab.gained(lab.decode)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: lab.decode.complete(prompt, source="prefill-0"), prompts))
    assert together == [lab.decode.alone(prompt) for prompt in prompts]
    assert gained("orders") == 8
    assert gained("orders_failed") == 0


def test_two_engines_order_from_each_other_at_once(lab) -> None:
    prompts = [lab.prompt(700) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        there = pool.map(lambda prompt: lab.decode.complete(prompt, source="prefill-0"), prompts[:3])
        back = pool.map(lambda prompt: lab.prefill.complete(prompt, source="decode-0"), prompts[3:])
        answers = [*there, *back]
    assert answers == [lab.decode.alone(prompt) for prompt in prompts]


@pytest.mark.parametrize("tokens", [1500, 1611, 1722, 1833])
def test_two_engines_that_order_the_same_prompt_from_each_other_do_not_wait_for_ever(lab, tokens: int) -> None:
    """Each has to compute, for the other one, what it is to be sent by it, and its own request in the same steps."""
    prompt = lab.prompt(tokens)
    with ThreadPoolExecutor(2) as pool:
        there = pool.submit(lab.decode.complete, prompt, source="prefill-0")
        back = pool.submit(lab.prefill.complete, prompt, source="decode-0")
        answers = [there.result(), back.result()]
    assert answers == [lab.decode.alone(prompt)] * 2


def test_a_salted_prompt_is_loaded_under_its_salt(lab) -> None:
    prompt, gained = lab.prompt(300), lab.gained(lab.decode)
    answer = lab.decode.complete(prompt, source="prefill-0", cache_salt="tenant")
    assert answer == lab.decode.alone(prompt)
    assert gained("orders") == 1


def test_sampled_output_with_a_seed_is_that_of_one_engine_alone(lab) -> None:
    prompt, sampling = lab.prompt(200), {"temperature": 1.0, "seed": 11}
    assert lab.decode.complete(prompt, source="prefill-0", **sampling) == lab.decode.alone(prompt, **sampling)
