"""Best effort that real engines are told to leave for others: it is answered later, and just as well."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TOKENS = 2000
"""Of best effort: so many that a fast engine is still at them when others have been asked for and answered."""
COMPARED = 24
SEATS = 4
URGENT = {"x-llmd-priority": "5", "x-llmd-slo-ttft-ms": "1000"}
GIVEN_UP = "given up for a more urgent request"


def asked_for(prompt: list[int], tokens: int = TOKENS) -> dict[str, Any]:
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return body | {"return_token_ids": True}


def answer(client: Any, body: dict[str, Any], priority: int = 0) -> list[int]:
    response = client.post("/v1/completions", body, {"x-llmd-priority": str(priority)})
    tokens: list[int] = response["choices"][0]["token_ids"]
    return tokens


def begin(lab: Any, bodies: list[dict[str, Any]], priority: int = -1) -> list[Any]:
    """Asks the router for all of them."""
    return [lab.in_background(lambda body=body: answer(lab.router, body, priority)) for body in bodies]


def running(lab: Any) -> int:
    return sum(engine["load"]["running"] for engine in lab.engines().values())


def metric(lab: Any, name: str) -> float:
    """What the router counts, over all labels."""
    return sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", lab.router.get("/metrics"), re.MULTILINE)))


def given_up(lab: Any) -> list[dict[str, Any]]:
    """Decisions whose request was given up, and what was decided when it came again."""
    decisions = json.loads(lab.router.get("/admin/decisions"))["decisions"]
    of = {each["request"] for each in decisions if (each["outcome"] or {}).get("failure") == GIVEN_UP}
    return [each for each in decisions if each["request"] in of]


def alone(lab: Any, engine: str, bodies: list[dict[str, Any]]) -> list[list[int]]:
    """The first tokens that the engine answers when nobody else is there."""
    short = [body | {"cache_salt": "alone", "max_tokens": min(COMPARED, body["max_tokens"])} for body in bodies]
    return [answer(lab.engine(engine), body) for body in short]


def answered(others: list[Any]) -> list[list[int]]:
    """The first tokens of those who were answered in full."""
    tokens = [other.result() for other in others]
    assert [len(each) for each in tokens] == [TOKENS] * len(others)
    return [each[:COMPARED] for each in tokens]


def nothing_is_held(lab: Any) -> bool:
    """Whether the router has nothing in flight, in its queue, or of bodies."""
    held = metric(lab, "vllm_llmd_queued_requests") + metric(lab, "vllm_llmd_body_bytes")
    return held + sum(engine["requests"] for engine in lab.engines().values()) == 0


def test_an_urgent_request_takes_a_seat_of_best_effort_which_is_answered_in_full_later(twins) -> None:
    bodies = [asked_for(twins.prompt(40 + 9 * number)) for number in range(SEATS)]
    urgent, before = asked_for(twins.prompt(50), 2), metric(twins, "vllm_llmd_preempted_requests_total")
    others = begin(twins, bodies)
    twins.until(lambda: running(twins) == SEATS, "the engines are not full")
    with twins.router.open("/v1/completions", urgent, URGENT) as response:
        said = json.loads(response.read())["choices"][0]["token_ids"]
    assert not [other for other in others if other.done], "nobody had to end for its sake"
    assert metric(twins, "vllm_llmd_preempted_requests_total") == before + 1
    assert answered(others) == alone(twins, "left", bodies)
    assert said == alone(twins, "right", [urgent])[0]
    twins.until(lambda: nothing_is_held(twins), "the router holds something")


def test_each_of_several_urgent_requests_takes_one_seat_and_nobody_is_lost(twins) -> None:
    bodies = [asked_for(twins.prompt(60)) for _ in range(SEATS)]
    before = metric(twins, "vllm_llmd_preempted_requests_total")
    others = begin(twins, bodies)
    twins.until(lambda: running(twins) == SEATS, "the engines are not full")
    urgent = [asked_for(twins.prompt(30), 400) for _ in range(SEATS - 1)]
    answers = [each.result()[:COMPARED] for each in begin(twins, urgent, priority=5)]
    assert metric(twins, "vllm_llmd_preempted_requests_total") == before + SEATS - 1
    assert answers == alone(twins, "left", urgent)
    assert answered(others) == alone(twins, "right", bodies)
    twins.until(lambda: nothing_is_held(twins), "the router holds something")


@contextmanager
def drained(lab: Any, engine: str) -> Iterator[None]:
    lab.router.post(f"/admin/engines/{engine}/drain", {})
    try:
        yield
    finally:
        lab.router.post(f"/admin/engines/{engine}/undrain", {})


def test_a_victim_that_waits_for_kv_lets_go_of_its_source_and_comes_again(lab) -> None:
    """Its source is so slow that it still computes; a decode engine with 24 requests is saturated, by default."""
    long, gained = asked_for(lab.prompt(7800), 8), lab.gained(lab.decode)
    bodies, urgent = [asked_for(lab.prompt(30), 300) for _ in range(23)], asked_for(lab.prompt(20), 4)
    before = metric(lab, "vllm_llmd_preempted_requests_total")
    with drained(lab, "prefill-0"):
        victim = begin(lab, [long], priority=-2)[0]
        lab.until(lambda: lab.engines()["decode-0"]["load"]["waiting_for_kv"] == 1, "it does not wait for KV")
        others = begin(lab, bodies)
        lab.until(lambda: lab.engines()["decode-0"]["requests"] == 24, "the engine is not full")
        assert answer(lab.router, urgent, 5) == alone(lab, "decode-0", [urgent])[0]
        assert metric(lab, "vllm_llmd_preempted_requests_total") == before + 1
        assert {each["destination"] for each in given_up(lab)} == {"decode-0"}
        assert victim.result() == alone(lab, "decode-0", [long])[0]
    assert gained("orders") == 2
    assert [len(other.result()) for other in others] == [300] * 23
    lab.until(lambda: nothing_is_held(lab), "the router holds something")
