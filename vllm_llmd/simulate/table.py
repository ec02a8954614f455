"""The report of a simulation as a table of text. Pure."""

from collections.abc import Callable, Sequence

from vllm_llmd.simulate.report import Summary
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
    ("refused", lambda each: str(each.refused)),
)


def rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """Headings, then one row per run."""
    return [[heading for heading, _ in _COLUMNS], *([tell(each) for _, tell in _COLUMNS] for each in summaries)]


def table(summaries: Sequence[Summary]) -> str:
    """Columns aligned, names to the left and numbers to the right."""
    return "\n".join(aligned(rows(summaries)))
