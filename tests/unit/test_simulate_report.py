"""What is made of outcomes: percentiles, goodput, shares; the table, and the page with its drawings."""

import re

import msgspec
import pytest

from vllm_llmd.names import EngineId
from vllm_llmd.simulate.outcomes import EngineTotals, Outcome, Played
from vllm_llmd.simulate.page import Report, page
from vllm_llmd.simulate.report import Spread, is_good, summary
from vllm_llmd.simulate.settings import SimulateSettings, Slo
from vllm_llmd.simulate.svg import Chart, Scale, Series, bars, lines
from vllm_llmd.simulate.table import table

SLO = Slo(ttft_ms=100, tpot_ms=10)


def outcome(at_ms: float, ttft_ms: float, tpot_ms: float, tokens: int = 11) -> Outcome:
    last_ms = at_ms + ttft_ms + tpot_ms * (tokens - 1)
    return Outcome(
        at_ms,
        1000,
        tokens,
        computed_tokens=250,
        predicted_cached_tokens=800,
        made_tokens=tokens,
        first_ms=at_ms + ttft_ms,
        last_ms=last_ms,
    )


def engine(name: str, busy_ms: float) -> EngineTotals:
    return EngineTotals(EngineId(name), 2, 0, 500, 22, busy_ms, 0)


PLAYED = Played(
    outcomes=[outcome(0, 50, 5), outcome(1000, 150, 5), outcome(1500, 50, 15), Outcome(2000, 9, 9, refused="too long")],
    engines=[engine("a", 300.0), engine("b<", 100.0)],
    end_ms=4000.0,
)


@pytest.mark.parametrize(
    ("ttft_ms", "tpot_ms", "tokens", "good"),
    [(100, 10, 11, True), (101, 10, 11, False), (100, 11, 11, False), (100, 11, 1, True)],
)
def test_a_request_is_good_that_keeps_both_limits(ttft_ms: float, tpot_ms: float, tokens: int, good: bool) -> None:
    assert is_good(outcome(7, ttft_ms, tpot_ms, tokens), SLO) is good


def test_one_that_has_objectives_of_its_own_is_judged_by_those() -> None:
    kept, missed = outcome(7, 150, 5), outcome(7, 50, 5)
    kept.slo, missed.slo = Slo(ttft_ms=200, tpot_ms=10), Slo(ttft_ms=40, tpot_ms=10)
    assert is_good(kept, SLO) and not is_good(missed, SLO)


def test_one_that_was_cut_short_or_never_began_is_not_good() -> None:
    cut = outcome(0, 1, 1)
    cut.made_tokens = 5
    assert not is_good(cut, SLO)
    assert not is_good(Outcome(0, 1, 1), SLO)


def test_a_summary_adds_up() -> None:
    told = summary("p", PLAYED, SLO)
    assert (told.requests, told.ended, told.refused, told.good, told.good_share) == (4, 3, 1, 1, 0.25)
    assert (told.offered, told.goodput) == (2.0, 0.5)
    assert (told.ttft_ms.p50, told.tpot_ms.p50) == (50, 5)
    assert told.output_tokens_per_s == round(33 / 4, 1)
    assert (told.cached_share, told.predicted_share) == (0.75, 0.8)
    assert told.busiest_to_mean == 1.5
    assert [each.busy for each in told.engines] == [0.075, 0.025]
    assert sum(each.requests for each in told.over_time) == 4


def test_what_was_sent_away_counts_as_shed_and_what_waited_tells_for_how_long() -> None:
    waited = outcome(0, 50, 5)
    waited.sent_ms = 30.0
    passed = outcome(0, 50, 5)
    passed.sent_ms = 0.0
    away = Outcome(10, 9, 9, shed="expired")
    told = summary("p", Played([waited, passed, away], PLAYED.engines, 4000.0), SLO)
    assert (told.requests, told.ended, told.shed, told.refused, told.good) == (3, 2, 1, 0, 2)
    assert (told.waited_share, told.waited_ms.p50) == (0.5, 30.0)


