"""The offline simulation: nothing is lost, the same seed gives the same, and engines take as long as online."""

import argparse
import asyncio
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import zmq

from vllm_llmd.errors import ConfigError
from vllm_llmd.names import EngineId
from vllm_llmd.router import policies
from vllm_llmd.router.candidates import Candidates
from vllm_llmd.router.policy import Choice, PolicySettings
from vllm_llmd.router.request import Facts
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.slo import NOTHING, Wish
from vllm_llmd.sim.asks import Ask
from vllm_llmd.sim.engine import SimEngine
from vllm_llmd.sim.limits import EnginePolicy
from vllm_llmd.sim.settings import SimSettings
from vllm_llmd.simulate import main, traffic
from vllm_llmd.simulate.events import Events
from vllm_llmd.simulate.member import Member
from vllm_llmd.simulate.outcomes import Played
from vllm_llmd.simulate.routing import Routing
from vllm_llmd.simulate.settings import SimulateSettings, add_arguments, from_args
from vllm_llmd.simulate.simulation import Simulation
from vllm_llmd.simulate.trace import TraceRequest, as_line
from vllm_llmd.testing.virtual_loop import VirtualLoop

SMALL = SimSettings(block_size=64, blocks=600, token_budget=2048, max_sequences=16)
"""Blocks run short, prompts come in chunks, and requests wait for each other."""

SETTINGS = SimulateSettings(synthetic=120, engines=3, seed=5, rate=12.0, model=SMALL)
SPLIT = msgspec.structs.replace(SETTINGS, engines=4, prefill=2)


def play(settings: SimulateSettings, policy: str = "round_robin") -> Played:
    return main.played(policy, settings, main.traffic_of(settings))


@pytest.mark.parametrize("settings", [SETTINGS, SPLIT], ids=["aggregated", "disaggregated"])
@pytest.mark.parametrize("policy", policies.BUILT_IN)
def test_every_request_ends_once_and_tokens_add_up(settings: SimulateSettings, policy: str) -> None:
    played = play(settings, policy)
    assert len(played.outcomes) == 120
    for outcome in played.outcomes:
        assert outcome.refused is None
        assert outcome.made_tokens == outcome.output_tokens
        assert outcome.first_ms is not None and outcome.last_ms is not None
        assert outcome.at_ms < outcome.first_ms <= outcome.last_ms <= played.end_ms
        assert 1 <= outcome.computed_tokens <= outcome.prompt_tokens + 1
    assert sum(engine.requests for engine in played.engines) == 120
    computed = sum(engine.computed_tokens for engine in played.engines)
    assert computed == sum(outcome.computed_tokens for outcome in played.outcomes)
    orders = sum(engine.orders for engine in played.engines)
    made = sum(engine.output_tokens for engine in played.engines)
    assert made == sum(outcome.output_tokens for outcome in played.outcomes) + orders


def test_where_engines_have_roles_prompts_are_prefilled_by_some_and_answered_by_others() -> None:
    played = play(SPLIT)
    prefill, decode = played.engines[:2], played.engines[2:]
    assert [engine.requests for engine in prefill] == [0, 0]
    assert [engine.orders for engine in decode] == [0, 0]
    assert sum(engine.orders for engine in prefill) > 100
    assert sum(engine.computed_tokens for engine in prefill) > 10 * sum(engine.computed_tokens for engine in decode)


@pytest.mark.parametrize("settings", [SETTINGS, SPLIT], ids=["aggregated", "disaggregated"])
def test_the_same_seed_gives_the_same_report_and_another_seed_another(settings: SimulateSettings) -> None:
    def report(seed: int) -> bytes:
        with_seed = msgspec.structs.replace(settings, seed=seed)
        return msgspec.json.encode(main.summarised("power_of_two", with_seed, main.traffic_of(with_seed)))

    assert report(5) == report(5) != report(6)


