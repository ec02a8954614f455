"""The report of a simulation as one page of HTML that needs nothing else. Pure."""

from html import escape
from typing import Final

import msgspec

from vllm_llmd.sim.settings import MODEL
from vllm_llmd.simulate.report import CURVE, Spread, Summary
from vllm_llmd.simulate.settings import SimulateSettings
from vllm_llmd.simulate.svg import Chart, Series, bars, legend, lines
from vllm_llmd.simulate.table import band_rows, rows

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1320px; padding: 0 1em; color: #1c2024 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
td, th { padding: .2em .7em; text-align: right; border-bottom: 1px solid #dfe3e6; white-space: nowrap }
td:first-child, th:first-child { text-align: left } th { color: #5f6b76; font-weight: 400 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1em }
figure { margin: 0 } figcaption { font-weight: 600 } svg { width: 100%; height: auto }
svg text { font-size: 11px; fill: #5f6b76 } svg .middle { text-anchor: middle } svg .end { text-anchor: end }
polyline { fill: none; stroke-width: 1.8 } .grid { stroke: #e7eaec } .mark { stroke: #1c2024; stroke-dasharray: 4 3 }
.legend span { margin-right: 1.2em } .legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em }
"""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a simulation has shown. `trace` says of what; `rate` is in requests per second."""

    trace: str
    requests: int
    rate: float
    settings: SimulateSettings
    runs: list[Summary]


def page(report: Report) -> str:
    """The whole page."""
    names = [run.policy for run in report.runs]
    settings = report.settings
    roles = f"{settings.prefill} of them prefill" if settings.prefill else "all prefill and decode"
    about = (
        f"{report.requests:,} requests of {report.trace}, {report.rate:.2f} a second; "
        f"{settings.engines} engines, {roles}. "
        f"Good: first token within {settings.slo_ttft_ms:g} ms, then one per {settings.slo_tpot_ms:g} ms on average."
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>vllm-llmd simulate</title>'
        f"<style>{_STYLE}</style><h1>Simulated fleet</h1><p>{escape(about)}</p>"
        f'<div class="wide">{_table(rows(report.runs))}</div>{_bands(report)}'
        f'<h2>Plots</h2><p class="legend">{legend(names)}</p><div class="plots">{_plots(report)}</div>'
        f"<h2>Engines</h2>{_engines(report)}"
        f"<h2>Settings</h2><div class='wide'>{_settings(settings)}</div></html>\n"
    )


def _plots(report: Report) -> str:
    runs, settings = report.runs, report.settings
    goodput = [Series(run.policy, [(0, run.goodput)]) for run in runs]
    cached = [Series(run.policy, [(0, 100 * run.cached_share)]) for run in runs]
    good = [Series(run.policy, [(each.at_s, 100 * each.good_share) for each in run.over_time]) for run in runs]
    waited = [Series(run.policy, [(each.at_s, each.ttft_p90_ms) for each in run.over_time]) for run in runs]
    arrived = [Series("requests", [(each.at_s, each.requests) for each in runs[0].over_time])]
    charts = [
        bars(Chart("Goodput", "", "good requests per second", goodput)),
        bars(Chart("Cached", "", "% of prompt tokens computed nowhere", cached)),
        lines(_distribution("Time to first token", [(run.policy, run.ttft_ms) for run in runs], settings.slo_ttft_ms)),
        lines(_distribution("Time per token after", [(run.policy, run.tpot_ms) for run in runs], settings.slo_tpot_ms)),
        lines(_distribution("Whole answer", [(run.policy, run.e2e_ms) for run in runs], None)),
        lines(
            _distribution(
                "Wait in the router, where there was any", [(run.policy, run.waited_ms) for run in runs], None
            )
        ),
        lines(Chart("Good over time", "s", "% of the requests that came", good)),
        lines(Chart("90th percentile of time to first token", "s", "ms", waited, y_scale="log")),
        lines(Chart("Arrivals", "s", "requests per stretch", arrived)),
        lines(Chart("Busy engines, from the busiest on", "engine", "% of the time", [_busy(run) for run in runs])),
        lines(Chart("Prompt tokens computed, from the most on", "engine", "tokens", [_computed(run) for run in runs])),
    ]
    return "".join(charts)


def _distribution(title: str, spreads: list[tuple[str, Spread]], limit_ms: float | None) -> Chart:
    series = [Series(name, list(zip(spread.curve, CURVE, strict=True))) for name, spread in spreads if spread.curve]
    return Chart(title, "ms", "% of requests take at most", series, x_scale="log", mark_x=limit_ms)


def _busy(run: Summary) -> Series:
    busy = sorted((100 * engine.busy for engine in run.engines), reverse=True)
    return Series(run.policy, [(float(place), value) for place, value in enumerate(busy)])


def _computed(run: Summary) -> Series:
    tokens = sorted((engine.computed_tokens for engine in run.engines), reverse=True)
    return Series(run.policy, [(float(place), float(value)) for place, value in enumerate(tokens)])


def _bands(report: Report) -> str:
    cells = band_rows(report.runs)
    return f'<h2>By priority</h2><div class="wide">{_table(cells)}</div>' if cells else ""


def _engines(report: Report) -> str:
    heads = ["engine", "requests", "orders", "computed", "output", "busy", "preemptions"]
    return "".join(
        f'<details><summary>{escape(run.policy)}</summary><div class="wide">'
        + _table([heads, *([_told(value) for value in msgspec.structs.astuple(each)] for each in run.engines)])
        + "</div></details>"
        for run in report.runs
    )


def _settings(settings: SimulateSettings) -> str:
    told = {**msgspec.structs.asdict(settings), "model": None}
    told |= {f"engine: {name}": value for name, value in engine_settings(settings).items()}
    cells = [["setting", "value"], *([name, _told(value)] for name, value in told.items() if value is not None)]
    return _table(cells)


def engine_settings(settings: SimulateSettings) -> dict[str, object]:
    """What describes one engine."""
    return {name: getattr(settings.model, name) for name in MODEL}


def _told(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(cells: list[list[str]]) -> str:
    head, *body = cells
    told = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines_ = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><tr>{told}</tr>{lines_}</table>"
