"""From requests to tables and to the last line. Pure.

An arm's figure on a workload is the median over repetitions. On every workload arms are compared by mean TTFT and by
output tokens per second, ours against the best other: whichever arm that is, for each of the two.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Final

from routing_arms import OURS, ROUND_ROBINS
from routing_values import Cell, Results

from vllm_llmd.simulate.settings import Slo

SHARED: Final = "shared"
WON: Final = 1.2

HEADER: Final = (
    f"{'':12s} {'mean':>24s} {'p50':>7s} {'p90':>7s} {'p99':>7s} {'TPOT':>7s} {'E2E':>7s} "
    f"{'tokens/s':>24s} {'good/s':>7s} {'good':>7s} {'cached':>7s}"
)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one cell, or the medians of several. TTFT, TPOT and E2E, until the last token, in ms; goodput per second.

    All times are as if a unit had been as long around the cell as in the beginning.
    """

    ttft_mean_ms: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    tpot_ms: float
    e2e_ms: float
    tokens_per_s: float
    goodput: float
    good_share: float
    cached_share: float

    @classmethod
    def of(cls, cell: Cell, slo: Slo, slowness: float = 1.0) -> "Figures":
        ttft = [each.ttft_ms / slowness for each in cell.asked]
        tpot = [each.tpot_ms / slowness for each in cell.asked]
        good = sum(first <= slo.ttft_ms and rest <= slo.tpot_ms for first, rest in zip(ttft, tpot, strict=True))
        seconds = cell.lasted_ms / 1000 / slowness
        return cls(
            ttft_mean_ms=statistics.fmean(ttft),
            ttft_p50_ms=percentile(ttft, 50),
            ttft_p90_ms=percentile(ttft, 90),
            ttft_p99_ms=percentile(ttft, 99),
            tpot_ms=statistics.fmean(tpot),
            e2e_ms=statistics.fmean(each.e2e_ms for each in cell.asked) / slowness,
            tokens_per_s=sum(each.output_tokens for each in cell.asked) / seconds,
            goodput=good / seconds,
            good_share=good / len(cell.asked),
            cached_share=sum(each.cached_tokens for each in cell.asked)
            / sum(each.prompt_tokens for each in cell.asked),
        )


FIGURES: Final = tuple(field.name for field in fields(Figures))


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that so many per cent are not above."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def figures(results: Results, workload: str, arm: str) -> list[Figures]:
    """One for each repetition."""
    cells = [cell for cell in results.cells if (cell.workload, cell.arm) == (workload, arm)]
    return [Figures.of(cell, results.slo, results.slowness(cell)) for cell in cells]


def medians(found: Sequence[Figures]) -> Figures | None:
    """None for none."""
    if not found:
        return None
    return Figures(**{name: statistics.median(getattr(each, name) for each in found) for name in FIGURES})


@dataclass(frozen=True)
class Compared:
    """Ours on one workload in terms of others: more than 1 is better, for either figure."""

    workload: str
    ttft: float
    ttft_of: str
    throughput: float
    throughput_of: str

    @property
    def worst(self) -> float:
        return min(self.ttft, self.throughput)


def compared(results: Results, workload: str, others: Sequence[str]) -> Compared | None:
    """Against the best of `others` that were measured; None if none was, or ours was not."""
    ours = medians(figures(results, workload, OURS))
    found = {arm: each for arm in others if (each := medians(figures(results, workload, arm))) is not None}
    if ours is None or not found:
        return None
    soonest = min(found, key=lambda arm: found[arm].ttft_mean_ms)
    most = max(found, key=lambda arm: found[arm].tokens_per_s)
    return Compared(
        workload,
        found[soonest].ttft_mean_ms / ours.ttft_mean_ms,
        soonest,
        ours.tokens_per_s / found[most].tokens_per_s,
        most,
    )


