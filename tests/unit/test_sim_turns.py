"""Engines that serve by priority: long prompts yield to what is due earlier, and to nobody where all are alike."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.names import BlockName, EngineId
from vllm_llmd.router.upstream import turns
from vllm_llmd.sim.limits import EnginePolicy, Limits
from vllm_llmd.sim.requests import SimRequest
from vllm_llmd.sim.scheduler import Scheduler
from vllm_llmd.sim.speeds import Speeds

BLOCK, CHUNK, STEP_MS = 4, 32, 10.0
FLAT = Speeds(
    step_ms=STEP_MS,
    prefill_us_per_token=0.0,
    prefill_us_per_token_per_1k_context=0.0,
    decode_us_per_sequence=0.0,
    decode_us_per_1k_context=0.0,
)
LIMITS = Limits(block_size=BLOCK, blocks=400, token_budget=CHUNK, max_sequences=8, policy="priority")


def ask(name: str, prompt: int, priority: int = 0, output: int = 1, shared: int = 0, family: int = 0) -> SimRequest:
    """`shared` of its first tokens are those of all others of the family, too."""
    first, own = 1000 * family, (int.from_bytes(name.encode()) << 32) + prompt
    names = [*range(first, first + shared // BLOCK), *range(own, own + (prompt + output - shared) // BLOCK)]
    return SimRequest(name, prompt, output, [BlockName(each) for each in names], priority=priority)


@dataclass
class Bench:
    """An engine whose every step is noted: who was given how many tokens."""

    limits: Limits = LIMITS
    speeds: Speeds = FLAT
    now_ms: float = 0.0
    steps: list[dict[str, int]] = field(default_factory=list)
    first_ms: dict[str, float] = field(default_factory=dict)
    finished: list[SimRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = Scheduler(self.limits, self.speeds)

    def submit(self, *requests: SimRequest) -> None:
        for request in requests:
            self.model.submit(request, self.now_ms)

    def run(self, until_ms: float = 1e9) -> "Bench":
        while (due_ms := self.model.next_ms) is not None and due_ms <= until_ms:
            assert len(self.steps) < 10_000, "no step is in vain for ever"
            self.now_ms = due_ms
            report = self.model.step(due_ms)
            self.steps.append({request.id: tokens for request, tokens in self.model._batch})
            for request, tokens in report.made:
                if request.made == tokens:
                    self.first_ms[request.id] = due_ms
            self.finished += report.finished
        self.now_ms = max(self.now_ms, until_ms) if until_ms < 1e9 else self.now_ms
        return self

    def given(self, name: str) -> int:
        return sum(step.get(name, 0) for step in self.steps)


# --- bands, and who answers ---------------------------------------------------------------------------------------

NOW_MS = 1_790_000_000_000.0


def test_what_has_been_begun_yields_by_when_it_is_due_and_not_by_its_band() -> None:
    at = Bench()
    at.submit(ask("best effort", 128, priority=turns.priority(-1, NOW_MS, 100.0)))
    at.run(5.0)
    at.submit(ask("later", 32, priority=turns.priority(0, NOW_MS, 500.0)))
    at.submit(ask("sooner", 32, priority=turns.priority(0, NOW_MS, 10.0)))
    at.run()
    assert [next(iter(step)) for step in at.steps[:6]] == ["best effort", "sooner", *["best effort"] * 3, "later"]


def test_for_want_of_blocks_prompts_give_way_and_none_that_answers_though_it_was_due_last() -> None:
    at = Bench(replace(LIMITS, blocks=40))
    at.submit(ask("answers", 32, priority=turns.priority(-1, NOW_MS, 5000.0), output=64))
    at.run(15.0)
    at.submit(ask("prompt", 100, priority=turns.priority(0, NOW_MS, 1.0), output=16))
    at.run()
    by_name = {each.id: each.preemptions for each in at.finished}
    assert by_name["answers"] == 0 < by_name["prompt"]


# --- who yields ---------------------------------------------------------------------------------------------------


def test_a_long_prompt_yields_to_one_that_is_due_earlier_and_goes_on_after_it() -> None:
    at = Bench()
    at.submit(ask("long", 128, priority=9))
    at.run(5.0)
    at.submit(ask("short", 32, priority=1))
    at.run()
    assert at.steps[:4] == [{"long": 32}, {"short": 32}, {"long": 32}, {"long": 32}]
    assert (at.given("long"), at.given("short")) == (128, 32)


@pytest.mark.parametrize(("policy", "priority"), [("priority", 9), ("priority", 10), ("fcfs", 1)])
def test_it_yields_to_nobody_of_its_own_turn_or_of_a_later_one_nor_by_order_of_arrival(
    policy: EnginePolicy, priority: int
) -> None:
    at = Bench(replace(LIMITS, policy=policy))
    at.submit(ask("long", 128, priority=9))
    at.run(5.0)
    at.submit(ask("short", 32, priority=priority))
    at.run()
    assert at.steps[:5] == [*[{"long": 32}] * 4, {"short": 32}]


def test_of_two_prompts_that_are_being_computed_the_later_one_yields() -> None:
    at = Bench()
    at.submit(ask("later", 96, priority=5))
    at.run(5.0)
    at.submit(ask("sooner", 96, priority=3))
    at.run(15.0)
    at.submit(ask("soonest", 96, priority=1))
    at.run()
    assert at.first_ms == {"soonest": 50.0, "sooner": 70.0, "later": 90.0}


def test_who_decodes_goes_on_while_prompts_yield_to_each_other() -> None:
    at = Bench()
    at.submit(ask("decodes", 4, priority=50, output=6))
    at.run(5.0)
    at.submit(ask("long", 128, priority=9))
    at.run(15.0)
    at.submit(ask("short", 31, priority=1))
    at.run(35.0)
    assert at.steps[1:4] == [{"decodes": 1, "long": 31}, {"decodes": 1, "short": 31}, {"decodes": 1, "long": 31}]


def test_who_waits_for_kv_gets_it_ordered_at_once_and_its_last_token_computed_before_the_long_prompt_goes_on() -> None:
    at = Bench()
    at.submit(ask("long", 128, priority=9))
    at.run(5.0)
    remote = ask("remote", 100, priority=1)
    remote.source = EngineId("s")
    at.submit(remote)
    at.run(15.0)
    assert list(at.model.parked) == ["remote"]
    at.model.supplied("remote", 99, at.now_ms)
    at.run()
    assert at.steps == [{"long": 32}, {}, {"long": 32}, {"remote": 1}, {"long": 32}, {"long": 32}, {}]


# --- who follows --------------------------------------------------------------------------------------------------


def test_who_lacks_what_a_prompt_is_about_to_compute_waits_for_it_and_computes_only_the_rest() -> None:
    at = Bench()
    at.submit(ask("long", 128, priority=9, shared=64))
    at.run(5.0)
    follower = ask("follower", 80, priority=1, shared=64)
    at.submit(follower)
    at.run()
    assert at.steps[:4] == [{"long": 32}, {"long": 32}, {"follower": 16}, {"long": 32}]
    assert follower.cached_tokens == 64


def test_who_is_followed_goes_before_whoever_is_due_later_than_those_that_follow() -> None:
    at = Bench()
    at.submit(ask("long", 128, priority=9, shared=64))
    at.run(5.0)
    at.submit(ask("follower", 80, priority=1, shared=64), ask("other", 20, priority=5))
    at.run()
    assert at.steps[:4] == [{"long": 32}, {"long": 32}, {"follower": 16, "other": 16}, {"other": 4}]


def test_a_follower_is_passed_over_by_others_while_the_one_that_it_follows_is_held() -> None:
    at = Bench()
    at.submit(ask("long", 128, priority=9, shared=128))
    at.run(5.0)
    at.submit(ask("follower", 140, priority=5, shared=128), ask("other", 20, priority=1))
    at.run()
    assert at.steps[:3] == [{"long": 32}, {"other": 20}, {"long": 32}]
    assert at.given("follower") == 140 - 128


def supplied_from_elsewhere(name: str, prompt: int, priority: int, shared: int = 0) -> SimRequest:
    request = ask(name, prompt, priority, shared=shared)
    request.source = EngineId("s")
    return request


@pytest.mark.parametrize("policy", ["priority", "fcfs"])
def test_who_lacks_what_is_on_its_way_for_another_waits_for_it_while_others_pass(policy: EnginePolicy) -> None:
    at = Bench(replace(LIMITS, policy=policy, min_order_tokens=16))
    at.submit(supplied_from_elsewhere("first", 140, 5, shared=128))
    at.run(5.0)
    at.submit(ask("follower", 150, 1, shared=128), ask("other", 20, priority=9))
    at.run(35.0)
    assert at.steps[-2:] == [{"other": 20}, {}] and at.given("follower") == 0
    at.model.supplied("first", 128, at.now_ms)
    at.run()
    assert (at.given("first"), at.given("follower")) == (140 - 128, 150 - 128)


def test_of_two_with_the_same_source_one_asks_it_and_the_other_waits() -> None:
    at = Bench(replace(LIMITS, min_order_tokens=16))
    at.submit(supplied_from_elsewhere("late", 140, 5, shared=128), supplied_from_elsewhere("early", 150, 1, shared=128))
    at.run(5.0)
    assert list(at.model.parked) == ["early"]
    at.model.supplied("early", 128, at.now_ms)
    at.run()
    assert (at.given("early"), at.given("late")) == (150 - 128, 140 - 128)


def test_a_source_is_not_asked_for_less_than_it_is_named_for() -> None:
    at = Bench(replace(LIMITS, min_order_tokens=16))
    at.submit(ask("before", 64, shared=64))
    at.run()
    asks, does_not = (supplied_from_elsewhere(name, 140, 5, shared=64) for name in ("asks", "does not"))
    asks.source_least, does_not.source_least = 75, 76
    at.submit(asks, does_not)
    at.run()
    assert list(at.model.parked) == ["asks"] and at.given("does not") == 140 - 64


def test_nobody_waits_for_what_comes_with_much_more_or_is_a_small_part_of_what_it_lacks() -> None:
    at = Bench(replace(LIMITS, min_order_tokens=16))
    at.submit(supplied_from_elsewhere("long", 400, 5, shared=64))
    at.run(5.0)
    at.submit(ask("other", 80, 1, shared=64))
    at.run()
    assert at.given("other") == 80


def test_a_prompt_that_is_computed_is_not_held_for_who_waits_for_kv_of_another() -> None:
    at = Bench(replace(LIMITS, min_order_tokens=16))
    at.submit(supplied_from_elsewhere("first", 140, 3, shared=128), ask("long", 96, priority=9))
    at.run(5.0)
    at.submit(ask("follower", 150, 1, shared=128))
    at.run()
    assert at.steps[:3] == [{"long": 32}] * 3


def test_who_has_all_of_a_common_prefix_already_follows_nobody() -> None:
    at = Bench()
    at.submit(ask("before", 32, shared=32))
    at.run()
    at.submit(ask("long", 160, priority=9, shared=32))
    at.run(15.0)
    at.submit(ask("short", 40, priority=1, shared=32))
    at.run()
    assert at.steps[2:4] == [{"long": 32}, {"short": 8}]


# --- nothing is held in vain --------------------------------------------------------------------------------------


def test_nobody_is_held_for_one_that_has_no_seat() -> None:
    at = Bench(replace(LIMITS, max_sequences=1))
    at.submit(ask("long", 96, priority=9))
    at.run(5.0)
    at.submit(ask("short", 32, priority=1))
    at.run()
    assert at.steps[:4] == [*[{"long": 32}] * 3, {"short": 32}]


def test_nobody_is_held_for_one_that_there_are_no_blocks_for() -> None:
    at = Bench(replace(LIMITS, blocks=40))
    at.submit(ask("long", 96, priority=9))
    at.run(5.0)
    at.submit(ask("large", 150, priority=1))
    at.run(25.0)
    assert at.steps == [{"long": 32}] * 3


def test_who_was_held_in_vain_goes_on_in_the_next_step() -> None:
    """Those who decode take blocks that were counted on."""
    at = Bench(replace(LIMITS, blocks=16))
    at.submit(*(ask(name, 3, priority=-1, output=9) for name in "abcd"))
    at.run(5.0)
    at.submit(ask("long", 30, priority=9))
    at.run(15.0)
    at.submit(ask("short", 16, priority=1))
    at.run(35.0)
    decode = dict.fromkeys("abcd", 1)
    assert at.steps[1:] == [{**decode, "long": 28}, decode, {**decode, "long": 2}]
    assert len(at.run().finished) == 6


# --- properties ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """`shared` tokens of the prompt are those of its family."""

    at_ms: float
    prompt: int
    output: int
    family: int
    shared: int
    priority: int


@st.composite
def one(draw: st.DrawFn) -> Drawn:
    prompt, output, blocks = draw(st.integers(1, 120)), draw(st.integers(1, 20)), draw(st.integers(0, 20))
    at_ms, family, priority = draw(st.floats(0, 150)), draw(st.integers(0, 1)), draw(st.integers(0, 5))
    return Drawn(at_ms, prompt, output, family, min(blocks * BLOCK, prompt), priority)


DRAWN = st.lists(one(), min_size=1, max_size=12)


def play(drawn: Sequence[Drawn], limits: Limits, sources: Sequence[int] = ()) -> Bench:
    """Those at `sources` wait for KV, of which half of the prompt comes, at the next arrival or at the end."""
    at = Bench(limits, Speeds())
    for number, each in enumerate(sorted(drawn, key=lambda each: each.at_ms)):
        at.run(each.at_ms + number / 1000)
        supply(at)
        request = ask(str(number), each.prompt, each.priority, each.output, each.shared, each.family)
        request.source = EngineId("s") if number in sources else None
        at.submit(request)
    while at.run().model.parked:
        supply(at)
    return at


def supply(at: Bench) -> None:
    for name, request in list(at.model.parked.items()):
        at.model.supplied(name, request.prompt_tokens // 2, at.now_ms)


def told(at: Bench) -> tuple[object, ...]:
    return at.steps, at.first_ms, [each.id for each in at.finished], at.model.counts


@settings(max_examples=100)
@given(DRAWN, st.integers(35, 80), st.integers(1, 5), st.integers(-3, 3))
def test_where_all_have_the_same_turn_it_is_the_order_of_arrival(
    drawn: list[Drawn], blocks: int, sequences: int, priority: int
) -> None:
    alike = [replace(each, priority=priority) for each in drawn]
    limits = replace(LIMITS, blocks=blocks, max_sequences=sequences, token_budget=16)
    assert told(play(alike, limits)) == told(play(drawn, replace(limits, policy="fcfs")))


@settings(max_examples=60)
@given(DRAWN, st.sets(st.integers(0, 11)))
def test_that_holds_where_some_wait_for_kv_too(drawn: list[Drawn], sources: set[int]) -> None:
    alike = [replace(each, priority=0) for each in drawn]
    limits = replace(LIMITS, token_budget=16, min_order_tokens=8)
    assert told(play(alike, limits, [*sources])) == told(play(drawn, replace(limits, policy="fcfs"), [*sources]))


@settings(max_examples=150)
@given(DRAWN, st.sets(st.integers(0, 11)), st.integers(35, 80), st.integers(1, 5))
def test_everyone_finishes_and_no_block_is_lost(
    drawn: list[Drawn], sources: set[int], blocks: int, sequences: int
) -> None:
    limits = replace(LIMITS, blocks=blocks, max_sequences=sequences, token_budget=16, min_order_tokens=8)
    at = play(drawn, limits, [*sources])
    assert sorted(each.id for each in at.finished) == sorted(str(number) for number in range(len(drawn)))
    assert at.model.pool.free == blocks
    assert all(sum(step.values()) <= 16 for step in at.steps)


@settings(max_examples=150)
@given(DRAWN)
def test_no_block_is_computed_twice_where_there_is_room_for_all(drawn: list[Drawn]) -> None:
    """But for the block of a prompt's last token, which is computed even if it is cached."""
    at = play(drawn, replace(LIMITS, blocks=2000, max_sequences=50, token_budget=16))
    assert len(at.finished) == len(drawn)
    twins = sum(len(each) for each in at.model.pool._twins.values())
    assert twins <= sum(each.shared == each.prompt and each.prompt % BLOCK == 0 for each in drawn)


@settings(max_examples=60)
@given(st.integers(33, 300), st.integers(1, 31), st.integers(0, 200), st.integers(3, 12))
def test_nobody_waits_longer_than_until_those_that_come_are_due_later(
    prompt: int, short: int, due_ms: int, every_ms: int
) -> None:
    """However many come: those due before it, at most one step each, and its own steps are all that it waits for."""
    at = Bench()
    at.submit(ask("long", prompt, due_ms))
    for number in range(60):
        at.run(number * every_ms)
        at.submit(ask(f"short {number}", short, number * every_ms))
    at.run()
    before = sum(number * every_ms < due_ms for number in range(60))
    own = -(-prompt // CHUNK)
    assert at.first_ms["long"] <= (before + own + 1) * STEP_MS
    assert len(at.finished) == 61
