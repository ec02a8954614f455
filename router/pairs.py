"""The cheapest of all pairs of a destination and a source, without looking at most of them. Pure.

Whoever prices pairs says for every destination, and for every source, what no pair with it can fall below. Pairs of the
few lowest are priced first; then those of whoever may still be cheaper than the cheapest of these: none is missed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vllm_llmd.router.candidates import Milliseconds, Places

FIRST: Final = 8
MOST: Final = 64
"""Of more than these that may all still be the cheapest, these many are looked at: they are as good as alike."""

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Sides:
    """Who may be a destination, who a source, and the lowest price of any pair with each. Neither side is empty.

    Pairs that cost `bound_ms` or more are of no use.
    """

    destinations: Places
    sources: Places
    destination_from_ms: Milliseconds
    source_from_ms: Milliseconds
    bound_ms: float


@dataclass(frozen=True)
class Pair:
    destination: int
    source: int
    ms: float


Price = Callable[[Places, Places], Matrix]
"""Prices all pairs of some destinations (down) and some sources (across); infinite where a pair is out of question."""


def cheapest(sides: Sides, price: Price) -> Pair | None:
    """The cheapest pair; None if none is of use."""
    if min(sides.destination_from_ms.min(), sides.source_from_ms.min()) >= sides.bound_ms:
        return None
    destinations = _lowest(sides.destinations, sides.destination_from_ms, FIRST)
    sources = _lowest(sides.sources, sides.source_from_ms, FIRST)
    found = _cheapest(destinations, sources, price, sides.bound_ms)
    bound_ms = sides.bound_ms if found is None else found.ms
    more_destinations = _below(sides.destinations, sides.destination_from_ms, bound_ms)
    more_sources = _below(sides.sources, sides.source_from_ms, bound_ms)
    if _within(more_destinations, destinations) and _within(more_sources, sources):
        return found
    return _cheapest(more_destinations, more_sources, price, bound_ms) or found


def _cheapest(destinations: Places, sources: Places, price: Price, bound_ms: float) -> Pair | None:
    if not len(destinations) or not len(sources):
        return None
    matrix = price(destinations, sources)
    row, column = divmod(int(matrix.argmin()), len(sources))
    ms = float(matrix[row, column])
    return Pair(int(destinations[row]), int(sources[column]), ms) if ms < bound_ms else None


def _lowest(places: Places, from_ms: Milliseconds, count: int) -> Places:
    if len(places) <= count:
        return places
    found: Places = places[np.argpartition(from_ms, count)[:count]]
    return found


def _below(places: Places, from_ms: Milliseconds, bound_ms: float) -> Places:
    below = from_ms < bound_ms
    return _lowest(places[below], from_ms[below], MOST)


def _within(some: Places, others: Places) -> bool:
    return len(some) <= len(others) and set(some.tolist()) <= set(others.tolist())
