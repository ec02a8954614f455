"""What a simulation has shown, as numbers: latencies, throughput, goodput, cache, load of the engines. Pure."""

from collections.abc import Sequence
from typing import Final, get_args

import msgspec
import numpy as np

from vllm_llmd.router.slo import Band, band
from vllm_llmd.simulate.outcomes import EngineTotals, Outcome, Played
from vllm_llmd.simulate.settings import Slo

CURVE: Final = tuple(range(0, 101, 2))
"""Percentiles of a distribution that are drawn."""

BINS: Final = 48
"""Stretches of time that are drawn apart."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """How a time in ms is distributed. `curve` has the percentiles of `CURVE`. All is 0 where nothing was measured."""

    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    curve: list[float] = []

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if not values:
            return cls()
        told = [round(float(value), 3) for value in np.percentile(values, [50, 90, 99, *CURVE])]
        return cls(mean=round(float(np.mean(values)), 3), p50=told[0], p90=told[1], p99=told[2], curve=told[3:])


class Bin(msgspec.Struct, frozen=True, kw_only=True):
    """What came within a stretch of time that begins at `at_s`."""

    at_s: float
    requests: int
    good_share: float
    ttft_p50_ms: float
    ttft_p90_ms: float


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine has done. `busy` is the share of the time in which it computed."""

    id: str
    requests: int
    orders: int
    computed_tokens: int
    output_tokens: int
    busy: float
    preemptions: int


class BandSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one band of priorities, as in the whole. The router had engines leave them `preempted` times."""

    band: Band
    requests: int
    good: int
    good_share: float
    goodput: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    e2e_p50_ms: float
    e2e_p90_ms: float
    cached_share: float
    shed: int
    preempted: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One policy on one trace.

    `good` requests kept the SLO; `goodput` is how many came per second, over the time in which requests came.
    `refused` requests fit no engine, `shed` were sent away by the router. `waited_share` of the others waited in it,
    for `waited_ms`. `cached_share` of all prompt tokens were computed nowhere. Engines preempted requests `preemptions`
    times, and were told to leave them to others `preempted` times. The last answer ended after `lasts_s`.
    """

    policy: str
    requests: int
    ended: int
    refused: int
    shed: int
    good: int
    good_share: float
    goodput: float
    offered: float
    ttft_ms: Spread
    tpot_ms: Spread
    e2e_ms: Spread
    waited_share: float
    waited_ms: Spread
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    cached_share: float
    predicted_share: float
    ordered: int
    given_up: int
    preemptions: int
    busiest_to_mean: float
    lasts_s: float
    steps: int
    over_time: list[Bin]
    engines: list[EngineLoad]
    preempted: int = 0
    bands: list[BandSummary] = []
    """From the least urgent on; with neither in results that were written before there were any."""


def is_good(outcome: Outcome, slo: Slo) -> bool:
    """Whether a request has kept the SLO, or its own. An answer of one token has no time per token to keep."""
    if outcome.ttft_ms is None or outcome.made_tokens < outcome.output_tokens:
        return False
    slo = outcome.slo or slo
    return outcome.ttft_ms <= slo.ttft_ms and (outcome.tpot_ms or 0.0) <= slo.tpot_ms


