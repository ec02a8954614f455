"""Best effort that simulated engines leave to others: as behind the real router, and everybody is served."""

import random
from dataclasses import replace

import msgspec
import pytest

from vllm_llmd.router import policies
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.slo import Wish
from vllm_llmd.sim.settings import SimSettings
from vllm_llmd.simulate import main, traffic
from vllm_llmd.simulate.events import Events
from vllm_llmd.simulate.member import Member
from vllm_llmd.simulate.outcomes import Outcome, Played
from vllm_llmd.simulate.routing import Routing
from vllm_llmd.simulate.settings import SimulateSettings
from vllm_llmd.simulate.simulation import Simulation
from vllm_llmd.simulate.trace import TraceRequest

ROOMY = SimSettings(block_size=64, blocks=600, token_budget=2048, max_sequences=16)
BUSY = SimulateSettings(
    synthetic=150, engines=3, seed=5, rate=30.0, engine_prefill_tokens=8192, best_effort_share=0.5, model=ROOMY
)
SPLIT = msgspec.structs.replace(BUSY, engines=4, prefill=2)
OFFLOADING = msgspec.structs.replace(BUSY, model=msgspec.structs.replace(ROOMY, blocks=400, cpu_blocks=5000))
FLEETS = pytest.mark.parametrize("settings", [BUSY, SPLIT, OFFLOADING], ids=["one role", "split", "offloading"])


def changed(settings: SimulateSettings, **changes: object) -> SimulateSettings:
    return msgspec.structs.replace(settings, **changes)


def play(settings: SimulateSettings, policy: str = "cost") -> Played:
    return main.played(policy, settings, main.traffic_of(settings))


def by_band(played: Played) -> tuple[list[Outcome], list[Outcome]]:
    """Best effort, and the others."""
    return [each for each in played.outcomes if each.priority < 0], [
        each for each in played.outcomes if each.priority >= 0
    ]


@FLEETS
@pytest.mark.parametrize("policy", ["cost", "round_robin", "least_requests"])
def test_best_effort_gives_way_so_often_at_most_and_everybody_is_answered_in_full(
    settings: SimulateSettings, policy: str
) -> None:
    played = play(settings, policy)
    best_effort, others = by_band(played)
    assert sum(each.preempted for each in best_effort) > 5
    assert max(each.preempted for each in best_effort) <= settings.preemptions
    assert not any(each.preempted or each.lost_ms for each in others)
    for outcome in played.outcomes:
        assert outcome.refused is None and outcome.shed is None
        assert outcome.made_tokens == outcome.output_tokens
        assert outcome.sent_ms is not None and outcome.first_ms is not None
        assert outcome.waited_ms >= 0
        assert outcome.at_ms + outcome.lost_ms <= outcome.sent_ms < outcome.first_ms


@FLEETS
def test_what_engines_did_is_what_became_of_requests(settings: SimulateSettings) -> None:
    played = play(settings)
    assert sum(each.requests for each in played.engines) == 150 + sum(each.preempted for each in played.outcomes)
    computed = sum(each.computed_tokens for each in played.engines)
    assert computed == sum(each.computed_tokens for each in played.outcomes)
    assert all(each.computed_tokens >= 1 for each in played.outcomes)


@FLEETS
def test_engines_hold_nothing_for_those_that_they_left(settings: SimulateSettings) -> None:
    events, limits, speeds = Events(), settings.model.limits(), settings.model.speeds()
    policy = policies.make("cost", PolicySettings(settings.min_remote_tokens, random.Random(0)))
    routing = Routing(settings.router(), events, policy)
    members = [Member(engine, role, limits, speeds) for engine, role in settings.fleet()]
    played = Simulation(members, routing, events, settings.heartbeat_ms).run(main.traffic_of(settings))
    assert sum(each.preempted for each in played.outcomes) > 5
    assert len(routing.admission.preemption) == len(routing.admission) == 0
    for member in members:
        member.model.step(played.end_ms)
        assert member.idle and member.model.pool.free == limits.blocks
        known = routing.fleet.membership.get(member.id)
        assert known is not None and len(known.occupancy) == 0


