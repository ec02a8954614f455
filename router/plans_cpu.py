"""The search for the cheapest plan, compiled by numba; its plain twin is `plans.cheapest`, its prices those of `plans`.

Most pairs are never priced. An engine that does not exist, as cheap in every respect as the cheapest of the sources in
that respect, is set against each destination: where even that pair costs more than the best plan so far, no pair with
this destination has to be looked at. The same is done to the sources, then again among those that are left, for as
long as it helps.
"""

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels.memory_cpu import compiled_with
from vllm_llmd.router import costs, plans
from vllm_llmd.router.candidates import Candidates, Loads, Places, RateColumns, Roster, Rows
from vllm_llmd.router.plans import (
    ALONE,
    FETCHED,
    MAY_BE_NEGATIVE,
    MORE_IS_CHEAPER,
    PREFILLED,
    Ask,
    Asked,
    Party,
    Terms,
    alone,
    barred,
    fetched,
    pair_ms,
    party,
    prefilled,
)
from vllm_llmd.router.policy import Choice
from vllm_llmd.router.request import Facts

compiled = compiled_with(__file__, plans.__file__, costs.__file__)

Numbers = npt.NDArray[np.float64]

FIELDS: Final = len(Party._fields)
PARTY_ROW: Final = np.dtype([(name, np.float64) for name in Party._fields])
OWN, CACHED, HELD = (Party._fields.index(name) for name in ("own", "cached", "held"))

NOBODY: Final = -1
EVERYONE: Final = np.empty(0, np.bool_)
"""Stands for everyone being allowed."""

NOTHING: Final = np.empty(0)
"""Stands for no terms of others."""

FEW: Final = 256
"""Pairs that are priced sooner than looked through for some that need not be."""


class Pair(NamedTuple):
    """With its price. `at` decodes; it is nobody if there is no such pair."""

    ms: float
    at: int
    source: int


class Scratch(NamedTuple):
    """`parties` by place, with the two that do not exist in the last rows; `fields` are the same as numbers, by row.

    `places` have room for those of all destinations and all sources, shape (2, engines).
    """

    parties: Rows
    fields: Numbers
    places: Places
    terms: Numbers


class Search:
    """Keeps arrays of the largest fleet asked for so far. Not to be called from two threads at once."""

    def __init__(self) -> None:
        self._scratch = _scratch(0)

    def cheapest(self, asked: Asked) -> Choice | None:
        """The plan with the lowest price; None if no plan is left."""
        of, roster = asked.candidates, asked.candidates.roster
        if self._scratch.places.shape[1] < len(of):
            self._scratch = _scratch(len(of))
        places, starts = roster.parted
        kind, at, source = _cheapest(
            *asked.ask,
            roster.rows,
            of.loads.rows,
            of.rates.rows,
            np.ascontiguousarray(of.prefix_blocks),
            np.ascontiguousarray(of.offloaded_blocks),
            asked.chance_ms,
            np.sum([*asked.more.values()], 0) if asked.more else NOTHING,
            roster.decoders,
            places,
            starts,
            EVERYONE if asked.allowed is None else np.ascontiguousarray(asked.allowed, np.bool_),
            self._scratch.parties,
            self._scratch.fields,
            self._scratch.places,
            self._scratch.terms,
        )
        return None if kind == NOBODY else self._choice(asked, kind, at, source)

    def _choice(self, asked: Asked, kind: int, at: int, source: int) -> Choice:
        fields = self._scratch.fields
        terms = dict(zip(Terms._fields, self._scratch.terms.tolist(), strict=True))
        for name, column in asked.more.items():
            terms[name] = float(column[at])
        prices = plans.Prices(asked)
        if kind == ALONE:
            return Choice(at, terms=terms, prices=prices)
        if kind == PREFILLED:
            waited_for = min(float(fields[at, OWN]), float(costs.CHUNK_TOKENS))
            return Choice(at, source, None, waited_for, terms, prices)
        held = float(fields[source, HELD])
        return Choice(at, source, int(held), held - float(fields[at, CACHED]), terms, prices)


def _scratch(engines: int) -> Scratch:
    fields = np.zeros((engines + 2, FIELDS))
    terms = np.zeros(len(Terms._fields))
    return Scratch(fields.view(PARTY_ROW).ravel(), fields, np.zeros((2, engines), np.intp), terms)


def compile_ahead() -> None:
    """Compiles the search or loads it from numba's cache, so that no request has to wait for that."""
    nobody = Roster.of([], None)
    none = np.zeros(0, np.int64)
    candidates = Candidates(nobody, none, none, none, Loads.of([]), RateColumns.of([]))
    Search().cheapest(Asked(Facts("", None, b"", b"", 1, None), candidates, {}, None, np.zeros(0), 1))


