"""The report of a simulation as a table of text. Pure."""

from collections.abc import Callable, Sequence

from vllm_llmd.simulate.report import BandSummary, Summary
from vllm_llmd.tables import aligned

_COLUMNS: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    ("policy", lambda each: each.policy),
    ("good", lambda each: f"{each.good_share:.1%}"),
    ("good/s", lambda each: f"{each.goodput:.2f}"),
    ("TTFT ms p50", lambda each: f"{each.ttft_ms.p50:.0f}"),
    ("p90", lambda each: f"{each.ttft_ms.p90:.0f}"),
    ("p99", lambda each: f"{each.ttft_ms.p99:.0f}"),
    ("TPOT ms p50", lambda each: f"{each.tpot_ms.p50:.1f}"),
    ("p90", lambda each: f"{each.tpot_ms.p90:.1f}"),
    ("p99", lambda each: f"{each.tpot_ms.p99:.1f}"),
    ("E2E s p50", lambda each: f"{each.e2e_ms.p50 / 1000:.1f}"),
    ("p90", lambda each: f"{each.e2e_ms.p90 / 1000:.1f}"),
    ("p99", lambda each: f"{each.e2e_ms.p99 / 1000:.1f}"),
    ("tokens/s", lambda each: f"{each.output_tokens_per_s:.0f}"),
    ("cached", lambda each: f"{each.cached_share:.1%}"),
    ("busiest/mean", lambda each: f"{each.busiest_to_mean:.2f}"),
    ("waited", lambda each: f"{each.waited_share:.1%}"),
    ("ms p50", lambda each: f"{each.waited_ms.p50:.0f}"),
    ("p90", lambda each: f"{each.waited_ms.p90:.0f}"),
    ("shed", lambda each: str(each.shed)),
    ("preempted", lambda each: str(each.preempted)),
    ("refused", lambda each: str(each.refused)),
)

_BAND_COLUMNS: tuple[tuple[str, Callable[[BandSummary], str]], ...] = (
    ("band", lambda each: each.band),
    ("requests", lambda each: str(each.requests)),
    ("good", lambda each: f"{each.good_share:.1%}"),
    ("good/s", lambda each: f"{each.goodput:.2f}"),
    ("TTFT ms p50", lambda each: f"{each.ttft_p50_ms:.0f}"),
    ("p90", lambda each: f"{each.ttft_p90_ms:.0f}"),
    ("p99", lambda each: f"{each.ttft_p99_ms:.0f}"),
    ("E2E s p50", lambda each: f"{each.e2e_p50_ms / 1000:.1f}"),
    ("p90", lambda each: f"{each.e2e_p90_ms / 1000:.1f}"),
    ("cached", lambda each: f"{each.cached_share:.1%}"),
    ("shed", lambda each: str(each.shed)),
    ("preempted", lambda each: str(each.preempted)),
)


def rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """Headings, then one row per run."""
    return [[heading for heading, _ in _COLUMNS], *([tell(each) for _, tell in _COLUMNS] for each in summaries)]


def band_rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """Headings, then one row per run and band. Nothing where all are of one band."""
    if all(len(each.bands) < 2 for each in summaries):
        return []
    told = [[each.policy, *(tell(of) for _, tell in _BAND_COLUMNS)] for each in summaries for of in each.bands]
    return [["policy", *(heading for heading, _ in _BAND_COLUMNS)], *told]


def table(summaries: Sequence[Summary]) -> str:
    """Columns aligned, names to the left and numbers to the right; a second table by bands of priority, if several."""
    by_band = band_rows(summaries)
    return "\n".join([*aligned(rows(summaries)), *(["", *aligned(by_band)] if by_band else [])])