@FLEETS
def test_the_same_seed_gives_the_same(settings: SimulateSettings) -> None:
    assert play(settings) == play(settings)


def test_with_none_allowed_or_no_best_effort_nobody_gives_way() -> None:
    for settings in (changed(BUSY, preemptions=0), changed(BUSY, best_effort_share=0.0)):
        assert not any(each.preempted for each in play(settings).outcomes)


def test_who_gave_way_may_be_shed_when_it_comes_again() -> None:
    played = [play(changed(BUSY, queue_ttl_ms=900, engine_policy="fcfs", seed=seed)) for seed in range(3)]
    away = [each for game in played for each in game.outcomes if each.shed is not None and each.preempted]
    assert len(away) > 5 and all(each.sent_ms is None and each.made_tokens == 0 for each in away)


# --- one victim ---------------------------------------------------------------------------------------------------

ONE = SimulateSettings(synthetic=1, engines=1, engine_prefill_tokens=8192, model=ROOMY)
LONG = TraceRequest(0.0, 30 * 512, 20, list(range(30)), wish=Wish(priority=-1))
URGENT = TraceRequest(150.0, 600, 5, [100, 101])


def test_an_urgent_request_comes_first_and_the_victim_finds_in_the_cache_what_was_computed_of_it() -> None:
    victim, urgent = main.played("cost", ONE, [LONG, URGENT]).outcomes
    waits, waiting = main.played("cost", changed(ONE, preemptions=0), [LONG, URGENT]).outcomes
    assert (victim.preempted, waits.preempted) == (1, 0)
    assert urgent.ttft_ms is not None and waiting.ttft_ms is not None
    assert urgent.ttft_ms < waiting.ttft_ms / 2
    assert victim.lost_ms == 150.0 and victim.sent_ms == 150.0, "there is room for it, behind the other"
    assert LONG.prompt_tokens <= victim.computed_tokens <= LONG.prompt_tokens + 64
    assert victim.made_tokens == LONG.output_tokens


def test_who_has_begun_to_answer_stays() -> None:
    begun = replace(LONG, output_tokens=2000)
    victim, _ = main.played("cost", ONE, [begun, replace(URGENT, at_ms=5000.0)]).outcomes
    assert victim.first_ms is not None and victim.first_ms < 5000 < (victim.last_ms or 0)
    assert victim.preempted == 0


def test_a_victim_that_waits_for_kv_has_its_source_stop() -> None:
    settings = changed(ONE, engines=2, prefill=1)
    also_long = replace(URGENT, prompt_tokens=3000, hash_ids=list(range(100, 106)))
    victim, urgent = main.played("cost", settings, [LONG, also_long]).outcomes
    assert victim.preempted == 1 and victim.made_tokens == LONG.output_tokens
    assert urgent.first_ms is not None and victim.first_ms is not None and urgent.first_ms < victim.first_ms
    assert LONG.prompt_tokens <= victim.computed_tokens <= LONG.prompt_tokens + 65


# --- traffic ------------------------------------------------------------------------------------------------------


def test_a_share_of_the_requests_is_best_effort_and_has_no_objectives() -> None:
    plain = traffic.synthetic(400, random.Random(1))
    settings = changed(BUSY, synthetic=400, tight_share=0.5, send_slo=True, best_effort_share=0.25)
    mixed = main.traffic_of(settings)
    best_effort = [each for each in mixed if each.wish.priority < 0]
    assert 0.2 < len(best_effort) / len(plain) < 0.3
    assert all(each.slo is None and each.wish == Wish(priority=traffic.BEST_EFFORT) for each in best_effort)
    others = main.traffic_of(changed(settings, best_effort_share=0.0))
    assert [a for a in mixed if a.wish.priority >= 0] == [
        b for a, b in zip(mixed, others, strict=True) if a.wish.priority >= 0
    ]
