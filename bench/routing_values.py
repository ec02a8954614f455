"""What `make bench-routing` is asked for and what it measures, as the values that stand in `results/routing.json`."""

from pathlib import Path
from statistics import fmean

import msgspec
from resumable import as_json, check_settings, read_results, replace_file

from vllm_llmd.simulate.settings import Slo


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. Results of other settings cannot be continued. A good request keeps objectives in units.

    `dtype` is what the engines compute in.
    """

    model: str
    engines: int
    arms: list[str]
    workloads: list[str]
    repetitions: int
    scale: float
    seed: int
    slo_ttft_units: float
    slo_tpot_units: float
    dtype: str = "bfloat16"


class Asked(msgspec.Struct, frozen=True, array_like=True):
    """One request: when it was sent, in ms since the first of its cell; times to tokens; tokens as the engine counts.

    `tpot_ms` is per token after the first. `conversation` and `turn` say which request of the workload it is.
    """

    conversation: int
    turn: int
    sent_ms: float
    ttft_ms: float
    tpot_ms: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int

    @property
    def e2e_ms(self) -> float:
        """Until the last token."""
        return self.ttft_ms + self.tpot_ms * max(self.output_tokens - 1, 0)


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One arm's requests of one workload, once, from cold caches, in times as they were measured.

    `units_ms` are how long a unit was right before, which the times of the workload are in, and right after; empty
    where that was not measured. `lasted_ms` is from the first request to the end of the last answer. `split` says how
    many requests each engine has served. `told` is what our router thought of the engines in the end, and what it had
    decided; empty for others.
    """

    repetition: int
    workload: str
    arm: str
    lasted_ms: float
    asked: list[Asked]
    split: list[int]
    told: dict[str, object] = {}
    units_ms: list[float] = []

    @property
    def key(self) -> tuple[int, str, str]:
        return self.repetition, self.workload, self.arm


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one length, `at_once` to each engine, through a router that deals them out in turn."""

    at_once: int
    asked: list[Asked]

    @property
    def ttft_ms(self) -> float:
        """On average."""
        return fmean(each.ttft_ms for each in self.asked)

    @property
    def rest_ms(self) -> float:
        """From the first token to the last one, on average."""
        return fmean(each.tpot_ms * (each.output_tokens - 1) for each in self.asked)


class Results(msgspec.Struct, kw_only=True):
    """Everything measured so far. `unit_ms` is how long a unit was in the beginning.

    `checks` say what the simulator predicts, by workload and arm.
    """

    settings: Settings
    versions: dict[str, str] = {}
    unit_ms: float | None = None
    probes: list[Probe] = []
    cells: list[Cell] = []
    summary: dict[str, object] = {}
    checks: list[dict[str, object]] = []

    @property
    def slo(self) -> Slo:
        unit_ms = self.unit_ms or 0.0
        return Slo(ttft_ms=self.settings.slo_ttft_units * unit_ms, tpot_ms=self.settings.slo_tpot_units * unit_ms)

    def slowness(self, cell: Cell) -> float:
        """By what factor all took longer around a cell than in the beginning, as machines become slower and faster."""
        return fmean(cell.units_ms) / self.unit_ms if self.unit_ms and cell.units_ms else 1.0

    @property
    def done(self) -> set[tuple[int, str, str]]:
        return {cell.key for cell in self.cells}


def save(results: Results, path: Path) -> None:
    """One cell a line. Replaces the file in one step: an interrupted run leaves the former one."""
    head = msgspec.to_builtins(msgspec.structs.replace(results, cells=[]))
    del head["cells"]
    cells = b",\n".join(map(msgspec.json.encode, results.cells))
    replace_file(path, as_json(head).removesuffix(b"\n}\n") + b',\n "cells": [\n' + cells + b"\n ]\n}\n")


def read(path: Path) -> Results:
    """Results of any settings. Raises ConfigError if there are none."""
    return read_results(path, Results, f"there is no {path}: leave --resume and --check out")


def load(path: Path, settings: Settings) -> Results:
    """Results of a run that was interrupted. Raises ConfigError if there are none, or of other settings.

    More repetitions may be asked for than before.
    """
    results = read(path)
    check_settings(path, msgspec.structs.replace(results.settings, repetitions=settings.repetitions), settings)
    results.settings = settings
    return results