def verdicts(results: Results) -> list[Compared]:
    """Ours against the best other arm, on each workload."""
    others = [arm for arm in results.settings.arms if arm != OURS]
    found = (compared(results, workload, others) for workload in results.settings.workloads)
    return [each for each in found if each is not None]


def last_line(results: Results) -> dict[str, float | int | None]:
    """None where nothing was measured."""
    against_rr, every = compared(results, SHARED, ROUND_ROBINS), verdicts(results)
    return {
        "mean_ttft_vs_rr": None if against_rr is None else round(against_rr.ttft, 3),
        "throughput_vs_rr": None if against_rr is None else round(against_rr.throughput, 3),
        "worst_vs_best_other": min((round(each.worst, 3) for each in every), default=None),
        "workloads_won_by_1_2": sum(each.ttft >= WON for each in every) if every else None,
    }


def summary(results: Results) -> dict[str, object]:
    """The last line, what it comes from, and the medians with least and most of every arm and workload."""
    table = {
        workload: {arm: _spread(figures(results, workload, arm)) for arm in results.settings.arms}
        for workload in results.settings.workloads
    }
    return {"last": last_line(results), "verdicts": [vars(each) for each in verdicts(results)], "figures": table}


def _spread(found: Sequence[Figures]) -> dict[str, list[float]]:
    """Median, least and most over repetitions."""
    return {
        name: [float(f"{how([getattr(each, name) for each in found]):.4g}") for how in (statistics.median, min, max)]
        for name in FIGURES
        if found
    }


def tables(results: Results) -> str:
    """One table per workload; the bracket after the mean TTFT and the tokens per second is least and most."""
    lines = []
    for workload in results.settings.workloads:
        arms = [(arm, found) for arm in results.settings.arms if (found := figures(results, workload, arm))]
        if not arms:
            continue
        lines.append(f"\n{workload}: {max(len(found) for _, found in arms)} repetitions, TTFT, TPOT and E2E in ms")
        lines.append(HEADER)
        lines += [_row(arm, found) for arm, found in arms]
        lines += [
            f"ours against the best other: mean TTFT {each.ttft:.2f}x ({each.ttft_of}), "
            f"throughput {each.throughput:.2f}x ({each.throughput_of})"
            for each in verdicts(results)
            if each.workload == workload
        ]
    return "\n".join(lines)


def _row(arm: str, found: Sequence[Figures]) -> str:
    middle = medians(found)
    assert middle is not None
    ttft = _with_spread(found, lambda each: each.ttft_mean_ms, ".0f")
    tokens = _with_spread(found, lambda each: each.tokens_per_s, ".1f")
    return (
        f"{arm:12s} {ttft:>24s} {middle.ttft_p50_ms:7.0f} {middle.ttft_p90_ms:7.0f} {middle.ttft_p99_ms:7.0f} "
        f"{middle.tpot_ms:7.1f} {middle.e2e_ms:7.0f} {tokens:>24s} {middle.goodput:7.2f} "
        f"{middle.good_share:7.1%} {middle.cached_share:7.1%}"
    )


def _with_spread(found: Sequence[Figures], figure: Callable[[Figures], float], form: str) -> str:
    values = [figure(each) for each in found]
    return f"{statistics.median(values):{form}} [{min(values):{form}} {max(values):{form}}]"


def line(results: Results, cell: Cell) -> str:
    """A finished cell in a few words."""
    slowness = results.slowness(cell)
    each = Figures.of(cell, results.slo, slowness)
    return (
        f"TTFT {each.ttft_mean_ms:.0f} ms (p90 {each.ttft_p90_ms:.0f}), TPOT {each.tpot_ms:.0f} ms, "
        f"{each.tokens_per_s:.1f} tokens/s, {each.good_share:.0%} good, {each.cached_share:.0%} cached, "
        f"requests by engine {cell.split}, {cell.lasted_ms / 1000:.1f} s with units {slowness:.2f} times as long"
    )
