"""The simulated engine's scheduler: batching, chunks, cache hits, preemption, supply; and runs equal single steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.errors import ConfigError
from vllm_llmd.names import BlockName, EngineId
from vllm_llmd.sim.limits import Limits
from vllm_llmd.sim.requests import SimRequest
from vllm_llmd.sim.runs import Run
from vllm_llmd.sim.scheduler import Scheduler
from vllm_llmd.sim.speeds import Speeds, Work

FLAT = Speeds(
    step_ms=10.0,
    prefill_us_per_token=0.0,
    prefill_us_per_token_per_1k_context=0.0,
    decode_us_per_sequence=0.0,
    decode_us_per_1k_context=0.0,
)
SMALL = Limits(block_size=4, blocks=64, token_budget=32, max_sequences=8)


def ask(
    request_id: str, prompt: int, output: int = 1, names: Sequence[int] | None = None, **more: object
) -> SimRequest:
    """Without `names`, every block of the prompt is nobody else's."""
    own = range(int.from_bytes(request_id.encode()) << 32, 1 << 62) if names is None else names
    return SimRequest(request_id, prompt, output, [BlockName(n) for n in own[: (prompt + output) // 4]], **more)  # type: ignore[arg-type]


@dataclass
class Bench:
    """A scheduler and a clock that follows it; `done_ms` and `first_ms` are when requests had their tokens."""

    model: Scheduler
    now_ms: float = 0.0
    first_ms: dict[str, float] = field(default_factory=dict)
    done_ms: dict[str, float] = field(default_factory=dict)
    wanted: list[SimRequest] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    most_tokens: int = 0

    def submit(self, *requests: SimRequest) -> None:
        for request in requests:
            self.model.submit(request, self.now_ms)

    def run(self, until_ms: float = 1e9) -> "Bench":
        while (due_ms := self.model.next_ms) is not None and due_ms <= until_ms:
            assert due_ms >= self.now_ms
            self.now_ms = due_ms
            report = self.model.step(due_ms)
            self.most_tokens = max(self.most_tokens, sum(tokens for _, tokens in self.model._batch))
            for request, tokens in report.made:
                if request.made == tokens:
                    self.first_ms[request.id] = due_ms
            self.done_ms.update((request.id, due_ms) for request in report.finished)
            self.wanted += report.wanted
            self.admitted += [request.id for request in report.admitted]
        self.now_ms = max(self.now_ms, until_ms) if until_ms < 1e9 else self.now_ms
        return self


def bench(limits: Limits = SMALL, speeds: Speeds = FLAT) -> Bench:
    return Bench(Scheduler(limits, speeds))


def test_a_prompt_takes_a_step_and_each_token_after_the_first_one_more() -> None:
    at = bench()
    at.submit(ask("a", 10, 3))
    at.run()
    assert at.first_ms == {"a": 10.0}
    assert at.done_ms == {"a": 30.0}


def test_a_long_prompt_is_computed_in_chunks_of_the_token_budget() -> None:
    at = bench()
    at.submit(ask("a", 100))
    at.run()
    assert at.done_ms == {"a": 40.0}
    assert at.most_tokens == 32


def test_who_decodes_goes_on_while_a_long_prompt_is_computed() -> None:
    at = bench()
    at.submit(ask("a", 4, 5))
    at.run(10.0)
    at.submit(ask("b", 60))
    at.run()
    assert at.done_ms == {"a": 50.0, "b": 30.0 + 10.0}


def test_a_prefix_that_is_cached_is_not_computed_again() -> None:
    at = bench()
    first, second = ask("a", 22, names=range(1, 6)), ask("b", 24, names=[1, 2, 3, 9, 5, 6])
    at.submit(first)
    at.run()
    at.submit(second)
    at.run()
    assert (first.cached_tokens, second.cached_tokens) == (0, 12)
    assert (at.model.counts.queried, at.model.counts.hit) == (46, 12)


def test_blocks_that_a_step_computes_for_another_are_found_but_not_there_before_it_ends() -> None:
    at = bench()
    first, second = ask("a", 20, names=range(1, 6)), ask("b", 20, names=[1, 2, 3, 4, 9])
    at.submit(first, second)
    at.model.step(0.0)
    assert (second.cached_tokens, at.model.there(second)) == (16, 0)
    at.run()
    third = ask("c", 20, names=[1, 2, 3, 8, 9])
    at.submit(third)
    at.model.step(at.now_ms)
    assert (third.cached_tokens, at.model.there(third)) == (12, 12)


def test_the_last_token_of_a_prompt_is_computed_even_if_all_is_cached() -> None:
    at = bench()
    again = ask("b", 8, names=[1, 2])
    at.submit(ask("a", 8, names=[1, 2]))
    at.run()
    at.submit(again)
    at.run()
    assert again.cached_tokens == 4


def test_an_answer_is_cached_too_as_far_as_its_tokens_are_known() -> None:
    at = bench()
    at.submit(ask("a", 8, 9, names=[1, 2, 3, 4]))
    at.run()
    turn = ask("b", 20, names=[1, 2, 3, 4, 5])
    at.submit(turn)
    at.run()
    assert turn.cached_tokens == 16


def test_no_more_sequences_run_than_are_allowed_and_in_order_of_arrival() -> None:
    at = bench(replace(SMALL, max_sequences=2))
    at.submit(*(ask(name, 4, 3) for name in "abcd"))
    at.run(0.0)
    assert len(at.model.running) == 2 and len(at.model.waiting) == 2
    at.run()
    assert at.admitted == list("abcd")


def test_by_priority_the_most_urgent_is_admitted_first() -> None:
    at = bench(replace(SMALL, max_sequences=1, policy="priority"))
    at.submit(*(ask(name, 4, 2, priority=priority) for name, priority in zip("abc", (2, 1, 0), strict=True)))
    at.run()
    assert at.admitted == ["c", "b", "a"]


def test_who_came_last_is_preempted_when_blocks_run_out_and_still_finishes() -> None:
    at = bench(replace(SMALL, blocks=8))
    early, late = ask("early", 12, 12), ask("late", 12, 12)
    at.submit(early, late)
    at.run()
    assert early.preemptions == 0 and late.preemptions > 0
    assert at.done_ms["early"] < at.done_ms["late"]
    assert at.model.pool.free == 8
    assert early.made == late.made == 12


def test_by_priority_the_least_urgent_is_preempted() -> None:
    at = bench(replace(SMALL, blocks=8, policy="priority"))
    idle, urgent = ask("idle", 12, 12, priority=5), ask("urgent", 12, 12)
    at.submit(idle)
    at.run(5.0)
    at.submit(urgent)
    at.run()
    assert (idle.preemptions > 0, urgent.preemptions) == (True, 0)


def test_what_can_never_fit_is_refused_at_once() -> None:
    at = bench()
    for prompt, output in ((256, 1), (0, 1), (1, 0)):
        with pytest.raises(ConfigError, match="256 together"):
            at.model.submit(ask("a", prompt, output), 0.0)
    at.submit(ask("b", 250, 6))
    assert at.run().done_ms


def test_an_aborted_request_gives_its_blocks_back_wherever_it_was() -> None:
    at = bench(replace(SMALL, max_sequences=2))
    at.submit(ask("running", 8, 50), ask("parked", 80, source=EngineId("s")), *(ask(str(n), 8, 50) for n in range(3)))
    at.run(20.0)
    assert list(at.model.parked) == ["parked"]
    for name in ("running", "parked", "0", "1", "2", "nobody"):
        at.model.abort(name, at.now_ms)
    at.run()
    assert at.model.pool.free == 64
    assert not at.model.running and not at.model.waiting and not at.model.parked and not at.done_ms


def test_one_that_is_aborted_in_the_step_in_which_another_ends_gives_its_blocks_back() -> None:
    at = bench()
    at.submit(ask("ends", 8, 1), ask("left", 8, 50))
    at.model.step(0.0)
    at.model.abort("left", 5.0)
    at.now_ms = 5.0
    at.run()
    assert list(at.done_ms) == ["ends"]
    assert at.model.pool.free == 64


def test_what_the_step_under_way_computes_counts_as_computed() -> None:
    at, request = bench(), ask("a", 80)
    assert at.model.uncomputed(request) == 80
    at.submit(request)
    at.model.step(0.0)
    assert at.model.uncomputed(request) == 80 - 32
    at.run(10.0)
    assert at.model.uncomputed(request) == 80 - 64
    at.run()
    assert at.done_ms and at.model.uncomputed(request) == 80, "its blocks are gone"


def test_a_source_is_asked_for_what_is_not_cached_and_the_rest_is_computed() -> None:
    at = bench()
    at.submit(ask("first", 8, names=[1, 2]))
    at.run()
    request = ask("a", 100, 2, names=[1, 2, *range(50, 73)], source=EngineId("s"))
    at.submit(request)
    at.run(50.0)
    assert at.wanted == [request] and request.computed == 8
    at.model.supplied("a", 99, 50.0)
    at.run()
    assert request.cached_tokens == 99
    assert at.done_ms["a"] == 70.0
    assert at.model.counts.supplied == 91
    assert len(at.wanted) == 1


@pytest.mark.parametrize(("came", "chunks"), [(0, 4), (40, 2), (20, 3)])
def test_what_a_source_fails_to_supply_is_computed(came: int, chunks: int) -> None:
    at = bench()
    request = ask("a", 100, source=EngineId("s"))
    at.submit(request)
    at.run(0.0)
    at.model.supplied("a", came, 0.0)
    at.run()
    assert request.cached_tokens == came
    assert at.done_ms["a"] == chunks * 10.0


def test_nobody_is_asked_for_little() -> None:
    at = bench(replace(SMALL, min_order_tokens=64))
    at.submit(ask("a", 64, source=EngineId("s")))
    at.run()
    assert at.done_ms and not at.wanted


def test_what_was_evicted_comes_back_from_the_offload_tier() -> None:
    speeds = replace(FLAT, kv_bytes_per_token=1_000_000, offload_gb_per_s=1.0)
    at = bench(replace(SMALL, blocks=8, offload_blocks=20), speeds)
    at.submit(ask("a", 24, names=range(1, 7)))
    at.run()
    at.submit(ask("b", 31))
    at.run()
    again = ask("c", 24, names=range(1, 7))
    begun_ms = at.now_ms
    at.submit(again)
    at.run()
    assert again.cached_tokens == 20
    assert at.done_ms["c"] == pytest.approx(begun_ms + 20 + 10)


def test_a_slowdown_stretches_steps() -> None:
    at = bench()
    at.model.slowdown = 3.0
    at.submit(ask("a", 4, 2))
    assert at.run().done_ms == {"a": 60.0}


def test_a_step_takes_longer_the_more_there_is_to_do() -> None:
    speeds = Speeds()
    short, long, deep, decode = Work(), Work(), Work(), Work()
    short.prefill(0, 100)
    long.prefill(0, 200)
    deep.prefill(5000, 200)
    decode.decode(5000)
    prices = [speeds.work_ms(work) for work in (Work(), decode, short, long, deep)]
    assert prices == sorted(prices) and len(set(prices)) == 5
    assert speeds.transfer_ms(2000) > speeds.transfer_ms(1000) > 0


@given(st.floats(0.1, 50), st.floats(0, 1), st.integers(1, 400), st.floats(0, 5000))
def test_a_run_is_cut_after_the_step_under_way(first: float, growth: float, steps: int, gone: float) -> None:
    run = Run(100.0, first, growth, steps)
    cut = run.cut(100.0 + gone)
    assert 1 <= cut.steps <= steps
    assert cut.end_ms >= min(100.0 + gone, run.end_ms)
    assert cut.steps == 1 or cut.end_of(cut.steps - 1) <= 100.0 + gone + 1e-6


REQUESTS = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 30), st.floats(0, 300), st.integers(0, 3), st.integers(0, 2)),
    min_size=1,
    max_size=12,
)


