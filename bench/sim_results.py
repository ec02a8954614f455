"""What `make bench-sim` has played so far, as it stands in `results/sim.json`: written after every cell."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
from resumable import as_json, check_settings, read_results, replace_file
from sim_cells import Cell, Objectives, Played, Verdict, last_line, verdict

from vllm_llmd.simulate.report import Summary
from vllm_llmd.simulate.settings import Place


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What decides the numbers of a cell. Results of other settings cannot be continued. `trace` is a file's name."""

    trace: str
    ours: str
    policies: list[str]
    scale: float
    seed: int
    waiting: Place = "engines"
    """Nobody waited in the router before this was told."""
    objectives: Objectives = "unsent"
    """Nor did clients send any."""


class Results(msgspec.Struct, kw_only=True):
    """Everything played so far, and what it comes to."""

    settings: Settings
    verdicts: list[Verdict] = []
    last: dict[str, float | int] = {}
    cells: list[Played] = []

    def left(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those of the cells that have not been played."""
        done = {played.cell for played in self.cells}
        return [cell for cell in cells if cell.name not in done]

    def add(self, cell: Cell, runs: Sequence[Summary]) -> Verdict:
        """A cell has been played; what came of it."""
        self.cells.append(slim(Played(cell.name, cell.engines, cell.roles, cell.load, list(runs))))
        self.verdicts = [verdict(each, self.settings.ours) for each in self.cells]
        self.last = last_line(self.verdicts)
        return self.verdicts[-1]


def slim(played: Played) -> Played:
    """Without what fills files: single engines, stretches of time, curves."""

    def slimmed(run: Summary) -> Summary:
        timed = ("ttft_ms", "tpot_ms", "e2e_ms", "waited_ms")
        spreads = {name: msgspec.structs.replace(getattr(run, name), curve=[]) for name in timed}
        return msgspec.structs.replace(run, over_time=[], engines=[], **spreads)

    return msgspec.structs.replace(played, runs=[slimmed(run) for run in played.runs])


def save(results: Results, path: Path) -> None:
    """Replaces the file in one step: an interrupted run leaves the former one."""
    replace_file(path, as_json(results))


def load(path: Path, settings: Settings) -> Results:
    """Results of a run that was interrupted. Raises ConfigError if there are none, or of other settings."""
    results = read_results(path, Results, f"there is no {path}: leave --resume out", wanted="to go on with")
    check_settings(path, results.settings, settings)
    return results