def summary(policy: str, played: Played, slo: Slo) -> Summary:
    """The numbers of one run."""
    outcomes = played.outcomes
    shed = sum(outcome.shed is not None for outcome in outcomes)
    ended = [outcome for outcome in outcomes if outcome.refused is None and outcome.shed is None]
    waited_ms = [outcome.waited_ms for outcome in ended if outcome.waited_ms > 0]
    good = sum(is_good(outcome, slo) for outcome in outcomes)
    comes_s = max((outcomes[-1].at_ms - outcomes[0].at_ms) / 1000, 1e-9)
    lasts_s = max((played.end_ms - outcomes[0].at_ms) / 1000, 1e-9)
    prompt_tokens = sum(outcome.prompt_tokens for outcome in ended)
    output_tokens = sum(outcome.made_tokens for outcome in ended)
    busy = [engine.busy_ms for engine in played.engines]
    return Summary(
        policy=policy,
        requests=len(outcomes),
        ended=len(ended),
        refused=len(outcomes) - len(ended) - shed,
        shed=shed,
        good=good,
        good_share=round(good / len(outcomes), 4),
        goodput=round(good / comes_s, 4),
        offered=round(len(outcomes) / comes_s, 4),
        ttft_ms=Spread.of([each.ttft_ms for each in ended if each.ttft_ms is not None]),
        tpot_ms=Spread.of([each.tpot_ms for each in ended if each.tpot_ms is not None]),
        e2e_ms=Spread.of([each.e2e_ms for each in ended if each.e2e_ms is not None]),
        waited_share=_share(len(waited_ms), len(ended)),
        waited_ms=Spread.of(waited_ms),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        output_tokens_per_s=round(output_tokens / lasts_s, 1),
        cached_share=_share(prompt_tokens - sum(each.computed_tokens for each in ended), prompt_tokens),
        predicted_share=_share(sum(each.predicted_cached_tokens for each in ended), prompt_tokens),
        ordered=sum(engine.orders for engine in played.engines),
        given_up=played.given_up,
        preemptions=sum(engine.preemptions for engine in played.engines),
        busiest_to_mean=round(max(busy) / max(sum(busy) / len(busy), 1e-9), 3),
        lasts_s=round(lasts_s, 3),
        steps=played.steps,
        over_time=_over_time(outcomes, slo),
        engines=[_load(engine, lasts_s) for engine in played.engines],
        preempted=sum(each.preempted for each in outcomes),
        bands=_bands(outcomes, slo, comes_s),
    )


def _bands(outcomes: Sequence[Outcome], slo: Slo, comes_s: float) -> list[BandSummary]:
    among: dict[Band, list[Outcome]] = {name: [] for name in get_args(Band)}
    for outcome in outcomes:
        among[band(outcome.priority)].append(outcome)
    return [_band(name, found, slo, comes_s) for name, found in among.items() if found]


def _band(name: Band, outcomes: Sequence[Outcome], slo: Slo, comes_s: float) -> BandSummary:
    ended = [each for each in outcomes if each.refused is None and each.shed is None]
    good = sum(is_good(each, slo) for each in outcomes)
    ttft = Spread.of([each.ttft_ms for each in ended if each.ttft_ms is not None])
    e2e = Spread.of([each.e2e_ms for each in ended if each.e2e_ms is not None])
    prompt_tokens = sum(each.prompt_tokens for each in ended)
    return BandSummary(
        band=name,
        requests=len(outcomes),
        good=good,
        good_share=_share(good, len(outcomes)),
        goodput=round(good / comes_s, 4),
        ttft_p50_ms=ttft.p50,
        ttft_p90_ms=ttft.p90,
        ttft_p99_ms=ttft.p99,
        e2e_p50_ms=e2e.p50,
        e2e_p90_ms=e2e.p90,
        cached_share=_share(prompt_tokens - sum(each.computed_tokens for each in ended), prompt_tokens),
        shed=sum(each.shed is not None for each in outcomes),
        preempted=sum(each.preempted for each in outcomes),
    )


def _share(part: int, whole: int) -> float:
    return round(part / max(whole, 1), 4)


def _load(engine: EngineTotals, lasts_s: float) -> EngineLoad:
    return EngineLoad(
        id=engine.id,
        requests=engine.requests,
        orders=engine.orders,
        computed_tokens=engine.computed_tokens,
        output_tokens=engine.output_tokens,
        busy=round(engine.busy_ms / 1000 / lasts_s, 4),
        preemptions=engine.preemptions,
    )


def _over_time(outcomes: Sequence[Outcome], slo: Slo) -> list[Bin]:
    """Requests by when they came."""
    began_ms = outcomes[0].at_ms
    width_ms = max((outcomes[-1].at_ms - began_ms) / BINS, 1e-6)
    bins: list[list[Outcome]] = [[] for _ in range(BINS)]
    for outcome in outcomes:
        bins[min(int((outcome.at_ms - began_ms) / width_ms), BINS - 1)].append(outcome)
    told = []
    for number, among in enumerate(bins):
        ttft = Spread.of([each.ttft_ms for each in among if each.ttft_ms is not None])
        told.append(
            Bin(
                at_s=round(number * width_ms / 1000, 3),
                requests=len(among),
                good_share=_share(sum(is_good(each, slo) for each in among), len(among)),
                ttft_p50_ms=ttft.p50,
                ttft_p90_ms=ttft.p90,
            )
        )
    return told