@compiled
def _cheapest(
    prompt: float,
    output: float,
    reuse: float,
    least: float,
    new: float,
    crowd: float,
    roster: Any,
    loads: Any,
    rates: Any,
    prefix_blocks: Any,
    offloaded_blocks: Any,
    chance_ms: Numbers,
    more_ms: Numbers,
    decoders: Places,
    remotes: Places,
    starts: Any,
    allowed: Any,
    parties: Any,
    fields: Numbers,
    places: Places,
    terms: Numbers,
) -> tuple[int, int, int]:
    """The kind of the plan, NOBODY if there is none; the destination; the source."""
    ask = Ask(prompt, output, reuse, least, new, crowd)
    prunable = _note_parties(
        ask, parties, fields, roster, loads, rates, prefix_blocks, offloaded_blocks, chance_ms, more_ms
    )
    best_ms, kind, at, source = _best_alone(ask, parties, decoders, allowed)
    for first in range(0, len(starts) - 1, 3):
        for each in (PREFILLED, FETCHED):
            begin, end = starts[first + each], starts[first + each + 1]
            downs = _let_through(places[0], remotes[starts[first] : starts[first + 1]], allowed)
            across = _let_through(places[1], remotes[begin:end], EVERYONE)
            pair = _best_pair(each, ask, parties, fields, downs, across, best_ms, prunable)
            if pair.at != NOBODY and (pair.ms < best_ms or kind == NOBODY):
                best_ms, kind, at, source = pair.ms, each, pair.at, pair.source
    if kind == ALONE:
        _note(terms, alone(ask, parties[at]))
    elif kind == PREFILLED:
        _note(terms, prefilled(ask, parties[at], parties[source]))
    elif kind == FETCHED:
        _note(terms, fetched(ask, parties[at], parties[source]))
    return kind, at, source


@compiled
def _note_parties(
    ask: Ask,
    parties: Any,
    fields: Numbers,
    roster: Any,
    loads: Any,
    rates: Any,
    prefix_blocks: Any,
    offloaded_blocks: Any,
    chance_ms: Numbers,
    more_ms: Numbers,
) -> bool:
    """Whether pairs may be passed over."""
    prunable = True
    for place in range(len(roster)):
        blocks, offloaded = prefix_blocks[place], offloaded_blocks[place]
        found: Any = party(ask, roster[place], loads[place], rates[place], blocks, offloaded)
        for k in range(MAY_BE_NEGATIVE):
            fields[place, k] = found[k]
            prunable &= found[k] >= 0
        parties[place].more_ms = more_ms[place] if len(more_ms) else 0.0
        parties[place].chance_ms = chance_ms[place]
    return prunable


@compiled
def _let_through(into: Places, places: Places, allowed: Any) -> Places:
    """Those of the places that are allowed, written to `into`."""
    count = 0
    for i in range(len(places)):
        if len(allowed) == 0 or allowed[places[i]]:
            into[count] = places[i]
            count += 1
    return into[:count]


@compiled
def _best_alone(ask: Ask, parties: Any, decoders: Places, allowed: Any) -> tuple[float, int, int, int]:
    best_ms, best = np.inf, NOBODY
    for i in range(len(decoders)):
        at = parties[decoders[i]]
        if at.spared > 0 or (len(allowed) and not allowed[decoders[i]]):
            continue
        ms: float = sum(alone(ask, at)) + at.more_ms + at.chance_ms
        if ms < best_ms or best == NOBODY:
            best = decoders[i]
        if ms < best_ms:
            best_ms = ms
    return best_ms, ALONE if best != NOBODY else NOBODY, best, best


@compiled
def _best_pair(
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
    while prunable and best.ms < np.inf and len(downs) * len(across) > FEW:
        before = len(downs) + len(across)
        downs = downs[: _cut_downs(kind, ask, parties, downs, parties[no_source], best.ms)]
        _imagine(fields, downs, no_destination)
        across = across[: _cut_across(kind, ask, parties, parties[no_destination], across, best.ms)]
        _imagine(fields, across, no_source)
        if len(downs) + len(across) == before:
            break
    return _best_of(kind, ask, parties, downs, across, best)


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
    best = _best_of(kind, ask, parties, downs, across[first : first + 1], best)
    if best.at != NOBODY:
        i = _index(downs, best.at)
        best = _best_of(kind, ask, parties, downs[i : i + 1], across, best)
        j = _index(across, best.source)
        best = _best_of(kind, ask, parties, downs, across[j : j + 1], best)
    return best


@compiled
def _index(places: Places, place: int) -> int:
    for i in range(len(places)):
        if places[i] == place:
            return i
    return 0


@compiled
def _cut_downs(kind: int, ask: Ask, parties: Any, downs: Places, source: Any, bound_ms: float) -> int:
    """Keeps who may be in a pair below the bound. Returns how many."""
    count = 0
    for i in range(len(downs)):
        if pair_ms(kind, ask, parties[downs[i]], source) < bound_ms:
            downs[count] = downs[i]
            count += 1
    return count


@compiled
def _cut_across(kind: int, ask: Ask, parties: Any, at: Any, across: Places, bound_ms: float) -> int:
    """Keeps who may be in a pair below the bound. Returns how many."""
    count = 0
    for j in range(len(across)):
        if pair_ms(kind, ask, at, parties[across[j]]) < bound_ms:
            across[count] = across[j]
            count += 1
    return count


@compiled
def _best_of(kind: int, ask: Ask, parties: Any, downs: Places, across: Places, best: Pair) -> Pair:
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


@compiled
def _note(terms: Numbers, found: Terms) -> None:
    for k in range(len(found)):
        terms[k] = found[k]
