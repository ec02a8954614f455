"""What `make bench-sim` plays, and what it makes of it."""

import sys
from pathlib import Path

import msgspec
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import sim_results
from sim_cells import Cell, Played, last_line, verdict
from sim_results import Results, Settings

from vllm_llmd.errors import ConfigError
from vllm_llmd.names import EngineId
from vllm_llmd.simulate.outcomes import EngineTotals, Outcome
from vllm_llmd.simulate.outcomes import Played as PlayedTrace
from vllm_llmd.simulate.report import Summary, summary
from vllm_llmd.simulate.settings import Slo

IDLE = EngineTotals(EngineId("e"), 0, 0, 0, 0, 0.0, 0)
NOTHING = summary("", PlayedTrace([Outcome(0, 1, 1, refused="so")], [IDLE], 1.0), Slo(ttft_ms=1, tpot_ms=1))


def run(policy: str, goodput: float, good_share: float = 0.5) -> Summary:
    return msgspec.structs.replace(NOTHING, policy=policy, goodput=goodput, good_share=good_share)


def cell(*runs: Summary) -> Played:
    return Played("8 aggregated light", 8, "aggregated", "light", list(runs))


def test_a_larger_fleet_has_more_users_and_the_same_load_per_engine() -> None:
    few, many = (Cell(engines, "disaggregated", "heavy", 2.0).settings("t", 0) for engines in (8, 512))
    assert (few.copies, many.copies) == (1, 64)
    assert few.speedup == many.speedup
    assert (few.prefill, many.prefill) == (6, 384)
    assert Cell(64, "aggregated", "light", 2.0).settings("t", 0).prefill == 0


@pytest.mark.parametrize(("ours", "won"), [(4.0, True), (2.0, False), (1.0, False)])
def test_a_cell_is_won_by_more_goodput_than_the_best_other(ours: float, won: bool) -> None:
    told = verdict(cell(run("round_robin", 1.0), run("mine", ours), run("weighted", 2.0)), "mine")
    assert (told.best_other, told.ratio, told.won) == ("weighted", ours / 2, won)


def test_round_robin_keeps_its_slo_if_nine_of_ten_do() -> None:
    assert verdict(cell(run("round_robin", 1.0, 0.9), run("mine", 1.0)), "mine").round_robin_keeps
    assert not verdict(cell(run("round_robin", 1.0, 0.89), run("mine", 1.0)), "mine").round_robin_keeps


def test_the_last_line_counts_what_was_won_and_tells_the_worst() -> None:
    verdicts = [verdict(cell(run("round_robin", 1.0), run("mine", ours)), "mine") for ours in (0.9, 1.0, 2.0)]
    assert last_line(verdicts) == {"cells": 3, "cells_won": 1, "min_goodput_ratio_to_best_other": 0.9}


SETTINGS = Settings(trace="t", ours="mine", policies=["mine", "round_robin"], scale=1.0, seed=0)
CELLS = [Cell(engines, "aggregated", "light", 1.0) for engines in (8, 64)]


def played_once(out: Path) -> Results:
    results = Results(settings=SETTINGS)
    results.add(CELLS[0], [run("mine", 2.0), run("round_robin", 1.0)])
    sim_results.save(results, out)
    return results


def test_an_interrupted_run_goes_on_with_the_cells_that_are_left(tmp_path: Path) -> None:
    out = tmp_path / "results" / "sim.json"
    assert Results(settings=SETTINGS).left(CELLS) == CELLS
    before = played_once(out)
    again = sim_results.load(out, SETTINGS)
    assert again == before
    assert again.left(CELLS) == CELLS[1:]
    again.add(CELLS[1], [run("mine", 1.0), run("round_robin", 1.0)])
    assert again.last == {"cells": 2, "cells_won": 1, "min_goodput_ratio_to_best_other": 1.0}
    assert again.left(CELLS) == []


def test_results_of_other_settings_are_not_continued(tmp_path: Path) -> None:
    out = tmp_path / "sim.json"
    with pytest.raises(ConfigError, match="leave --resume out"):
        sim_results.load(out, SETTINGS)
    played_once(out)
    with pytest.raises(ConfigError, match="other settings"):
        sim_results.load(out, msgspec.structs.replace(SETTINGS, seed=1))
    out.write_text('{"ours": "mine"}')
    with pytest.raises(ConfigError, match="no results to go on with"):
        sim_results.load(out, SETTINGS)
