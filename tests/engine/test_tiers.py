"""An engine that offloads blocks through vLLM's own connector, beside ours: the router knows every tier."""

import re
from argparse import Namespace

import pytest

from vllm_llmd.kernels.hash_chain import chain_names
from vllm_llmd.router.index import verify

BLOCK = 32

pytest.importorskip("vllm.v1.kv_offload.config", reason="vLLM's interface for offloading is another before 0.32")


def fill(lab, client, prompts: int) -> None:
    for _ in range(prompts):
        client.complete(lab.prompt(1000))


def predicted(lab) -> float:
    found = re.search(r"^vllm_llmd_predicted_cached_tokens_total (\S+)$", lab.router.get("/metrics"), re.MULTILINE)
    assert found is not None
    return float(found.group(1))


@pytest.fixture
def offloaded(tiers):
    """A prompt whose blocks have left the GPU."""
    prompt, little = tiers.prompt(1000), tiers.engine("little")
    little.complete(prompt)
    fill(tiers, little, 3)
    names = set(chain_names(prompt, BLOCK))
    tiers.until(lambda: names <= tiers.offloaded("little").get("cpu", set()), "its blocks are not indexed")
    assert not names & tiers.index("little")
    return prompt


def test_offloaded_blocks_are_indexed_in_their_tier(tiers, offloaded) -> None:
    said: list[str] = []
    assert verify.run(Namespace(router=tiers.fleet.router_http, engine=None, api_key=None), said.append) == 0


def test_a_prompt_goes_where_its_blocks_are_offloaded_and_none_is_computed_again(tiers, offloaded) -> None:
    before, large = predicted(tiers), tiers.engine("large")
    answer = tiers.router.answer(offloaded, {})
    assert answer.tokens == large.alone(offloaded)
    assert answer.cached == predicted(tiers) - before == len(offloaded) // BLOCK * BLOCK


def test_what_other_memory_drops_too_is_forgotten(tiers, offloaded) -> None:
    little, names = tiers.engine("little"), set(chain_names(offloaded, BLOCK))
    fill(tiers, little, 5)
    tiers.until(lambda: not names & tiers.offloaded("little")["cpu"], "dropped blocks are still indexed")
    before = predicted(tiers)
    assert tiers.router.answer(offloaded, {}).cached == predicted(tiers) - before == 0


def test_another_engine_orders_what_is_offloaded_and_gets_the_same_tokens(tiers, offloaded) -> None:
    large = tiers.engine("large")
    gained = tiers.gained(large)
    assert large.complete(offloaded, source="little") == large.alone(offloaded)
    assert gained("orders_failed") == 0
    assert gained("kv_blocks_loaded") == -(-999 // BLOCK)


def test_an_engine_that_offloads_orders_from_others(tiers) -> None:
    prompt, little = tiers.prompt(600), tiers.engine("little")
    gained = tiers.gained(little)
    assert little.complete(prompt, source="large") == tiers.engine("large").alone(prompt)
    assert (gained("orders"), gained("orders_failed")) == (1, 0)
