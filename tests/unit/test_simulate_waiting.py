"""Waiting in the router of a simulated fleet: as the real one has it, told in the report, and every time the same."""

import msgspec
import pytest

from vllm_llmd.router import policies
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.sim.settings import SimSettings
from vllm_llmd.simulate import main
from vllm_llmd.simulate.outcomes import Played
from vllm_llmd.simulate.settings import SimulateSettings

ROOMY = SimSettings(block_size=64, blocks=600, token_budget=2048, max_sequences=16)
BUSY = SimulateSettings(synthetic=150, engines=3, seed=5, rate=30.0, engine_prefill_tokens=8192, model=ROOMY)
SPLIT = msgspec.structs.replace(BUSY, engines=4, prefill=2)
CALM = msgspec.structs.replace(BUSY, rate=0.5)


def play(settings: SimulateSettings, policy: str = "round_robin") -> Played:
    return main.played(policy, settings, main.traffic_of(settings))


def changed(settings: SimulateSettings, **changes: object) -> SimulateSettings:
    return msgspec.structs.replace(settings, **changes)


@pytest.mark.parametrize("settings", [BUSY, SPLIT], ids=["aggregated", "disaggregated"])
@pytest.mark.parametrize("policy", policies.BUILT_IN)
def test_whoever_waits_is_served_once_and_after_the_wait(settings: SimulateSettings, policy: str) -> None:
    played = play(settings, policy)
    assert sum(engine.requests for engine in played.engines) == 150
    for outcome in played.outcomes:
        assert outcome.refused is None and outcome.shed is None
        assert outcome.made_tokens == outcome.output_tokens
        assert outcome.sent_ms is not None and outcome.first_ms is not None
        assert outcome.at_ms <= outcome.sent_ms < outcome.first_ms
    assert sum(outcome.waited_ms > 0 for outcome in played.outcomes) > 10


@pytest.mark.parametrize("settings", [BUSY, SPLIT], ids=["aggregated", "disaggregated"])
@pytest.mark.parametrize("policy", ["cost", "power_of_two"])
def test_the_same_seed_gives_the_same_waits(settings: SimulateSettings, policy: str) -> None:
    assert play(settings, policy) == play(settings, policy)


def test_nobody_waits_in_the_router_where_engines_have_room() -> None:
    assert not any(outcome.waited_ms for outcome in play(CALM).outcomes)


@pytest.mark.parametrize("policy", ["cost", "weighted", "round_robin"])
def test_where_nobody_need_wait_it_is_all_the_same_whether_anybody_could(policy: str) -> None:
    assert play(CALM, policy) == play(changed(CALM, waiting="engines"), policy)


def test_nobody_waits_in_the_router_if_requests_are_to_wait_in_engines() -> None:
    played = play(changed(BUSY, waiting="engines"))
    assert not any(outcome.waited_ms or outcome.shed for outcome in played.outcomes)


def test_who_waits_for_too_long_is_shed_and_never_reaches_an_engine() -> None:
    played = play(changed(BUSY, queue_ttl_ms=500))
    shed = [outcome for outcome in played.outcomes if outcome.shed is not None]
    assert 5 < len(shed) < 150
    assert all(each.shed == "expired" and each.made_tokens == 0 and each.sent_ms is None for each in shed)
    assert max(outcome.waited_ms for outcome in played.outcomes) <= 600
    assert sum(engine.requests for engine in played.engines) == 150 - len(shed)


def test_who_finds_the_queue_full_is_shed() -> None:
    played = play(changed(BUSY, queue_requests=4))
    assert {outcome.shed for outcome in played.outcomes} == {None, "queue-full"}


def test_only_a_policy_that_reckons_in_milliseconds_waits_while_engines_have_room() -> None:
    """One engine is saturated by two long prompts that others share; all the rest of the fleet is idle."""
    settings = changed(BUSY, engines=8, rate=8.0, engine_prefill_tokens=1024)
    held = {
        policy: sum(each.waited_ms > 0 for each in play(settings, policy).outcomes) for policy in ("cost", "random")
    }
    assert held["cost"] > held["random"]


def test_bounds_are_those_of_the_router() -> None:
    made, router = SimulateSettings(synthetic=1).router(), RouterSettings()
    for name in ("engine_queue", "engine_requests", "engine_prefill_tokens", "queue_requests", "queue_bytes"):
        assert getattr(made, name) == getattr(router, name)
    assert (made.queue_ttl_ms, made.heartbeat_ms) == (router.queue_ttl_ms, router.heartbeat_ms)
