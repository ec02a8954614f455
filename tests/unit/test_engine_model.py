"""What is learned of engines' speed, and that nonsense teaches nothing worse than the priors."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.names import EngineId
from vllm_llmd.router.decide import Decision
from vllm_llmd.router.learning.engine_model import ENOUGH, Models, first_byte_of
from vllm_llmd.router.learning.least_squares import FACTOR, LeastSquares
from vllm_llmd.router.members.rates import PRIOR
from vllm_llmd.router.policy import Choice
from vllm_llmd.router.upstream.seen import Measured, Seen
from vllm_llmd.router.upstream.usage import Usage
from vllm_llmd.wire import Load

A, B = EngineId("a"), EngineId("b")


def decision(engine: EngineId, seen: Seen, source: EngineId | None = None, **more: object) -> Decision:
    return Decision(engine, source, 0, 0, int(seen.prompt_tokens), {}, seen=seen, **more)  # type: ignore[arg-type]


def some_request(rng: random.Random) -> Seen:
    prompt = rng.randrange(100, 8000)
    return Seen(rng.randrange(20), rng.choice([0, 0, 2]), rng.randrange(0, 5000), prompt, rng.randrange(prompt))


def true_ms(seen: Seen) -> float:
    """An engine that is slower than the priors have it."""
    own = seen.prompt_tokens - seen.cached_tokens
    return 25 + 0.4 * (seen.tokens + own) + 0.5 * seen.batch + 30 * seen.waiting


def serve(models: Models, engine: EngineId, requests: int, ms: Callable[[Seen], float], seed: int = 0) -> None:
    rng = random.Random(seed)
    for _ in range(requests):
        seen = some_request(rng)
        first_ms = ms(seen)
        usage = Usage(int(seen.prompt_tokens), int(seen.cached_tokens), 101)
        models.answered(decision(engine, seen), Measured(first_ms, first_ms + 100 * (30 + seen.batch), True, usage))


def test_an_engines_speed_is_learned_from_its_answers() -> None:
    models = Models()
    serve(models, A, 200, true_ms)
    rates = models.rates(A)
    assert rates.token_ms == pytest.approx(0.4, rel=0.05)
    assert rates.step_ms + 10 * rates.step_running_ms == pytest.approx(40, rel=0.1)
    assert models.of(A).first_byte.by != "prior" and models.of(A).first_byte.errors["engine"] < 0.05


@pytest.mark.parametrize("times", [0.05, 1.0, 10.0, 100.0])
def test_an_engine_of_another_order_than_the_priors_is_known_as_soon(times: float) -> None:
    models = Models()
    serve(models, A, 30, lambda seen: times * true_ms(seen))
    assert models.rates(A).token_ms == pytest.approx(0.4 * times, rel=0.1)


def test_few_answers_that_hung_do_not_make_an_engine_slow() -> None:
    models = Models()
    serve(models, A, 100, true_ms)
    serve(models, A, 5, lambda seen: 100 * true_ms(seen))
    serve(models, A, 20, true_ms)
    assert models.rates(A).token_ms == pytest.approx(0.4, rel=0.3)


@pytest.mark.parametrize("times", [1.0, 5.0, 20.0])
def test_how_fast_offloaded_blocks_come_back_is_learned_beside_what_is_computed(times: float) -> None:
    models, rng, reload_token_ms = Models(), random.Random(0), times * PRIOR.reload_token_ms
    for _ in range(300):
        cached = rng.uniform(2000, 8000)
        offloaded = rng.choice([0.0, cached / 2, cached])
        seen = Seen(rng.randrange(20), 0, rng.choice([0, 0, 1000]), cached + rng.uniform(10, 1000), cached, offloaded)
        first_ms = true_ms(seen) + reload_token_ms * seen.offloaded_tokens
        usage = Usage(int(seen.prompt_tokens), int(seen.cached_tokens), 1)
        models.answered(decision(A, seen), Measured(first_ms, first_ms, True, usage))
    assert models.rates(A).reload_token_ms == pytest.approx(reload_token_ms, rel=0.2)
    assert models.rates(A).token_ms == pytest.approx(0.4, rel=0.05)
    assert models.rates(B).reload_token_ms == pytest.approx(reload_token_ms, rel=0.2)


def test_answers_without_offloaded_blocks_say_nothing_of_reloading() -> None:
    models = Models()
    serve(models, A, 300, true_ms)
    assert models.of(A).first_byte.by != "prior"
    assert models.rates(A).reload_token_ms == pytest.approx(PRIOR.reload_token_ms)


def test_only_what_was_found_was_reloaded() -> None:
    seen = Seen(0, 0, 0, 4000, 3000, 2000)
    assert [first_byte_of(seen, cached)[-1] for cached in (None, 3500, 3000, 2500, 1000, 0)] == [
        2000,
        2000,
        2000,
        1500,
        0,
        0,
    ]


def test_an_engine_that_becomes_slower_is_followed() -> None:
    models = Models()
    serve(models, A, 300, true_ms)
    serve(models, A, 500, lambda seen: 3 * true_ms(seen))
    assert models.rates(A).token_ms == pytest.approx(1.2, rel=0.2)


def test_a_new_engine_is_taken_to_be_like_the_others() -> None:
    models = Models()
    serve(models, A, 100, true_ms)
    assert models.of(B).first_byte.by == "fleet"
    assert models.rates(B).token_ms == pytest.approx(0.4, rel=0.1)


def test_an_engine_unlike_the_others_is_known_for_itself() -> None:
    models = Models()
    for seed in range(30):
        serve(models, A, 10, true_ms, seed)
        serve(models, B, 10, lambda seen: true_ms(seen) / 8, seed)
    assert models.rates(A).token_ms / models.rates(B).token_ms == pytest.approx(8, rel=0.3)


def test_a_later_life_of_an_engine_starts_from_what_all_have_in_common() -> None:
    models = Models()
    serve(models, A, 100, true_ms)
    models.left(A)
    assert models.of(A).answers == 0 and models.of(A).first_byte.by == "fleet"


def test_too_few_measurements_change_nothing() -> None:
    models = Models()
    serve(models, A, ENOUGH - 1, true_ms)
    assert models.rates(A).token_ms == PRIOR.token_ms


def test_slow_first_answers_make_new_engines_count_as_cold() -> None:
    models = Models()
    serve(models, A, 50, true_ms)
    assert models.rates(B).cold_ms == 0
    serve(models, B, 1, lambda seen: true_ms(seen) + 400)
    assert models.rates(B).cold_ms == 0 and models.rates(EngineId("c")).cold_ms == pytest.approx(100, rel=0.3)


def test_steps_are_learned_from_load_reports_of_decoding_alone() -> None:
    models = Models()
    for running in (*range(1, 20), *range(19, 0, -1)):
        models.reported(A, Load(running=running, step_ms=40 + 2.0 * (running - 1)))
        models.reported(A, Load(running=running, step_ms=900.0, prefill_tokens=1))
        models.reported(A, Load(step_ms=900.0))
    rates = models.rates(A)
    assert rates.step_ms + 9 * rates.step_running_ms == pytest.approx(58, rel=0.1)


def test_transfers_are_learned_where_they_are_much_of_what_is_waited_for() -> None:
    models, seen = Models(), Seen(0, 0, 0, 4000, 0)
    terms = {"queue_ms": 10.0, "prefill_ms": 10.0, "transfer_ms": 20.0}
    for tokens in (500.0, 1000.0, 2000.0, 4000.0) * 20:
        made = Decision(B, A, 0, 0, 4000, terms, choice=Choice(0, 1, None, tokens), seen=seen)
        models.answered(made, Measured(20 + 4 + 0.05 * tokens, 1000, True, None))
    assert models.rates(A).transfer_token_ms == pytest.approx(0.05, rel=0.1)
    hidden = Decision(B, A, 0, 0, 4000, terms | {"prefill_ms": 900.0}, choice=Choice(0, 1, None, 1.0), seen=seen)
    models.answered(hidden, Measured(9999, 9999, True, None))
    assert models.rates(A).transfer_token_ms == pytest.approx(0.05, rel=0.1)


def test_how_fast_a_source_computes_is_learned_from_who_waited_for_little_else() -> None:
    models, rng = Models(), random.Random(0)
    for _ in range(200):
        tokens = rng.uniform(200, 8000)
        seen = Seen(0, 0, 0, tokens, 0)
        terms = {"queue_ms": 10.0, "prefill_ms": 0.1 * tokens, "transfer_ms": 3.0, "blocks_ms": 0.0}
        made = Decision(B, A, 0, 0, int(tokens), terms, choice=Choice(0, 1, None, 100.0), seen=seen, source_seen=seen)
        models.answered(made, Measured(13 + 0.3 * tokens, 9999, True, None))
        stuck = replace(made, terms=terms | {"blocks_ms": 2000.0})
        models.answered(stuck, Measured(50_000, 60_000, True, None))
        fetched = replace(made, source_until=100)
        models.answered(fetched, Measured(50_000, 60_000, True, None))
    assert models.rates(A).token_ms == pytest.approx(0.3, rel=0.1)
    assert models.of(B).first_byte.measured == 0


def test_answers_that_waited_for_blocks_do_not_say_how_fast_an_engine_computes() -> None:
    models, seen = Models(), Seen(0, 0, 0, 1000, 0)
    terms = {"queue_ms": 10.0, "prefill_ms": 100.0, "blocks_ms": 90.0}
    for _ in range(20):
        models.answered(replace(decision(A, seen), terms=terms), Measured(9000, 9999, True, None))
    assert models.of(A).first_byte.measured == 0


@pytest.mark.parametrize("supplied", [False, True], ids=["alone", "supplied"])
def test_an_engine_that_serves_by_due_time_is_known_from_those_that_found_little_before_them(supplied: bool) -> None:
    """Of the others, short prompts are answered at once and long ones late, whatever its speed."""
    models, rng = Models(), random.Random(2)
    for _ in range(400):
        seen = replace(some_request(rng), tokens=rng.choice([0.0, 20_000.0]))
        own = seen.prompt_tokens - seen.cached_tokens
        ms = true_ms(seen) if not seen.tokens else 30.0 if own < 2000 else 3 * true_ms(seen)
        made = decision(A, seen) if not supplied else decision(B, seen, source=A, source_seen=seen)
        models.answered(replace(made, work_ms={A: 0.4 * own}), Measured(ms, ms + 1, True, None), [A])
    assert models.rates(A).token_ms == pytest.approx(0.4, rel=0.05)


def test_doubt_is_by_how_much_predictions_are_off() -> None:
    models, rng = Models(), random.Random(0)
    assert models.doubt == pytest.approx(2)
    serve(models, A, 300, true_ms)
    assert models.doubt < 1.1
    serve(models, A, 100, lambda seen: true_ms(seen) * rng.choice([0.3, 1.0, 3.0]))
    assert models.doubt > 1.4


def test_how_long_answers_are_and_what_is_wanted_again_is_known_after_few_requests() -> None:
    models, seen = Models(), Seen(0, 0, 0, 4000, 0)
    for _ in range(20):
        models.answered(decision(A, seen), Measured(9, 99, True, Usage(4000, 3600, 8)))
    assert models.hit_share == pytest.approx(0.9, abs=0.05)
    assert models.output_tokens < 40


def test_answers_that_are_no_streams_do_not_say_when_they_began() -> None:
    models = Models()
    models.answered(decision(A, Seen(0, 0, 0, 100, 0)), Measured(9000, 9000, False, Usage(100, 50, 500)))
    assert models.of(A).first_byte.measured == 0
    assert models.output_tokens > 128 and models.hit_share > 0.1


some = st.floats(0, 1e5)
odd = st.one_of(st.floats(), st.sampled_from([0.0, -1.0, 1e300, 1e-300, math.nan, math.inf, 5.0]))


@given(st.lists(st.tuples(odd, odd, odd, some, some, some, st.integers(0, 10**12)), max_size=60))
def test_whatever_is_measured_rates_are_positive_numbers_near_the_priors(
    measured: list[tuple[float, float, float, float, float, float, int]],
) -> None:
    models = Models()
    for first_ms, last_ms, batch, tokens, cached, offloaded, made in measured:
        seen = Seen(batch, 0, tokens, tokens, cached, offloaded)
        models.answered(decision(A, seen), Measured(first_ms, last_ms, True, Usage(5, 3, made)))
        models.reported(A, Load(running=made % 7, step_ms=first_ms))
    coefficients = ("base_ms", "token_ms", "context_ms", "running_ms", "waiting_ms", "reload_token_ms")
    for name in (*coefficients, "step_ms", "step_running_ms"):
        learned, prior = getattr(models.rates(A), name), getattr(PRIOR, name)
        assert prior / FACTOR * 0.999 <= learned <= prior * FACTOR * 1.001
    assert 0 <= models.rates(B).cold_ms < math.inf and 0 < models.output_tokens <= 1e6 and 0 <= models.hit_share <= 1


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from([0.1, 1.0, 3.0]))
def test_of_noise_nothing_is_believed_that_is_worse_than_the_prior(seed: int, noise: float) -> None:
    """Measured in hindsight, as the choice between models is made."""
    chance, models = np.random.default_rng(seed), Models()
    serve(models, A, 60, lambda seen: float(math.exp(chance.normal(0, noise)) * 50), seed % 1000)
    believed = models.of(A).first_byte
    assert believed.errors[believed.by] <= believed.errors["prior"]


def test_coefficients_follow_measurements_of_any_scale() -> None:
    rng, learner = random.Random(0), LeastSquares((10.0, 0.1))
    for _ in range(300):
        x = (1.0, rng.choice([1.0, 100.0, 10_000.0]))
        learner.learn(x, (3 + 0.02 * x[1]) * rng.uniform(0.9, 1.1))
    assert learner.coefficients == pytest.approx([3, 0.02], rel=0.1)


def test_coefficients_of_what_does_not_vary_stay_bounded_for_ever() -> None:
    learner = LeastSquares((10.0, 0.1))
    for _ in range(20_000):
        learner.learn((1.0, 0.0), 20.0)
    assert learner.coefficients == pytest.approx([20, 0.1], rel=0.01)
    for _ in range(50):
        learner.learn((1.0, 100.0), 40.0)
    assert learner.coefficients == pytest.approx([20, 0.2], rel=0.2)


@pytest.mark.parametrize("y", [math.nan, math.inf, 0.0, -5.0])
def test_what_is_not_a_time_is_not_learned_from(y: float) -> None:
    learner = LeastSquares((10.0, 0.1))
    learner.learn((1.0, 1.0), y)
    learner.learn((0.0, 0.0), 1.0)
    assert learner.count == 0 and learner.coefficients == [10.0, 0.1]
