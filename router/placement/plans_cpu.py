"""The search for the cheapest plan, compiled by numba; its plain twin is `plans.cheapest`, its prices those of `plans`.

It notes what every engine brings into a plan, then looks at those that do everything, then at pairs (`pairs_cpu`).
"""

from typing import Any, Final, NamedTuple

import numpy as np

from vllm_llmd.kernels.memory_cpu import compiled_with
from vllm_llmd.router import costs
from vllm_llmd.router.candidates import Candidates, Loads, Places, RateColumns, Roster, Rows
from vllm_llmd.router.placement import pairs_cpu, plans
from vllm_llmd.router.placement.pairs_cpu import FIELDS, NOBODY, Numbers, Pair, best_of, best_pair
from vllm_llmd.router.placement.plans import (
    ALONE,
    FETCHED,
    PREFILLED,
    SOURCES,
    Asked,
    Plan,
    Terms,
    alone,
    fetched,
    prefilled,
    total_ms,
    undoubted,
    with_slo,
)
from vllm_llmd.router.placement.sides import MAY_BE_NEGATIVE, Ask, Party, party
from vllm_llmd.router.placement.work import work_ms
from vllm_llmd.router.policy import Choice
from vllm_llmd.router.request import Facts

compiled = compiled_with(__file__, pairs_cpu.__file__, *SOURCES)

PARTY_ROW: Final = np.dtype([(name, np.float64) for name in Party._fields])
OWN, CACHED, HELD = (Party._fields.index(name) for name in ("own", "cached", "held"))

NO_BLOCKS: Final = np.empty(0, np.int64)
"""Stands for none that are coming."""

NOTHING: Final = np.empty(0)
"""Stands for no terms of others."""


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
            tuple(asked.ask),  # a tuple without names is passed in a third of the time
            roster.rows,
            of.loads.rows,
            of.rates.rows,
            np.ascontiguousarray(of.prefix_blocks),
            np.ascontiguousarray(of.offloaded_blocks),
            NO_BLOCKS if of.coming_blocks is None else np.ascontiguousarray(of.coming_blocks),
            asked.chance_ms,
            np.sum([*asked.more.values()], 0) if asked.more else NOTHING,
            roster.decoders,
            places,
            starts,
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
        held = float(fields[source, HELD])
        work = work_ms(asked, Plan(kind, at, source), int(held))
        if kind == ALONE:
            return Choice(at, work_ms=work.destination, terms=terms, prices=prices)
        if kind == PREFILLED:
            until, waited_for = None, min(float(fields[at, OWN]), float(costs.CHUNK_TOKENS))
        else:
            until, waited_for = int(held), held - float(fields[at, CACHED])
        return Choice(at, source, until, waited_for, work.destination, work.source, terms, prices)


def _scratch(engines: int) -> Scratch:
    fields = np.zeros((engines + 2, FIELDS))
    terms = np.zeros(len(Terms._fields))
    return Scratch(fields.view(PARTY_ROW).ravel(), fields, np.zeros((2, engines), np.intp), terms)


def compile_ahead() -> None:
    """Compiles the search or loads it from numba's cache, so that no request has to wait for that."""
    nobody = Roster.of([], None)
    none = np.zeros(0, np.int64)
    candidates = Candidates(nobody, none, none, none, Loads.of([]), RateColumns.of([]))
    Search().cheapest(Asked(Facts("", None, b"", b"", 1, None), candidates, {}, np.zeros(0), 1))


@compiled
def _cheapest(
    asked: Any,
    roster: Any,
    loads: Any,
    rates: Any,
    prefix_blocks: Any,
    offloaded_blocks: Any,
    coming_blocks: Any,
    chance_ms: Numbers,
    more_ms: Numbers,
    decoders: Places,
    remotes: Places,
    starts: Any,
    parties: Any,
    fields: Numbers,
    places: Places,
    terms: Numbers,
) -> tuple[int, int, int]:
    """The kind of the plan, NOBODY if there is none; the destination; the source."""
    ask = Ask(*asked)
    prunable = _note_parties(
        ask, parties, fields, roster, loads, rates, prefix_blocks, offloaded_blocks, coming_blocks, chance_ms, more_ms
    )
    best_ms, kind, at, source = _best_alone(ask, parties, decoders)
    for first in range(0, len(starts) - 1, 3):
        for each in (PREFILLED, FETCHED):
            begin, end = starts[first + each], starts[first + each + 1]
            downs = _copied(remotes[starts[first] : starts[first + 1]], places[0])
            across = _copied(remotes[begin:end], places[1])
            pair = best_pair(each, ask, parties, fields, downs, across, best_ms, prunable)
            if pair.at != NOBODY and (pair.ms < best_ms or kind == NOBODY):
                best_ms, kind, at, source = pair.ms, each, pair.at, pair.source
    if kind == ALONE:
        sure = undoubted(ask)
        for first in range(0, len(starts) - 1, 3):
            downs = remotes[starts[first] : starts[first + 1]]
            across = remotes[starts[first + FETCHED] : starts[first + FETCHED + 1]]
            pair = best_of(FETCHED, sure, parties, downs[downs == at], across, Pair(best_ms, NOBODY, NOBODY))
            if pair.ms < best_ms:
                best_ms, kind, source = pair.ms, FETCHED, pair.source
    if kind == ALONE:
        _note(terms, with_slo(ask, alone(ask, parties[at])))
    elif kind == PREFILLED:
        _note(terms, with_slo(ask, prefilled(ask, parties[at], parties[source])))
    elif kind == FETCHED:
        _note(terms, with_slo(ask, fetched(ask, parties[at], parties[source])))
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
    coming_blocks: Any,
    chance_ms: Numbers,
    more_ms: Numbers,
) -> bool:
    """Whether pairs may be passed over."""
    prunable = True
    for place in range(len(roster)):
        blocks, offloaded = prefix_blocks[place], offloaded_blocks[place]
        coming: Any = coming_blocks[place] if len(coming_blocks) else 0
        found: Any = party(ask, roster[place], loads[place], rates[place], blocks, offloaded, coming)
        for k in range(MAY_BE_NEGATIVE):
            fields[place, k] = found[k]
            prunable &= found[k] >= 0
        parties[place].more_ms = more_ms[place] if len(more_ms) else 0.0
        parties[place].chance_ms = chance_ms[place]
    return prunable


@compiled
def _copied(places: Places, into: Places) -> Places:
    """To be left with fewer and fewer of them."""
    for i in range(len(places)):
        into[i] = places[i]
    return into[: len(places)]


@compiled
def _best_alone(ask: Ask, parties: Any, decoders: Places) -> tuple[float, int, int, int]:
    best_ms, best = np.inf, NOBODY
    for i in range(len(decoders)):
        at = parties[decoders[i]]
        if at.spared > 0:
            continue
        ms: float = total_ms(ask, alone(ask, at)) + at.more_ms + at.chance_ms
        if ms < best_ms or best == NOBODY:
            best = decoders[i]
        if ms < best_ms:
            best_ms = ms
    return best_ms, ALONE if best != NOBODY else NOBODY, best, best


@compiled
def _note(terms: Numbers, found: Terms) -> None:
    for k in range(len(found)):
        terms[k] = found[k]
