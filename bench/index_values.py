"""What the parts of `make bench-index` are asked and what they answer."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """`resident` blocks of all engines together. `engine_python` is an interpreter that has vLLM."""

    resident: int
    rounds: int
    calls: int
    engine_python: str
    model: str


@dataclass
class Arms:
    """Values of ours and of Dynamo's, taken in turn. `more_is_better` for rates."""

    what: str
    unit: str
    more_is_better: bool
    ours: list[float] = field(default_factory=list)
    dynamo: list[float] = field(default_factory=list)

    @property
    def speed_up(self) -> float:
        ours, theirs = statistics.median(self.ours), statistics.median(self.dynamo)
        return ours / theirs if self.more_is_better else theirs / ours

    def row(self) -> str:
        arms = f"{shown(self.ours):>30s} {shown(self.dynamo):>30s}"
        return f"{self.what:34s} {arms} {self.unit:9s} {self.speed_up:6.2f}x"


@dataclass
class Found:
    """What a part has measured: its figures of the last line, arms for the table, and whatever else is worth a line.

    `details` go to the results file alone.
    """

    figures: dict[str, float]
    arms: list[Arms] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    details: dict[str, object] = field(default_factory=dict)


def shown(values: Sequence[float]) -> str:
    """Median and quartiles."""
    low, median, high = quartiles(values)
    return f"{median:.4g} [{low:.4g}, {high:.4g}]"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def in_turn(*pairs: tuple[list[float], Callable[[], object]]) -> list[tuple[list[float], Callable[[], object]]]:
    """The arms of one round in the order to take them: by chance."""
    return random.sample(pairs, len(pairs))


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure_call(arms: Arms, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    """One call of either side, in microseconds."""
    for values, call in in_turn((arms.ours, ours), (arms.dynamo, theirs)):
        values.append(seconds(call) * 1e6)