def replay(drawn: list[tuple[int, int, float, int, int]], limits: Limits) -> Bench:
    """Requests of the same family share the beginning of their prompts."""
    at = bench(limits, Speeds())
    for number, (prompt, output, at_ms, family, priority) in enumerate(sorted(drawn, key=lambda each: each[2])):
        shared = range(1000 * family, 1000 * family + min(prompt // 4, 8))
        own = range(10**6 * (number + 1), 10**6 * (number + 1) + 100)
        at.run(at_ms)
        at.submit(ask(str(number), prompt, output, [*shared, *own], priority=priority))
    return at.run()


@settings(max_examples=60)
@given(REQUESTS, st.sampled_from(["fcfs", "priority"]), st.integers(23, 64), st.integers(1, 5))
def test_everyone_finishes_and_no_block_is_lost(
    drawn: list[tuple[int, int, float, int, int]], policy: str, blocks: int, sequences: int
) -> None:
    limits = replace(SMALL, blocks=blocks, max_sequences=sequences, policy=policy, token_budget=16, run_steps=99)  # type: ignore[arg-type]
    at = replay(drawn, limits)
    assert set(at.done_ms) == {str(number) for number in range(len(drawn))}
    assert at.model.pool.free == blocks
    assert at.most_tokens <= 16
    assert all(at.first_ms[each] <= at.done_ms[each] for each in at.done_ms)


@settings(max_examples=60)
@given(REQUESTS)
def test_runs_of_steps_end_as_single_steps_do(drawn: list[tuple[int, int, float, int, int]]) -> None:
    """With room for everybody: a waiting request is looked at again only when a run ends."""
    roomy = replace(SMALL, blocks=400, max_sequences=16)
    single, runs = replay(drawn, roomy), replay(drawn, replace(roomy, run_steps=1000))
    assert runs.done_ms == pytest.approx(single.done_ms)
    assert runs.first_ms == pytest.approx(single.first_ms)
    assert set(runs.model.pool.names) == set(single.model.pool.names)
    assert runs.model.counts == single.model.counts
