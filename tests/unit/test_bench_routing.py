"""What the placement benchmark asks, in which order, and what it makes of the answers."""

import asyncio
import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from vllm_llmd.errors import ConfigError
from vllm_llmd.launch import ToldToStop, signals_as_exceptions
from vllm_llmd.simulate.settings import Slo

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import routing
import routing_report
from routing_arms import ARMS, OURS, POLICIES, ROUND_ROBINS, VLLM_POLICIES
from routing_client import BenchError, _Answer, run
from routing_plan import (
    BLOCK_TOKENS,
    CACHE_BLOCKS,
    SYSTEM_TOKENS,
    SYSTEMS,
    WORKLOADS,
    Workload,
    warm_up,
)
from routing_values import Asked, Cell, Results, Settings, load, save
from routing_words import WORDS, text

SETTINGS = Settings(
    model="m",
    engines=2,
    arms=list(ARMS),
    workloads=["shared", "chats"],
    repetitions=2,
    scale=1.0,
    seed=0,
    slo_ttft_units=3.0,
    slo_tpot_units=0.3,
)


def asked(ttft_ms: float, *, sent_ms: float = 0.0, tpot_ms: float = 10.0, cached_tokens: int = 0) -> Asked:
    return Asked(0, 0, sent_ms, ttft_ms, tpot_ms, prompt_tokens=100, cached_tokens=cached_tokens, output_tokens=8)


def cell(
    arm: str, ttft_ms: Sequence[float], lasted_ms: float = 1000.0, *, workload: str = "shared", repetition: int = 0
) -> Cell:
    return Cell(
        repetition=repetition,
        workload=workload,
        arm=arm,
        lasted_ms=lasted_ms,
        asked=[asked(each) for each in ttft_ms],
        split=[1, 1],
    )


def results(*cells: Cell) -> Results:
    return Results(settings=SETTINGS, cells=list(cells))


# --- workloads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_decides_every_request_and_its_time(name: str) -> None:
    assert WORKLOADS[name](3, 1.0) == WORKLOADS[name](3, 1.0)
    assert WORKLOADS[name](3, 1.0) != WORKLOADS[name](4, 1.0)


@pytest.mark.parametrize("name", WORKLOADS)
def test_any_scale_leaves_something_to_ask(name: str) -> None:
    assert 0 < WORKLOADS[name](0, 0.05).requests < WORKLOADS[name](0, 1.0).requests


@pytest.mark.parametrize("name", WORKLOADS)
def test_whole_conversations_fit_into_the_context(name: str) -> None:
    for each in WORKLOADS[name](0, 1.0).conversations:
        said = len(each.system.split()) + sum(len(turn.text.split()) + turn.answer_tokens for turn in each.turns)
        assert said < 3500


def test_one_cache_holds_some_of_the_shared_prompts_and_two_hold_all() -> None:
    systems = {each.system for each in WORKLOADS["shared"](0, 1.0).conversations}
    assert len(systems) == SYSTEMS
    blocks = SYSTEMS * (SYSTEM_TOKENS // BLOCK_TOKENS)
    assert 1.5 * CACHE_BLOCKS < blocks < 1.8 * CACHE_BLOCKS


def test_clients_of_a_closed_loop_do_not_wait_for_times() -> None:
    shared: Workload = WORKLOADS["shared"](0, 1.0)
    assert shared.clients and all(not each.at and not each.turns[0].pause for each in shared.conversations)


def test_conversations_of_open_loops_come_in_order_of_time() -> None:
    for name in ("chats", "mixed", "bursts"):
        times = [each.at for each in WORKLOADS[name](0, 1.0).conversations]
        assert times == sorted(times) and times[-1] > 10


def test_what_warms_up_is_in_no_workload() -> None:
    texts = {each.turns[0].text for each in warm_up(16).conversations}
    assert len(texts) == 16
    for make in WORKLOADS.values():
        assert not texts & {turn.text for each in make(0, 1.0).conversations for turn in each.turns}


def test_a_text_has_so_many_words_of_the_list() -> None:
    said = text(random.Random(0), 500).split()
    assert len(said) == 500 and set(said) <= set(WORDS)


# --- order ------------------------------------------------------------------------------------------------------


def test_every_cell_is_planned_once() -> None:
    cells = routing.plan(SETTINGS)
    assert len(set(cells)) == len(cells) == 2 * 2 * len(ARMS)


def test_arms_take_turns_in_coming_first() -> None:
    cells = routing.plan(msgspec.structs.replace(SETTINGS, repetitions=3, workloads=["shared"]))
    firsts = [arms for _, _, arms in cells[:: len(ARMS)]]
    assert len(set(firsts)) == 3


def test_arms_are_those_that_can_be_started() -> None:
    assert set(ARMS) == {*POLICIES, *VLLM_POLICIES}
    assert POLICIES[OURS] == () and set(ROUND_ROBINS) < set(ARMS)


# --- answers ----------------------------------------------------------------------------------------------------


def event(content: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"%s"}}]}\n' % content.encode()


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":null}}\n'


def test_an_answer_is_timed_by_its_pieces_and_not_by_its_usage() -> None:
    answer = _Answer()
    for line in (event("one"), b"\n", event(" two")):
        answer.line(line)
    first_s, last_s = answer.first_s, answer.last_s
    answer.line(USAGE)
    answer.line(b"data: [DONE]\n")
    assert first_s is not None and (answer.first_s, answer.last_s) == (first_s, last_s)
    said, usage = answer.read()
    assert said == "one two" and usage.completion_tokens == 2


@pytest.mark.parametrize("lines", [[], [event("one")], [USAGE], [b'data: {"choices":[{]}\n', USAGE]])
def test_an_answer_that_is_not_whole_is_an_error(lines: list[bytes]) -> None:
    answer = _Answer()
    for line in lines:
        answer.line(line)
    with pytest.raises(BenchError):
        answer.read()


