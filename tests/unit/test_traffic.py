"""What the router sees of demand, and what it wants of it: counted once, by pool, safe when nothing is known."""

import math
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.names import EngineId, Epoch, Role
from vllm_llmd.router.autoscaling.demand import PARTS, Window
from vllm_llmd.router.autoscaling.replicas import Plan
from vllm_llmd.router.autoscaling.scaling import MOST, PLACED_AMONG
from vllm_llmd.router.decide import Decision
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.request import Facts
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.slo import NOTHING, Wish
from vllm_llmd.router.upstream.seen import Measured, Seen
from vllm_llmd.router.upstream.usage import Usage
from vllm_llmd.testing.clock import FakeClock
from vllm_llmd.wire import EngineInfo, Load

SETTINGS = RouterSettings()
WINDOW_MS = SETTINGS.scaling_window_ms


NO_PROMPT = Facts(None, None, b"", b"", 0, None)


@dataclass
class Site:
    """A fleet in which requests come at a steady pace, and engines compute a token in `token_ms`."""

    settings: RouterSettings = SETTINGS
    token_ms: float = 0.1
    clock: FakeClock = field(default_factory=FakeClock)
    numbers: int = 0

    def __post_init__(self) -> None:
        self.fleet = Fleet(self.settings, self.clock, "r")
        self.no_text = self.fleet.cut(NO_PROMPT)

    def engine(self, name: str, role: Role = "both", model: str = "m", **more: object) -> None:
        info = EngineInfo(EngineId(name), Epoch(1), role, "http://h", [model], 16, 4096, 9999, "f", [])
        self.fleet.membership.join(msgspec.structs.replace(info, **more), self.clock.now_ms())
        self.fleet.membership.index_exact(info.id)

    def ask(self, destination: str, tokens: int, source: str | None = None, wish: Wish = NOTHING) -> str:
        """A request is placed; nothing of its prompt is cached."""
        self.numbers += 1
        request = str(self.numbers)
        known = self.fleet.membership.get(EngineId(destination))
        assert known is not None
        self.fleet.traffic.asked(request, known.info.models[0], wish, self.clock.now_ms())
        self.fleet.place(request, self.decision(destination, tokens, source), NO_PROMPT, self.no_text)
        return request

    def decision(self, destination: str, tokens: int, source: str | None = None) -> Decision:
        prefill = (
            {EngineId(destination): tokens} if source is None else {EngineId(destination): 0, EngineId(source): tokens}
        )
        seen = Seen(0.0, 0.0, 0.0, float(tokens), 0.0)
        origin = None if source is None else EngineId(source)
        return Decision(EngineId(destination), origin, 0, 0, tokens, {}, prefill_tokens=prefill, seen=seen)

    def answer(self, request: str, destination: str, tokens: int, output: int, source: str | None = None) -> None:
        decision = self.decision(destination, tokens, source)
        self.fleet.answering(request, decision)
        measured = Measured(
            self.token_ms * tokens + 10, self.token_ms * tokens + 10 * output, True, Usage(tokens, 0, output)
        )
        self.fleet.answered(request, decision, measured)
        self.fleet.done(request, decision)

    def play(
        self, minutes: float, per_s: float, destination: str = "a", tokens: int = 1000, source: str | None = None
    ) -> None:
        """Requests one after the other, each answered when it has been computed."""
        for _ in range(int(minutes * 60 * per_s)):
            self.answer(self.ask(destination, tokens, source), destination, tokens, 50, source)
            self.clock.advance(1000 / per_s)

    def plans(self) -> dict[tuple[str, Role], Plan]:
        return {(plan.model, plan.role): plan for plan in self.fleet.plans()}

    def plan(self, role: Role = "both", model: str = "m") -> Plan:
        return self.plans()[model, role]


def test_a_window_forgets_what_is_older_than_it_is() -> None:
    window = Window(PARTS * 1000.0, 0.0)
    for at_ms in range(0, 40_000, 100):
        window.add(1.0, float(at_ms))
    assert window.total(39_900.0) / window.covered_ms(39_900.0) == pytest.approx(0.01, rel=0.02)
    assert window.total(60_000.0) == 0


def test_a_window_that_has_just_begun_says_no_more_than_it_has_seen() -> None:
    window = Window(PARTS * 1000.0, 0.0)
    window.add(1.0, 0.0)
    assert window.total(0.0) / window.covered_ms(0.0) == 1 / 1000


def test_demand_is_what_comes_per_second() -> None:
    site = Site()
    site.engine("a")
    site.play(3, per_s=2.0)
    plan = site.plan()
    assert plan.requests_per_s == pytest.approx(2.0, rel=0.05)
    assert plan.prefill_tokens_per_s == pytest.approx(2000.0, rel=0.05)
    assert plan.output_tokens_per_s == pytest.approx(100.0, rel=0.05)


