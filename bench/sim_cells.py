"""What `make bench-sim` plays: sizes of a fleet, roles, loads; and what a cell of it has shown. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from vllm_llmd.simulate.report import Summary
from vllm_llmd.simulate.settings import Place, SimulateSettings

Roles = Literal["aggregated", "disaggregated"]
Load = Literal["light", "heavy"]
Objectives = Literal["sent", "unsent"]
"""Whether clients tell the router what a good request keeps, by headers."""

COPY_ENGINES: Final = 8
"""Engines that one copy of the trace is for: larger fleets have more users, not busier ones."""

PREFILL_SHARE: Final = 6 / 8
"""Of the engines where they have roles: prompts of this trace take more computing than answers."""

SPEEDUPS: Final[dict[tuple[Roles, Load], float]] = {
    ("aggregated", "light"): 0.8,
    ("aggregated", "heavy"): 2.0,
    ("disaggregated", "light"): 0.7,
    ("disaggregated", "heavy"): 1.6,
}
"""How much faster than in the trace requests come: where engines in turn keep the SLO, and where they lose it."""

KEPT_SHARE: Final = 0.9
"""An SLO is kept if so many of the requests keep it."""


@dataclass(frozen=True)
class Cell:
    """One comparison of all policies. `minutes` of the trace are played, before they are hastened."""

    engines: int
    roles: Roles
    load: Load
    minutes: float

    @property
    def name(self) -> str:
        return f"{self.engines} {self.roles} {self.load}"

    def settings(
        self, trace: str, seed: int, waiting: Place = "router", objectives: Objectives = "sent"
    ) -> SimulateSettings:
        return SimulateSettings(
            trace=trace,
            engines=self.engines,
            prefill=round(self.engines * PREFILL_SHARE) if self.roles == "disaggregated" else 0,
            copies=max(self.engines // COPY_ENGINES, 1),
            minutes=self.minutes,
            speedup=SPEEDUPS[self.roles, self.load],
            waiting=waiting,
            send_slo=objectives == "sent",
            seed=seed,
        )


class Played(msgspec.Struct, frozen=True):
    """A cell that has been played: one run per policy."""

    cell: str
    engines: int
    roles: Roles
    load: Load
    runs: list[Summary]


class Verdict(msgspec.Struct, frozen=True):
    """How ours did. `ratio` is our goodput in that of the best other; a tie within a thousandth is no win."""

    cell: str
    ours: float
    best_other: str
    ratio: float
    round_robin_keeps: bool

    @property
    def won(self) -> bool:
        return self.ratio > 1.001


def verdict(played: Played, ours: str) -> Verdict:
    """Of one cell. Round robin, ours and at least one other must have been played."""
    by_name = {run.policy: run for run in played.runs}
    best = max((run for run in played.runs if run.policy != ours), key=lambda run: run.goodput)
    return Verdict(
        cell=played.cell,
        ours=by_name[ours].goodput,
        best_other=best.policy,
        ratio=round(by_name[ours].goodput / max(best.goodput, 1e-9), 4),
        round_robin_keeps=by_name["round_robin"].good_share >= KEPT_SHARE,
    )


def last_line(verdicts: Sequence[Verdict]) -> dict[str, float | int]:
    return {
        "cells": len(verdicts),
        "cells_won": sum(each.won for each in verdicts),
        "min_goodput_ratio_to_best_other": min(each.ratio for each in verdicts),
    }
