"""The search for the cheapest pair of a destination and a source, compiled by numba.

Most pairs are never priced. An engine that does not exist, as cheap in every respect as the cheapest of the sources in
that respect, is set against each destination: where even that pair costs more than the best plan so far, no pair with
this destination has to be looked at. The same is done to the sources, then again among those that are left, for as
long as it helps.
"""

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels.memory_cpu import compiled_with
from vllm_llmd.router.candidates import Places
from vllm_llmd.router.placement.plans import PREFILLED, SOURCES, barred, pair_ms
from vllm_llmd.router.placement.sides import MORE_IS_CHEAPER, Ask, Party

compiled = compiled_with(__file__, *SOURCES)

Numbers = npt.NDArray[np.float64]

FIELDS: Final = len(Party._fields)
NOBODY: Final = -1

DOWN: Final = 0
ACROSS: Final = 1
"""Destinations and sources, as in a table of pairs."""

FEW: Final = 256
"""Pairs that are priced sooner than looked through for some that need not be."""

MOST: Final = 128
MANY: Final = MOST * MOST
"""Of more pairs than these which may all be the cheapest, those of MOST of either side are priced: they are as good
as alike.
"""

HALVINGS: Final = 12
"""Of the range of lower bounds, to find who has the lowest."""


class Pair(NamedTuple):
    """With its price. `at` decodes; it is nobody if there is no such pair."""

    ms: float
    at: int
    source: int


@compiled
def best_pair(
    kind: int, ask: Ask, parties: Any, fields: Numbers, downs: Places, across: Places, bound_ms: float, prunable: bool
) -> Pair:
    """The cheapest pair below the bound; any, if all prices are infinite or no numbers, and so is the bound."""
    best = Pair(bound_ms, NOBODY, NOBODY)
    no_source, no_destination = len(parties) - 1, len(parties) - 2
    if prunable:
        downs, across = _not_all_barred(kind, ask, parties, downs, across)
        if len(downs) == 0 or len(across) == 0:
            return best
        _imagine(fields, downs, no_destination)
        _imagine(fields, across, no_source)
        if pair_ms(kind, ask, parties[no_destination], parties[no_source]) >= bound_ms:
            return best
        best = _good_pair(kind, ask, parties, downs, across, best)
        while best.ms < np.inf and len(downs) * len(across) > FEW:
            before = len(downs) + len(across)
            downs = _cut(DOWN, kind, ask, parties, downs, best.ms)
            _imagine(fields, downs, no_destination)
            across = _cut(ACROSS, kind, ask, parties, across, best.ms)
            _imagine(fields, across, no_source)
            if len(downs) + len(across) == before:
                break
        if len(downs) * len(across) > MANY:
            downs = _lowest(DOWN, kind, ask, parties, downs)
            across = _lowest(ACROSS, kind, ask, parties, across)
    elif len(downs) * len(across) > MANY and bound_ms < np.inf:
        downs, across = downs[:MOST], across[:MOST]
    return best_of(kind, ask, parties, downs, across, best)


@compiled
def _not_all_barred(kind: int, ask: Ask, parties: Any, downs: Places, across: Places) -> tuple[Places, Places]:
    """Without those who have too little to give, or lack too little, to make a pair with anybody."""
    if kind == PREFILLED:
        return downs[: _with_own(parties, downs, ask.least)], across
    least_cached, most_held = np.inf, -np.inf
    for i in range(len(downs)):
        least_cached = min(least_cached, parties[downs[i]].cached)
    for j in range(len(across)):
        most_held = max(most_held, parties[across[j]].held)
    down_count = 0
    for i in range(len(downs)):
        if most_held - parties[downs[i]].cached >= ask.least:
            downs[down_count] = downs[i]
            down_count += 1
    across_count = 0
    for j in range(len(across)):
        if parties[across[j]].held - least_cached >= ask.least:
            across[across_count] = across[j]
            across_count += 1
    return downs[:down_count], across[:across_count]