def test_more_demand_wants_more_engines() -> None:
    wanted = []
    for per_s in (0.2, 1.0, 4.0):
        site = Site()
        site.engine("a")
        site.play(3, per_s, tokens=20_000)
        wanted.append(site.plan().desired.replicas)
    assert wanted[0] < wanted[1] < wanted[2]


def test_a_prompt_that_another_engine_computes_is_that_pool_s_demand() -> None:
    site = Site()
    site.engine("p", "prefill")
    site.engine("d", "decode")
    site.play(3, per_s=2.0, destination="d", tokens=20_000, source="p")
    prefill, decode = site.plan("prefill"), site.plan("decode")
    assert prefill.prefill_tokens_per_s == pytest.approx(40_000, rel=0.05)
    assert (decode.prefill_tokens_per_s, prefill.output_tokens_per_s) == (0.0, 0.0)
    assert decode.output_tokens_per_s == pytest.approx(100, rel=0.05)
    assert prefill.desired.replicas > 1


def test_only_prefill_engines_that_get_prompts_by_their_queues_count_as_having_one_queue() -> None:
    wanted = []
    for policy in ("cost", "round_robin"):
        site = Site(msgspec.structs.replace(SETTINGS, policy=policy))
        site.engine("p", "prefill")
        site.engine("d", "decode")
        site.play(3, per_s=2.0, destination="d", tokens=20_000, source="p")
        wanted.append(site.plan("prefill"))
        assert site.plan("decode").demand.placed_among == PLACED_AMONG
    assert [plan.demand.placed_among for plan in wanted] == [MOST, PLACED_AMONG]
    assert wanted[0].desired.replicas < wanted[1].desired.replicas


def test_models_are_scaled_apart() -> None:
    site = Site()
    site.engine("a", model="m")
    site.engine("b", model="n")
    site.play(3, per_s=2.0, destination="b", tokens=20_000)
    assert site.plan(model="m").desired.replicas == 1
    assert site.plan(model="n").desired.replicas > 1


def test_an_adapter_s_requests_are_its_base_model_s() -> None:
    site = Site()
    site.engine("a", adapters=["lora"])
    site.fleet.traffic.asked("r", "lora", NOTHING, 0.0)
    assert site.plan().model == "m"
    assert site.fleet.traffic.models["m"].asked.total(0.0) == 1


def test_a_request_for_a_model_that_nobody_serves_counts_nowhere() -> None:
    site = Site()
    site.engine("a")
    site.fleet.traffic.asked("r", "other", NOTHING, 0.0)
    assert set(site.plans()) == {("m", "both")}


def test_a_request_that_is_tried_twice_counts_once() -> None:
    site = Site()
    site.engine("a")
    site.engine("b")
    request = site.ask("a", 1000)
    site.fleet.place(request, site.decision("b", 1000), NO_PROMPT, site.no_text)
    assert site.fleet.traffic.models["m"].placed.total(0.0) == 1


def test_without_engines_or_requests_nothing_is_wanted_or_the_least() -> None:
    site = Site()
    assert site.plans() == {}
    site.engine("a")
    site.clock.advance(2 * WINDOW_MS)
    assert (site.plan().desired.replicas, site.plan().desired.bound) == (1, "min")


def test_a_router_that_has_just_started_wants_no_fewer_than_there_are() -> None:
    site = Site()
    for name in "abcd":
        site.engine(name)
    assert (site.plan().desired.replicas, site.plan().desired.bound) == (4, "unknown")
    site.clock.advance(2 * WINDOW_MS)
    assert site.plan().desired.replicas == 1


def test_what_few_requests_say_takes_no_engine_away() -> None:
    site = Site()
    for name in "abcd":
        site.engine(name)
    site.clock.advance(2 * WINDOW_MS)
    site.answer(site.ask("a", 10), "a", 10, 5)
    assert (site.plan().desired.replicas, site.plan().desired.bound) == (4, "unknown")


def test_bounds_are_kept() -> None:
    site = Site(RouterSettings(min_replicas=2, max_replicas=3))
    site.engine("a")
    site.clock.advance(2 * WINDOW_MS)
    assert site.plan().desired.replicas == 2
    site.play(3, per_s=4.0, tokens=20_000)
    assert (site.plan().desired.replicas, site.plan().desired.bound) == (3, "max")


