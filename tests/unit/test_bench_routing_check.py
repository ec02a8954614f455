"""The simulator beside the placement benchmark: speeds from probes, and users who do as in the benchmark."""

import random
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.errors import LlmdError
from vllm_llmd.sim.speeds import Speeds

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from routing_arms import ARMS, OURS
from routing_check import checked, fit_of, kv_bytes, predicted, table
from routing_crowd import APART_MS, Crowd, Spoken, Warmed
from routing_engines import STEP_TOKENS, fast_dtype
from routing_fit import MEASURED, fitted, least_squares
from routing_plan import BLOCK_TOKENS, WORKLOADS, Conversation, Turn, Workload
from routing_probe import CACHED_WORDS, VOLLEYS, Volley
from routing_steps import awaited
from routing_values import Asked, Cell, Probe, Results, Settings

SPEEDS = Speeds(
    step_ms=12.0,
    prefill_us_per_token=500.0,
    prefill_us_per_token_per_1k_context=90.0,
    decode_us_per_sequence=3000.0,
    decode_us_per_1k_context=2000.0,
    request_ms=7.0,
)
TEMPLATE_TOKENS = 30


def like(*, prompt_tokens: int, cached_tokens: int = 0, output_tokens: int = 1, at_once: int = 1) -> Probe:
    """Requests that nobody has timed yet."""
    asked = Asked(0, 0, 0.0, 0.0, 0.0, prompt_tokens, cached_tokens, output_tokens)
    return Probe(at_once=at_once, asked=[asked] * at_once)


def probe_of(volley: Volley, speeds: Speeds, overhead_ms: float) -> Probe:
    """What an engine of these speeds would show."""
    cached = CACHED_WORDS if volley.cached else 0
    untimed = like(
        prompt_tokens=cached + volley.words + TEMPLATE_TOKENS,
        cached_tokens=cached // BLOCK_TOKENS * BLOCK_TOKENS,
        output_tokens=volley.answer_tokens,
        at_once=volley.at_once,
    )
    timed = []
    for steps in awaited(untimed, STEP_TOKENS):
        first_ms, rest_ms = (sum(map(speeds.work_ms, part)) for part in (steps.to_first, steps.to_last))
        tpot_ms = rest_ms / max(volley.answer_tokens - 1, 1)
        timed.append(msgspec.structs.replace(untimed.asked[0], ttft_ms=overhead_ms + first_ms, tpot_ms=tpot_ms))
    return Probe(at_once=volley.at_once, asked=timed)


def probes_of(speeds: Speeds, overhead_ms: float) -> list[Probe]:
    return [probe_of(volley, speeds, overhead_ms) for volley in VOLLEYS]


def test_speeds_are_found_from_what_engines_of_these_speeds_show() -> None:
    found = fitted(probes_of(SPEEDS, 8.0), STEP_TOKENS, 46_080)
    assert found.overhead_ms == pytest.approx(8.0, rel=1e-6) and found.off_by == pytest.approx(0.0, abs=1e-6)
    for name in MEASURED:
        assert getattr(found.speeds, name) == pytest.approx(getattr(SPEEDS, name), rel=1e-6)


def test_requests_that_come_during_a_step_share_the_next_one() -> None:
    first, second, third = awaited(like(prompt_tokens=300, output_tokens=2, at_once=3), 512)
    assert [step.prefill_tokens for step in third.to_first] == [300, 511, 89]
    assert [step.requests for step in third.to_first] == [1, 2, 0]
    assert [step.decoding for step in third.to_first] == [0, 1, 1]
    assert list(first.to_first) == list(third.to_first)[:1] and list(second.to_first) == list(third.to_first)[:2]
    assert list(first.to_last) == list(third.to_first)[1:2]
    assert [step.decoding for step in third.to_last] == [1]


def test_what_is_cached_of_a_probe_is_not_computed_again() -> None:
    first, second = awaited(like(prompt_tokens=1000, cached_tokens=960, at_once=2), 512)
    assert [step.prefill_tokens for step in second.to_first] == [40, 40]
    assert [step.prefill_token_contexts for step in second.to_first] == [40 * 980.0] * 2
    assert list(first.to_first) == list(second.to_first)[:1] and not second.to_last


def test_too_few_probes_are_an_error() -> None:
    for probes in ([], probes_of(SPEEDS, 8.0)[:6]):
        with pytest.raises(LlmdError, match="too few"):
            fitted(probes, STEP_TOKENS, 46_080)


@given(st.lists(st.tuples(st.floats(0.1, 100.0), st.floats(1.0, 1000.0)), min_size=3, max_size=12))
def test_no_coefficient_is_ever_negative(points: list[tuple[float, float]]) -> None:
    found = least_squares([[1.0] * len(points), [x for x, _ in points]], [y for _, y in points])
    assert all(each >= 0 for each in found)


def all_of(workload: Workload) -> list[Spoken]:
    """Everything that its users ask, if each answer takes 10 ms."""
    crowd = Crowd(workload, unit_ms=500.0, overhead_ms=0.0, chance=random.Random(0))
    asked = list(crowd.first())
    for number, each in enumerate(asked):
        asked += crowd.follow(number, each.at_ms + 10.0)
    assert all(isinstance(each, Spoken) for each in asked)
    return [each for each in asked if isinstance(each, Spoken)]