# --- figures ----------------------------------------------------------------------------------------------------


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(each) for each in range(1, 201)]
    assert [routing_report.percentile(values, each) for each in (50, 90, 99)] == [100.0, 180.0, 198.0]
    assert routing_report.percentile([7.0], 99) == 7.0


def test_figures_of_a_cell() -> None:
    cells = [asked(100.0, cached_tokens=50), asked(2000.0), asked(900.0, tpot_ms=101.0), asked(1000.0, tpot_ms=100.0)]
    found = routing_report.Figures.of(
        msgspec.structs.replace(cell("rr", []), asked=cells, lasted_ms=2000.0), Slo(ttft_ms=1000.0, tpot_ms=100.0)
    )
    assert found.ttft_mean_ms == 1000.0 and found.tokens_per_s == 16.0
    assert found.good_share == 0.5 and found.goodput == 1.0
    assert found.cached_share == 0.125
    assert found.e2e_ms == 1000.0 + 7 * (10.0 + 10.0 + 101.0 + 100.0) / 4


def test_a_cell_counts_as_if_the_machine_had_been_as_fast_as_in_the_beginning() -> None:
    fast, slow = cell("rr", [100.0, 300.0], 1000.0), cell("rr", [200.0, 600.0], 2000.0, repetition=1)
    slow = msgspec.structs.replace(slow, asked=[asked(200.0, tpot_ms=20.0), asked(600.0, tpot_ms=20.0)])
    slow = msgspec.structs.replace(slow, units_ms=[900.0, 1100.0])
    found = msgspec.structs.replace(results(fast, slow), unit_ms=500.0)
    assert [found.slowness(each) for each in found.cells] == [1.0, 2.0]
    first, second = routing_report.figures(found, "shared", "rr")
    assert first == second and first.ttft_mean_ms == 200.0


def test_ours_is_compared_with_the_better_round_robin() -> None:
    found = results(cell("rr", [3000.0], 3000.0), cell("vllm-rr", [2000.0], 4000.0), cell(OURS, [500.0], 1000.0))
    last = routing_report.last_line(found)
    assert last["mean_ttft_vs_rr"] == 4.0 and last["throughput_vs_rr"] == 3.0


def test_ours_is_compared_with_the_best_other_arm_of_each_workload() -> None:
    found = results(
        cell("rr", [1300.0]),
        cell("approx", [1250.0]),
        cell(OURS, [1000.0]),
        cell("rr", [900.0], workload="chats"),
        cell("vllm-cache", [960.0], workload="chats"),
        cell(OURS, [1000.0], workload="chats"),
    )
    last = routing_report.last_line(found)
    assert last["workloads_won_by_1_2"] == 1
    assert last["worst_vs_best_other"] == 0.9


def test_a_loss_of_throughput_counts_as_well_as_one_of_time() -> None:
    found = results(cell("rr", [1000.0], 800.0), cell(OURS, [500.0], 1000.0))
    assert routing_report.last_line(found)["worst_vs_best_other"] == 0.8


def test_repetitions_count_by_their_medians() -> None:
    found = results(
        *(cell("rr", [each], repetition=number) for number, each in enumerate((1000.0, 1200.0, 9000.0))),
        *(cell(OURS, [each], repetition=number) for number, each in enumerate((10.0, 400.0, 500.0))),
    )
    assert routing_report.last_line(found)["mean_ttft_vs_rr"] == 3.0


def test_nothing_measured_is_null() -> None:
    assert set(routing_report.last_line(results()).values()) == {None}
    assert set(routing_report.last_line(results(cell("rr", [1.0]))).values()) == {None}


def test_tables_and_summary_show_every_arm_that_was_measured() -> None:
    found = results(cell("rr", [1000.0]), cell(OURS, [500.0]))
    page = routing_report.tables(found)
    assert "shared" in page and "chats" not in page and "2.00x (rr)" in page
    assert routing_report.summary(found)["last"] == routing_report.last_line(found)


# --- keeping ----------------------------------------------------------------------------------------------------


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results" / "routing.json"
    found = Results(settings=SETTINGS, unit_ms=500.0, cells=[cell("rr", [1.0, 2.0]), cell(OURS, [3.0])])
    save(found, path)
    again = load(path, SETTINGS)
    assert (again.unit_ms, again.cells) == (found.unit_ms, found.cells)
    assert again.done == {(0, "shared", "rr"), (0, "shared", OURS)}


def test_no_results_at_all_are_read_as_they_were_written(tmp_path: Path) -> None:
    save(Results(settings=SETTINGS), tmp_path / "routing.json")
    assert load(tmp_path / "routing.json", SETTINGS).cells == []


def test_more_repetitions_may_be_asked_for_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "routing.json"
    save(results(cell("rr", [1.0])), path)
    assert load(path, msgspec.structs.replace(SETTINGS, repetitions=5)).settings.repetitions == 5
    with pytest.raises(ConfigError, match="other settings"):
        load(path, msgspec.structs.replace(SETTINGS, seed=1))


def test_results_that_are_not_there_cannot_be_continued(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        load(tmp_path / "routing.json", SETTINGS)
    (tmp_path / "routing.json").write_text("[]")
    with pytest.raises(ConfigError, match="no results of this benchmark"):
        load(tmp_path / "routing.json", SETTINGS)


# --- being told to stop -----------------------------------------------------------------------------------------


def test_a_signal_ends_the_users_even_if_it_comes_within_a_callback() -> None:
    async def held() -> None:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)

    with signals_as_exceptions(), pytest.raises(ToldToStop):
        run(held())