def test_somebody_is_wanted_while_requests_wait_although_none_need_be() -> None:
    site = Site(RouterSettings(min_replicas=0))
    site.engine("a")
    site.play(3, per_s=1.0)
    site.clock.advance(2 * WINDOW_MS)
    assert site.plan().desired.replicas == 0
    site.fleet.traffic.asked("w", "m", NOTHING, site.clock.now_ms())
    site.fleet.traffic.waits("w")
    site.clock.advance(2 * WINDOW_MS)
    assert site.plan().desired.replicas == 1
    site.fleet.traffic.done("w")
    assert site.plan().desired.replicas == 0


def test_a_long_queue_wants_more_than_its_requests_did_as_they_came() -> None:
    site = Site()
    site.engine("a")
    site.play(3, per_s=1.0)
    before = site.plan().desired.replicas
    for number in range(6000):
        site.fleet.traffic.asked(f"w{number}", "m", NOTHING, site.clock.now_ms())
        site.fleet.traffic.waits(f"w{number}")
    site.clock.advance(2 * WINDOW_MS)
    after = site.plan().desired
    assert after.replicas > before
    assert after.bound == "queue"


def test_an_objective_of_a_client_counts_in_place_of_the_router_s() -> None:
    wanted = []
    for wish in (NOTHING, Wish(ttft_ms=1500.0)):
        site = Site()
        site.engine("a")
        for _ in range(3 * 60 * 3):
            site.answer(site.ask("a", 10_000, wish=wish), "a", 10_000, 50)
            site.clock.advance(1000 / 3)
        wanted.append(site.plan().desired.replicas)
    assert wanted[1] > wanted[0]


def test_best_effort_has_no_objective_but_must_be_served() -> None:
    site = Site(RouterSettings(slo_ttft_ms=1500))
    site.engine("a")
    for _ in range(3 * 60 * 3):
        site.answer(site.ask("a", 10_000, wish=Wish(priority=-1)), "a", 10_000, 50)
        site.clock.advance(1000 / 3)
    plan = site.plan()
    assert not any(map(math.isfinite, plan.demand.until_ms))
    assert plan.demand.prefill_load < plan.desired.replicas <= plan.demand.prefill_load + 2


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_how_busy_engines_say_they_are_corrects_what_the_cost_model_thinks(share: float) -> None:
    """Requests of 1,000 tokens, one per second, keep an engine busy for as long as its reports have it."""
    site = Site()
    site.engine("a")
    engine = site.fleet.membership.get(EngineId("a"))
    assert engine is not None
    for number in range(6000):
        if number % 20 == 0:
            site.answer(site.ask("a", 1000), "a", 1000, 50)
        load = Load(running=1, prefill_tokens=500 if number % 20 < 20 * share else 0)
        site.fleet.reported(engine.info.id, load, 0)
        site.clock.advance(50)
    assert site.plan().demand.prefill_load == pytest.approx(share, rel=0.15)


def test_reports_while_kv_is_waited_for_say_nothing_of_computing() -> None:
    site = Site()
    site.engine("a")
    for _ in range(100):
        site.fleet.reported(EngineId("a"), Load(waiting_for_kv=1, prefill_tokens=500), 0)
        site.clock.advance(500)
    [pool] = site.fleet.traffic.models["m"].pools.values()
    assert pool.busy_ms.total(site.clock.now_ms()) == 0


def test_an_engine_that_drains_is_none_that_there_is() -> None:
    site = Site()
    site.engine("a")
    site.engine("b")
    site.fleet.membership.drain(EngineId("a"))
    assert site.plan().engines == 1


numbers = st.one_of(st.integers(-5, 10**30), st.just(0))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 10**7), numbers, numbers, st.floats(allow_nan=True)), max_size=20))
def test_whatever_engines_say_what_is_wanted_stays_a_number(told: list[tuple[int, int, int, float]]) -> None:
    site = Site()
    site.engine("a")
    for tokens, prompt, output, step_ms in told:
        request, decision = site.ask("a", tokens), site.decision("a", tokens)
        site.fleet.reported(EngineId("a"), Load(running=output, prefill_tokens=prompt, step_ms=step_ms), 0)
        site.fleet.answering(request, decision)
        site.fleet.answered(request, decision, Measured(1.0, 2.0, True, Usage(prompt, 0, output)))
        site.fleet.done(request, decision)
        site.clock.advance(1000)
    site.clock.advance(WINDOW_MS / 2)
    plan = site.plan()
    assert 1 <= plan.desired.replicas <= SETTINGS.max_replicas
    assert all(map(math.isfinite, (plan.requests_per_s, plan.output_tokens_per_s, plan.demand.prefill_load)))


def test_requests_that_never_end_are_forgotten_in_the_end() -> None:
    site = Site()
    site.engine("a")
    for number in range(70_000):
        site.fleet.traffic.asked(str(number), "m", NOTHING, 0.0)
        site.fleet.traffic.waits(str(number))
    assert site.fleet.traffic.models["m"].waiting <= 65_536