@compiled
def _with_own(parties: Any, downs: Places, least: float) -> int:
    count = 0
    for i in range(len(downs)):
        if parties[downs[i]].own >= least:
            downs[count] = downs[i]
            count += 1
    return count


@compiled
def _imagine(fields: Numbers, places: Places, into: int) -> None:
    """Writes to the row `into` what no pair with any of these can be cheaper than with."""
    fields[into] = np.inf
    for i in range(len(places)):
        for k in range(FIELDS):
            fields[into, k] = min(fields[into, k], fields[places[i], k])
    for k in MORE_IS_CHEAPER:
        most = -np.inf
        for i in range(len(places)):
            most = max(most, fields[places[i], k])
        fields[into, k] = most


@compiled
def _good_pair(kind: int, ask: Ask, parties: Any, downs: Places, across: Places, best: Pair) -> Pair:
    """A pair that is hard to beat: the source that would be the cheapest with the imagined destination, its cheapest
    destination, the cheapest source of that, and so on.
    """
    no_destination = parties[len(parties) - 2]
    least_ms, first = np.inf, 0
    for j in range(len(across)):
        ms: Any = pair_ms(kind, ask, no_destination, parties[across[j]])
        if ms < least_ms:
            least_ms, first = ms, j
    best = best_of(kind, ask, parties, downs, across[first : first + 1], best)
    if best.at != NOBODY:
        i = _index(downs, best.at)
        best = best_of(kind, ask, parties, downs[i : i + 1], across, best)
        j = _index(across, best.source)
        best = best_of(kind, ask, parties, downs, across[j : j + 1], best)
    return best


@compiled
def _index(places: Places, place: int) -> int:
    for i in range(len(places)):
        if places[i] == place:
            return i
    return 0


@compiled
def _from_ms(side: int, kind: int, ask: Ask, parties: Any, place: int) -> Any:
    """What no pair with this one can be cheaper than."""
    if side == DOWN:
        return pair_ms(kind, ask, parties[place], parties[len(parties) - 1])
    return pair_ms(kind, ask, parties[len(parties) - 2], parties[place])


@compiled
def _cut(side: int, kind: int, ask: Ask, parties: Any, places: Places, bound_ms: float) -> Places:
    """Those who may be in a pair below the bound."""
    count = 0
    for i in range(len(places)):
        if _from_ms(side, kind, ask, parties, places[i]) < bound_ms:
            places[count] = places[i]
            count += 1
    return places[:count]


@compiled
def _lowest(side: int, kind: int, ask: Ask, parties: Any, places: Places) -> Places:
    """At most MOST, with those who may be in the cheapest pairs, as far as some may be in cheaper ones than others."""
    low, high = np.inf, -np.inf
    for i in range(len(places)):
        from_ms: Any = _from_ms(side, kind, ask, parties, places[i])
        low, high = min(low, from_ms), max(high, from_ms)
    for _ in range(HALVINGS):
        middle, count = (low + high) / 2, 0
        for i in range(len(places)):
            count += _from_ms(side, kind, ask, parties, places[i]) <= middle
        low, high = (low, middle) if count > MOST else (middle, high)
    count = 0
    for i in range(len(places)):
        if _from_ms(side, kind, ask, parties, places[i]) <= low:
            places[count], places[i] = places[i], places[count]
            count += 1
    return places[:MOST]


@compiled
def best_of(kind: int, ask: Ask, parties: Any, downs: Places, across: Places, best: Pair) -> Pair:
    """The cheapest of all these pairs, if it is cheaper than the best."""
    best_ms, best_at, best_source = best
    for i in range(len(downs)):
        at = parties[downs[i]]
        for j in range(len(across)):
            source = parties[across[j]]
            if downs[i] == across[j] or barred(kind, ask, at, source):
                continue
            ms: Any = pair_ms(kind, ask, at, source)
            if ms < best_ms:
                best_ms, best_at, best_source = ms, downs[i], across[j]
            elif best_at == NOBODY and best_ms == np.inf:
                best_at, best_source = downs[i], across[j]
    return Pair(best_ms, best_at, best_source)