@pytest.mark.parametrize("name", WORKLOADS)
def test_simulated_users_ask_all_that_the_benchmark_asks(name: str) -> None:
    workload = WORKLOADS[name](0, 0.5)
    asked = all_of(workload)
    assert len(asked) == workload.requests
    assert sum(each.output_tokens for each in asked) == sum(
        turn.answer_tokens for each in workload.conversations for turn in each.turns
    )


def test_a_simulated_turn_begins_with_all_that_was_said_before_and_its_answer() -> None:
    chat = Conversation("system engine", (Turn("model", 3), Turn("token cache", 2, pause=2.0)))
    first, second = all_of(Workload("chats", (chat,)))
    assert list(second.prompt())[: first.prompt_tokens] == list(first.prompt())
    assert list(second.prompt())[first.prompt_tokens :][:3] == list(first.answer(0))
    assert second.at_ms == pytest.approx(first.at_ms + 10.0 + 2 * 500.0, abs=APART_MS)
    assert second.prompt_tokens == len(second.prompt()) and second.hash_ids == ()


def test_simulated_clients_of_a_closed_loop_are_as_many_as_in_the_benchmark() -> None:
    asked = all_of(WORKLOADS["shared"](0, 0.5))
    assert [each.at_ms for each in asked[:9]] == pytest.approx([0.0] * 8 + [10.0], abs=2 * APART_MS)


def test_it_is_chance_which_of_those_that_ask_at_once_comes_first() -> None:
    orders = set()
    for seed in range(10):
        crowd = Crowd(WORKLOADS["shared"](0, 0.5), unit_ms=500.0, overhead_ms=8.0, chance=random.Random(seed))
        asked = crowd.first()
        assert [each.at_ms for each in asked] == sorted(each.at_ms for each in asked)
        assert all(8.0 <= each.at_ms <= 8.0 + APART_MS for each in asked)
        orders.add(tuple(tuple(each.prompt()[-40:]) for each in asked))
    assert len(orders) > 1


def test_what_warms_up_is_answered_before_the_others_begin() -> None:
    warming = Workload("w", tuple(Conversation("", (Turn("model", 1),)) for _ in range(3)), clients=2)
    chat = Conversation("system", (Turn("model", 3), Turn("cache", 2)), at=1.0)
    chance = random.Random(0)
    chats = Crowd(Workload("chats", (chat,)), 100.0, 0.0, chance)
    crowd = Warmed(Crowd(warming, 100.0, 0.0, chance), 3, chats)
    asked = list(crowd.first())
    for number, each in enumerate(asked):
        asked += crowd.follow(number, each.at_ms + 10.0)
    times_ms = [each.at_ms for each in asked]
    assert times_ms == pytest.approx([0.0, 0.0, 10.0, 1120.0, 1130.0], abs=5 * APART_MS)


def test_a_prediction_has_a_cell_for_all_that_the_simulator_can_play() -> None:
    asked_for = Settings(
        model="",
        engines=2,
        arms=list(ARMS),
        workloads=["mixed"],
        repetitions=2,
        scale=0.1,
        seed=0,
        slo_ttft_units=3.0,
        slo_tpot_units=0.3,
    )
    played = predicted(Results(settings=asked_for))
    assert {cell.key for cell in played.cells} == {
        (repetition, "mixed", arm) for repetition in range(2) for arm in ("rr", "vllm-rr", "approx", OURS)
    }
    for cell in played.cells:
        assert len(cell.asked) == WORKLOADS["mixed"](cell.repetition, 0.1).requests and cell.lasted_ms > 0


def test_the_simulator_is_compared_with_every_arm_that_it_has(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"num_hidden_layers": 30, "num_key_value_heads": 3, "hidden_size": 576, "num_attention_heads": 9}'
    )
    assert kv_bytes(tmp_path, "bfloat16") == 23_040
    assert kv_bytes(tmp_path, "float32") == 2 * 23_040
    asked_for = Settings(
        model=str(tmp_path),
        engines=2,
        arms=list(ARMS),
        workloads=["shared"],
        repetitions=1,
        scale=0.1,
        seed=0,
        slo_ttft_units=3.0,
        slo_tpot_units=0.3,
    )
    asked = [Asked(0, 0, 0.0, 20.0, 1.0, prompt_tokens=100, cached_tokens=0, output_tokens=8)]
    cells = [Cell(repetition=0, workload="shared", arm=arm, lasted_ms=1.0, asked=asked, split=[1, 0]) for arm in ARMS]
    found = Results(settings=asked_for, unit_ms=40.0, probes=probes_of(SPEEDS, 1.0), cells=cells)
    checks = checked(found, fit_of(found))
    assert {each.arm for each in checks} == {"rr", "vllm-rr", "approx", OURS}
    assert all(each.predicted_ms > 1.0 and each.measured_ms == 20.0 for each in checks)
    assert "of 4 within 20%" in table(checks, fit_of(found))


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("sse avx2", "float32"), ("avx2 avx512f avx512bw", "bfloat16"), ("fp asimd bf16", "bfloat16"), ("", "float32")],
)
def test_engines_compute_in_what_the_processor_multiplies_fast(flags: str, dtype: str) -> None:
    assert fast_dtype(f"processor : 0\nflags : {flags}\nbogomips : 1\n") == dtype