def test_what_the_router_predicts_is_what_engines_find() -> None:
    """Its index is told of every change: a request that need not wait finds what was predicted."""
    settings = msgspec.structs.replace(SETTINGS, engines=1, rate=0.2)
    for outcome in play(settings, "prefix_first").outcomes:
        found = outcome.prompt_tokens - outcome.computed_tokens
        assert found == min(outcome.predicted_cached_tokens, (outcome.prompt_tokens - 1) // 64 * 64)


@pytest.mark.parametrize("cpu_gbps", [1.0, 20.0])
def test_the_router_learns_how_fast_engines_bring_offloaded_blocks_back(cpu_gbps: float) -> None:
    model = msgspec.structs.replace(SMALL, blocks=400, cpu_blocks=20_000, cpu_gbps=cpu_gbps)
    settings = msgspec.structs.replace(SETTINGS, synthetic=400, engines=2, rate=2.0, model=model)
    events, limits, speeds = Events(), model.limits(), model.speeds()
    policy = policies.make("cost", PolicySettings(settings.min_remote_tokens, random.Random(0)))
    routing = Routing(RouterSettings(), events, policy)
    members = [Member(engine, role, limits, speeds) for engine, role in settings.fleet()]
    Simulation(members, routing, events, settings.heartbeat_ms).run(main.traffic_of(settings))
    for member in members:
        learned_ms = routing.fleet.models.rates(member.id).reload_token_ms
        assert speeds.reload_ms(1) / 2 < learned_ms < 2 * speeds.reload_ms(1)


def test_what_follows_an_answer_is_asked_then_and_counts_like_the_others() -> None:
    """One user after the other: nobody ever waits."""
    requests = main.traffic_of(SETTINGS)[:20]
    rest = iter(requests[1:])

    def follow(number: int, now_ms: float) -> list[TraceRequest]:
        return [replace(each, at_ms=now_ms) for each in itertools.islice(rest, 1)]

    settings = msgspec.structs.replace(SETTINGS, engines=1)
    played = main.played("round_robin", settings, requests[:1], follow)
    assert [each.prompt_tokens for each in played.outcomes] == [each.prompt_tokens for each in requests]
    for former, latter in pairwise(played.outcomes):
        assert latter.at_ms == former.last_ms
    assert played.end_ms == played.outcomes[-1].last_ms


def test_what_follows_a_request_that_is_refused_is_asked_as_well() -> None:
    endless, short = TraceRequest(0.0, 100_000, 1, list(range(196))), TraceRequest(0.0, 512, 1, [1])
    played = main.played("random", SETTINGS, [endless], lambda number, now_ms: [short] if number == 0 else [])
    assert [each.refused is None for each in played.outcomes] == [False, True]


def test_a_request_that_can_never_fit_is_refused_and_the_others_are_served() -> None:
    requests = [TraceRequest(0, 512 * 80, 5, list(range(80))), TraceRequest(1, 600, 5, [0, 1])]
    played = main.played("round_robin", SETTINGS, requests)
    assert played.outcomes[0].refused is not None and "long enough" in played.outcomes[0].refused
    assert played.outcomes[1].made_tokens == 5


LONG, SHORT = TraceRequest(0.0, 16_000, 4, list(range(32))), TraceRequest(30.0, 600, 4, [90, 91])
"""The one takes eight steps, and the other comes in the first of them."""


@pytest.mark.parametrize("prefill", [0, 1], ids=["aggregated", "disaggregated"])
@pytest.mark.parametrize(
    ("engine_policy", "policy", "overtakes"),
    [("priority", "cost", True), ("fcfs", "cost", False), ("priority", "least_requests", False)],
)
def test_a_short_prompt_overtakes_a_long_one_if_engines_go_by_when_the_policy_says_that_it_is_due(
    engine_policy: EnginePolicy, policy: str, overtakes: bool, prefill: int
) -> None:
    settings = SimulateSettings(
        synthetic=1, engines=1 + prefill, prefill=prefill, engine_policy=engine_policy, model=SMALL
    )
    long, short = main.played(policy, settings, [LONG, SHORT]).outcomes
    assert {each.source for each in (long, short)} == {EngineId("prefill-0") if prefill else None}
    assert long.first_ms is not None and short.first_ms is not None
    assert (short.first_ms < long.first_ms) == overtakes


@pytest.mark.parametrize("wish", [Wish(priority=1), Wish(ttft_ms=10.0)], ids=["priority", "objective"])
def test_it_does_not_if_the_client_of_the_long_one_is_in_a_hurry(wish: Wish) -> None:
    settings = SimulateSettings(synthetic=1, engines=1, model=SMALL)
    long, short = main.played("cost", settings, [replace(LONG, wish=wish), SHORT]).outcomes
    assert long.first_ms is not None and short.first_ms is not None and long.first_ms < short.first_ms


# --- against the online engine ------------------------------------------------------------------------------------


async def ask_online(engine: SimEngine, request: TraceRequest, number: int) -> tuple[float, float]:
    """Seconds to the first and to the last token of one request, as whoever listens to the engine has them."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(request.at_ms / 1000)
    began_s = loop.time()
    answer = request.answer(number)
    ask = Ask("completion", "sim", None, [request.prompt()], [answer], ["length"], True, False, None, 0, None)
    [stream] = engine.submit(ask)
    made = await stream.more()
    first_s = loop.time() - began_s
    while made < len(answer):
        made += await stream.more()
    engine.leave([stream])
    return first_s, loop.time() - began_s


def online(model: SimSettings, requests: Sequence[TraceRequest]) -> list[tuple[float, float]]:
    async def all_of_them() -> list[tuple[float, float]]:
        sockets: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        engine = SimEngine(model, EngineId("sim"), sockets)
        engine.start("http://nowhere", None)
        asked = [ask_online(engine, request, number) for number, request in enumerate(requests)]
        answered = await asyncio.gather(*asked)
        await engine.stop()
        sockets.term()
        return answered

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(all_of_them())


@pytest.mark.parametrize("rate", [2.0, 20.0])
def test_a_simulated_fleet_of_one_takes_as_long_as_the_engine_online(rate: float) -> None:
    settings = msgspec.structs.replace(SETTINGS, synthetic=60, engines=1, rate=rate, waiting="engines")
    requests = main.traffic_of(settings)
    offline = main.played("round_robin", settings, requests).outcomes
    for outcome, (ttft_s, e2e_s) in zip(offline, online(SMALL, requests), strict=True):
        assert outcome.ttft_ms == pytest.approx(ttft_s * 1000, abs=0.01)
        assert outcome.e2e_ms == pytest.approx(e2e_s * 1000, abs=0.01)


# --- the command --------------------------------------------------------------------------------------------------


def settings_of(*flags: str) -> SimulateSettings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_args(parser.parse_args(flags))


def test_a_trace_is_played_and_reported(tmp_path: Path) -> None:
    trace = tmp_path / "chats.jsonl"
    trace.write_bytes(b"\n".join(map(as_line, traffic.synthetic(60, random.Random(1)))))
    told, html, report = [], tmp_path / "report.html", tmp_path / "report.json"
    flags = ("--trace", str(trace), "--engines", "2", "--html", str(html), "--json", str(report))
    assert main.run(settings_of(*flags, "--policy", "round_robin", "--policy", "weighted"), told.append) == 0
    assert [line.split(":")[0] for line in told[:2]] == ["round_robin", "weighted"]
    assert "TTFT ms p50" in told[2]
    runs = json.loads(report.read_text())["runs"]
    assert [(run["policy"], run["requests"], run["ended"]) for run in runs] == [
        ("round_robin", 60, 60),
        ("weighted", 60, 60),
    ]
    page = html.read_text()
    assert page.count("<svg") == 11
    assert "://" not in page and "<script" not in page and "<link" not in page


def test_objectives_are_sent_only_if_they_are_to_be() -> None:
    flags = "--synthetic", "50", "--tight-share", "0.5"
    silent, told = (main.traffic_of(settings_of(*flags, *more)) for more in ((), ("--send-slo",)))
    assert [request.slo for request in silent] == [request.slo for request in told]
    assert {request.wish for request in silent} == {NOTHING}
    assert {request.wish.ttft_ms for request in told} == {1000.0, 5000.0}


class Noting:
    """A policy that chooses nobody."""

    def __init__(self) -> None:
        self.asked: list[Facts] = []

    def choose(self, facts: Facts, candidates: Candidates) -> Choice | None:
        self.asked.append(facts)
        return None


class ByLength:
    """Chooses by how many tokens a prompt has."""

    def __init__(self, choices: Mapping[int, Choice]) -> None:
        self._choices = choices

    def choose(self, facts: Facts, candidates: Candidates) -> Choice | None:
        return self._choices[facts.prompt_tokens]


@pytest.mark.parametrize("until", [1536, 1600])
def test_what_a_source_has_cached_travels_while_its_step_computes_for_others(until: int) -> None:
    """If it has all of it: else it comes with the end of the step, which computes the rest."""
    policy = ByLength({1536: Choice(0), 3072: Choice(0), 1700: Choice(1, 0, until)})
    events = Events()
    routing = Routing(RouterSettings(), events, policy)
    members = [Member(EngineId(each), "both", SMALL.limits(), SMALL.speeds()) for each in "ab"]
    cached = TraceRequest(0.0, 1536, 1, [1, 2, 3])
    long = TraceRequest(2000.0, 3072, 1, [5, 6, 7, 8, 9, 10])
    fetches = TraceRequest(2001.0, 1700, 1, [1, 2, 3, 4])
    played = Simulation(members, routing, events, 500.0).run([cached, long, fetches])
    first_ms = [outcome.first_ms or 0.0 for outcome in played.outcomes]
    assert sum(engine.orders for engine in played.engines) == 1
    assert (first_ms[2] < first_ms[1]) == (until == 1536)


def test_a_policy_is_told_what_is_left_of_the_time_until_the_first_token() -> None:
    events, policy = Events(), Noting()
    routing = Routing(RouterSettings(), events, policy)
    call = routing.call("0", TraceRequest(0, 600, 2, [0, 1]).prompt(), None, Wish(ttft_ms=1000.0, tpot_ms=50.0))
    for at_ms in 0.0, 300.0:
        events.at(at_ms, lambda _: routing.plan(call), None)
    while events.next():
        pass
    assert [(facts.ttft_ms, facts.tpot_ms) for facts in policy.asked] == [(1000.0, 50.0), (700.0, 50.0)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "give either a trace"),
        (("--trace", "t", "--synthetic", "5"), "give either a trace"),
        (("--synthetic", "5", "--engines", "0"), "engines must be at least 1"),
        (("--synthetic", "5", "--engines", "2", "--prefill", "2"), "prefill must be between 0 and 1"),
        (("--synthetic", "5", "--rate", "1", "--speedup", "2"), "give one"),
        (("--synthetic", "5", "--rate", "nan"), "rate must be more than 0"),
        (("--synthetic", "5", "--tight-share", "1.5"), "tight_share must be between 0 and 1"),
        (("--synthetic", "5", "--best-effort-share", "-0.1"), "best_effort_share must be between 0 and 1"),
        (("--synthetic", "5", "--preemptions", "-1"), "preemptions must be"),
        (("--synthetic", "5", "--tight-ttft-ms", "0"), "tight_ttft_ms must be more than 0"),
        (("--synthetic", "5", "--blocks", "0"), "blocks must be at least 1"),
        (("--synthetic", "5", "--step-ms", "0"), "step_ms must be more than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(flags: Sequence[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings_of(*flags)


def test_a_policy_or_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="policy must be one of"):
        main.run(settings_of("--synthetic", "5", "--policy", "oracle"), print)
    with pytest.raises(ConfigError, match="cannot be read"):
        main.run(settings_of("--trace", str(tmp_path / "none")), print)
