"""Sources that refuse, die or stall: the answer is right each time, and what has arrived is kept."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vllm_llmd.kv_connector.link import EngineLink, LinkSettings
from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.wire import EngineInfo, Load

BLOCK = 32
LEASE_MS = 2000
BLOCKS = 250
TOKENS = BLOCKS * BLOCK


@contextmanager
def joined(lab, **differences) -> Iterator[None]:
    """A member of the fleet that has prefill-0's addresses, but for `differences`, under the name of `impostor`."""
    real = lab.members()["prefill-0"]
    facts = {"id": EngineId("impostor"), **differences}
    info = EngineInfo(**{**{name: getattr(real, name) for name in EngineInfo.__struct_fields__}, **facts})
    link = EngineLink(LinkSettings(info, (lab.fleet.router_zmq,), Load))
    link.start()
    try:
        lab.until(lambda: EngineId("impostor") in link.members(), "the impostor has not joined")
        lab.decode.complete(lab.prompt(10))  # by the end of which decode-0 has heard of it too
        yield
    finally:
        link.close()
        lab.until(lambda: lab.engines().get("impostor", {}).get("state") != "ready", "the impostor has not left")


def load_part(lab, prompt: list[int]):
    """A request to decode-0 whose KV slow-0 is computing; returns once some of it has arrived."""
    gained = lab.gained(lab.decode)
    request = lab.in_background(lambda: lab.decode.complete(prompt, source="slow-0"))
    lab.until(lambda: gained("kv_bytes_read") > 0, "nothing arrives")
    assert not request.done
    return request, gained


def test_a_source_that_refuses_the_order_costs_nothing_but_time(lab) -> None:
    prompt = lab.prompt(300)
    with joined(lab):
        gained = lab.gained(lab.decode)
        assert lab.decode.complete(prompt, source="impostor") == lab.decode.alone(prompt)
        assert gained("orders_failed") == 1
        assert gained("fallbacks refused") == 1


def test_an_order_for_another_life_of_the_source_fails_at_once(lab) -> None:
    prompt = lab.prompt(300)
    with joined(lab, epoch=Epoch(7)):
        gained = lab.gained(lab.decode)
        assert lab.decode.complete(prompt, source="impostor") == lab.decode.alone(prompt)
        assert gained("orders_failed") == 1
        assert gained("fallbacks source restarted") == 1


def test_a_source_of_another_kind_is_never_asked(lab) -> None:
    prompt = lab.prompt(300)
    with joined(lab, fingerprint="another"):
        gained = lab.gained(lab.decode)
        assert lab.decode.complete(prompt, source="impostor") == lab.decode.alone(prompt)
        assert gained("orders") == 0
        assert gained("fallbacks fingerprint differs") == 1


def test_a_source_that_cannot_be_reached_costs_nothing_but_time(lab) -> None:
    prompt = lab.prompt(300)
    with joined(lab, http="http://127.0.0.1:9"):
        gained = lab.gained(lab.decode)
        assert lab.decode.complete(prompt, source="impostor") == lab.decode.alone(prompt)
        assert gained("fallbacks source unreachable") == 1


def test_an_unknown_source_is_ignored(lab) -> None:
    prompt, gained = lab.prompt(300), lab.gained(lab.decode)
    assert lab.decode.complete(prompt, source="nobody") == lab.decode.alone(prompt)
    assert gained("fallbacks unknown engine") == 1


@pytest.mark.parametrize("hint", ["prefill-0", 7, {"source": 7}, {"source": ["x"]}, {"request": {}}])
def test_a_hint_of_the_wrong_shape_is_ignored(lab, hint) -> None:
    prompt = lab.prompt(100)
    assert lab.decode.complete(prompt, kv_transfer_params={"llmd": hint}) == lab.decode.alone(prompt)


def test_a_request_with_a_ticket_that_does_not_hold_is_no_order(lab) -> None:
    slow = lab.members()["slow-0"]
    ticket = {
        "order": "forged",
        "source": "slow-0",
        "source_epoch": slow.epoch,
        "destination": "decode-0",
        "destination_epoch": 1,
        "fingerprint": slow.fingerprint,
        "first_block": 0,
        "lease_ms": LEASE_MS,
    }
    served = lab.engines()["slow-0"]["load"]["orders_served"]
    wrong = ({"source_epoch": 1}, {"fingerprint": "x"}, {"first_block": -1}, {"version": 9}, {"order": 5})
    for ticket_like in (*({**ticket, **error} for error in wrong), {}, [], "ticket"):
        prompt = lab.prompt(100)
        params = {"llmd_order": ticket_like}
        assert lab.slow.complete(prompt, kv_transfer_params=params) == lab.slow.alone(prompt)
    assert lab.engines()["slow-0"]["load"]["orders_served"] == served


def test_a_source_that_is_killed_midway_leaves_what_has_arrived(lab) -> None:
    prompt = lab.prompt(TOKENS)
    request, gained = load_part(lab, prompt)
    lab.fleet.kill_engine("slow-0", signal.SIGKILL)
    answer = request.result()
    kept, missing = gained("kv_blocks_loaded"), gained("kv_blocks_missing")
    lab.fleet.start_engine("slow-0")
    assert answer == lab.decode.alone(prompt)
    assert kept > 0, "nothing was kept"
    assert missing > 0, "the source was killed too late to test anything"
    assert kept + missing == BLOCKS
    lab.assert_recomputed("decode-0", TOKENS - 1 - kept * BLOCK)


def test_a_restarted_source_serves_again(lab) -> None:
    prompt, gained = lab.prompt(300), lab.gained(lab.decode)
    assert lab.decode.complete(prompt, source="slow-0") == lab.decode.alone(prompt)
    assert gained("orders_failed") == 0
    assert gained("kv_blocks_loaded") == 10


def test_a_source_that_stalls_past_its_lease_and_resumes_harms_nothing(lab) -> None:
    prompt = lab.prompt(TOKENS)
    request, gained = load_part(lab, prompt)
    lab.fleet.kill_engine("slow-0", signal.SIGSTOP)
    try:
        answer = request.result()
    finally:
        lab.fleet.kill_engine("slow-0", signal.SIGCONT)
    assert answer == lab.decode.alone(prompt)
    assert gained("kv_blocks_loaded") > 0
    assert gained("kv_blocks_missing") > 0
    assert gained("fallbacks source stalled") == 1
    lab.until(lab.at_rest, "blocks are lost")
    another = lab.prompt(300)
    assert lab.decode.complete(another, source="slow-0") == lab.decode.alone(another)


def test_a_cancelled_stream_frees_both_engines(lab) -> None:
    body = {
        "model": "m",
        "prompt": lab.prompt(TOKENS),
        "max_tokens": 100,
        "ignore_eos": True,
        "stream": True,
        "kv_transfer_params": {"llmd": {"source": "slow-0"}},
    }
    gained = lab.gained(lab.decode)
    connection = lab.decode.send("/v1/completions", body)
    lab.until(lambda: gained("kv_bytes_read") > 0, "nothing arrives")
    connection.close()
    lab.until(lambda: gained("orders_failed") == 1, "the order was not cancelled")
    lab.until(lab.at_rest, "the cancelled request holds blocks")
    assert gained("kv_blocks_missing") > 0, "it was cancelled too late to test anything"