def test_bands_of_priority_add_up_to_the_whole() -> None:
    given_up, away = outcome(0, 150, 5), Outcome(10, 9, 9, shed="expired", priority=-1, preempted=2)
    given_up.priority, given_up.preempted = -1, 1
    told = summary("p", Played([outcome(0, 50, 5), given_up, away], PLAYED.engines, 4000.0), SLO)
    assert [(each.band, each.requests, each.good, each.shed, each.preempted) for each in told.bands] == [
        ("best_effort", 2, 0, 1, 3),
        ("normal", 1, 1, 0, 0),
    ]
    assert [each.ttft_p50_ms for each in told.bands] == [150, 50]
    assert told.preempted == 3
    assert round(sum(each.goodput for each in told.bands), 3) == round(told.goodput, 3)


def test_bands_are_told_apart_only_if_there_are_several() -> None:
    mixed = Played([*PLAYED.outcomes, Outcome(2000, 9, 9, priority=-1, shed="expired")], PLAYED.engines, 4000.0)
    one, several = summary("p", PLAYED, SLO), summary("q", mixed, SLO)
    assert len(table([one]).splitlines()) == 2
    said = table([several]).splitlines()
    assert [line.split()[1] for line in said[4:]] == ["best_effort", "normal"]
    report = Report(trace="t", requests=4, rate=2.0, settings=SimulateSettings(synthetic=4), runs=[one])
    assert "best_effort" not in page(report).replace("best_effort_share", "")
    assert "best_effort" in page(msgspec.structs.replace(report, runs=[several])).replace("best_effort_share", "")


def test_percentiles_lie_on_their_curve() -> None:
    spread = Spread.of([float(value) for value in range(101)])
    assert (spread.p50, spread.p90, spread.p99, spread.mean) == (50, 90, 99, 50)
    assert (spread.curve[0], spread.curve[25], spread.curve[-1]) == (0, 50, 100)
    assert Spread.of([]) == Spread()


def test_a_table_has_a_row_per_run_and_columns_in_line() -> None:
    told = table([summary("round_robin", PLAYED, SLO), summary("p", PLAYED, SLO)]).splitlines()
    assert len(told) == 3
    assert len({len(line) for line in told}) == 1
    assert "25.0%" in told[1]


def test_a_page_names_everything_and_takes_names_for_text() -> None:
    runs = [summary("<b>", PLAYED, SLO), summary("other", PLAYED, SLO)]
    report = Report(trace="<t>", requests=4, rate=2.0, settings=SimulateSettings(synthetic=4), runs=runs)
    made = page(report)
    assert "&lt;b&gt;" in made and "<b>" not in made and "<t>" not in made and "b&lt;" in made
    assert "nan" not in re.sub("<[^>]*>", "", made).lower()


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("points", [[], [(0.0, 0.0)], [(5.0, 5.0), (5.0, 5.0)], [(-1.0, 2.0), (1e9, -3.0)]])
def test_whatever_is_drawn_stays_within_the_picture(scale: Scale, points: list[tuple[float, float]]) -> None:
    chart = Chart("t", "x", "y", [Series("s", points)], x_scale=scale, y_scale=scale, mark_x=3.0)
    [path] = re.findall('points="([^"]*)"', lines(chart))
    drawn = [tuple(map(float, point.split(","))) for point in path.split()]
    assert len(drawn) == len(points)
    assert all(0 <= x <= 620 and 0 <= y <= 300 for x, y in drawn)


def test_a_bar_is_as_high_as_its_number() -> None:
    drawn = bars(Chart("t", "", "y", [Series("one", [(0, 1.0)]), Series("two", [(0, 2.0)])]))
    heights = [float(height) for height in re.findall('<rect [^>]*height="([^"]*)"', drawn)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
