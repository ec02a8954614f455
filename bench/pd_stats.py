"""Medians, quartiles and pairs. Pure."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from pd_values import Ttft


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `count` values."""

    low: float
    median: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """None for no values at all."""
        if not values:
            return None
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high, len(values))


@dataclass(frozen=True)
class Pair:
    """The same load in the same round of the same engines: by an arm, and by one engine alone. Milliseconds."""

    arm: float
    one: float

    @property
    def ratio(self) -> float:
        return self.arm / self.one

    @property
    def extra(self) -> float:
        return self.arm - self.one


def pairs(samples: Iterable[Ttft], arm: str) -> list[Pair]:
    """Every measurement of `arm` with the yardstick of its own block, turn and round."""
    rounds: dict[tuple[object, ...], dict[str, float]] = {}
    for each in samples:
        key = (each.model, each.transport, each.block, each.turn, each.round, each.load)
        rounds.setdefault(key, {})[each.arm] = each.ttft_ms
    return [Pair(found[arm], found["one"]) for found in rounds.values() if arm in found and "one" in found]


def median_of(value: Callable[[Pair], float], found: Sequence[Pair]) -> float | None:
    return statistics.median(map(value, found)) if found else None


def early_share(samples: Iterable[Ttft]) -> list[float]:
    """Of each measurement that counted them: bytes that had arrived before prefill ended, of all that were read."""
    return [each.kv_early / each.kv_bytes for each in samples if each.kv_bytes and each.kv_early is not None]
