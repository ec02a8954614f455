"""Every way to serve one request, priced: on one engine, prefilled by a source, or with a prefix from a source. Pure.

The functions that price are written once for columns of engines and for one engine: `plans_cpu` compiles them.
`cheapest` here prices everything, and is the plain twin of its search.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels.memory_cpu import usable_in_kernels
from vllm_llmd.router import costs
from vllm_llmd.router.candidates import Candidates, Milliseconds
from vllm_llmd.router.placement import misses, sides
from vllm_llmd.router.placement.sides import Ask, Party, party
from vllm_llmd.router.request import Facts

SOURCES: Final = (__file__, sides.__file__, costs.__file__, misses.__file__)
"""What prices are compiled from."""

Mask = npt.NDArray[np.bool_]

ALONE: Final = 0
PREFILLED: Final = 1
FETCHED: Final = 2
"""The kinds of plans."""


class Terms(NamedTuple):
    """What a plan costs, in milliseconds. A term that a kind of plan does not have is 0. The last follows from all."""

    queue_ms: Milliseconds
    join_ms: Milliseconds
    prefill_ms: Milliseconds
    reload_ms: Milliseconds
    transfer_ms: Milliseconds
    cold_ms: Milliseconds
    congestion_ms: Milliseconds
    prefill_interference_ms: Milliseconds
    decode_ms: Milliseconds
    decode_interference_ms: Milliseconds
    memory_ms: Milliseconds
    blocks_ms: Milliseconds
    slo_ms: Milliseconds


UNTIL_FIRST_BYTE: Final = (
    "queue_ms",
    "join_ms",
    "prefill_ms",
    "reload_ms",
    "transfer_ms",
    "cold_ms",
    "blocks_ms",
)
"""The terms that the request itself waits for its first token."""

_UNTIL_FIRST_BYTE: Final = tuple(Terms._fields.index(name) for name in UNTIL_FIRST_BYTE)

# --- prices, of columns or of one engine ------------------------------------------------------------------------------


@usable_in_kernels
def alone(ask: Ask, at: Party) -> Terms:
    """An engine that does everything."""
    return Terms(
        queue_ms=at.queue_ms,
        join_ms=0.0 * at.own,
        prefill_ms=at.prefill_ms,
        reload_ms=at.reload_ms,
        transfer_ms=0.0 * at.own,
        cold_ms=at.cold_ms,
        congestion_ms=costs.congestion_ms(at.prefill_ms, at.ahead, ask.crowd),
        prefill_interference_ms=costs.prefill_interference_ms(at.prefill_ms, at.decoding),
        decode_ms=at.decode_ms,
        decode_interference_ms=at.decode_interference_ms,
        memory_ms=at.memory_ms,
        blocks_ms=at.blocks_ms,
        slo_ms=0.0 * at.own,
    )


@usable_in_kernels
def prefilled(ask: Ask, at: Party, source: Party) -> Terms:
    """The source computes what it lacks of the prompt, and the destination reads it all."""
    return Terms(
        queue_ms=source.queue_ms,
        join_ms=at.join_ms,
        prefill_ms=source.prefill_ms,
        reload_ms=source.reload_ms,
        transfer_ms=costs.transfer_ms(at.own, source.prefill_ms, at.transfer_ms, at.transfer_token_ms),
        cold_ms=source.cold_ms,
        congestion_ms=costs.congestion_ms(source.prefill_ms, source.ahead, ask.crowd),
        prefill_interference_ms=costs.prefill_interference_ms(source.prefill_ms, source.decoding),
        decode_ms=at.decode_ms,
        decode_interference_ms=at.decode_interference_ms,
        memory_ms=at.memory_ms + source.source_memory_ms,
        blocks_ms=at.blocks_ms,
        slo_ms=0.0 * at.own,
    )


@usable_in_kernels
def fetched(ask: Ask, at: Party, source: Party) -> Terms:
    """The destination reads what the source has, which it orders with its next step, and computes the rest."""
    ordered_ms = at.next_ms + source.ready_ms
    arrives_ms = ordered_ms + at.transfer_ms + np.maximum(source.given - at.cached, 0.0) * at.transfer_token_ms
    prefill_ms = costs.prefill_ms(ask.prompt - source.held, source.held, at.token_ms, at.context_ms)
    return Terms(
        queue_ms=at.queue_ms,
        join_ms=0.0 * at.own,
        prefill_ms=prefill_ms,
        reload_ms=0.0 * at.own,
        transfer_ms=np.maximum(arrives_ms - at.queue_ms, 0.0),
        cold_ms=at.cold_ms,
        congestion_ms=costs.congestion_ms(prefill_ms, at.ahead, ask.crowd),
        prefill_interference_ms=costs.prefill_interference_ms(prefill_ms, at.decoding),
        decode_ms=at.decode_ms,
        decode_interference_ms=at.decode_interference_ms,
        memory_ms=at.memory_ms,
        blocks_ms=at.blocks_ms,
        slo_ms=0.0 * at.own,
    )


@usable_in_kernels
def slo_ms(ask: Ask, terms: Terms) -> Milliseconds:
    """All that a plan costs is in vain if an objective is missed, and that is so likely. It rises with every term."""
    first_ms = 0.0 * terms.queue_ms
    for k in _UNTIL_FIRST_BYTE:
        first_ms = first_ms + terms[k]
    found: Milliseconds = misses.missed(ask, first_ms, terms.decode_ms) * sum(terms)
    return found


@usable_in_kernels
def total_ms(ask: Ask, terms: Terms) -> Milliseconds:
    """Of a plan whose other terms are told. Who names no objective does not pay for `slo_ms`, in time either."""
    total: Milliseconds = sum(terms)  # type: ignore[assignment]
    if ask.ttft_ms == np.inf and ask.answer_ms == np.inf:
        return total
    return total + slo_ms(ask, terms)


@usable_in_kernels
def with_slo(ask: Ask, terms: Terms) -> Terms:
    """All terms of a plan, as they are shown."""
    if ask.ttft_ms == np.inf and ask.answer_ms == np.inf:
        return terms
    return Terms(*(*terms[:-1], slo_ms(ask, terms)))


@usable_in_kernels
def pair_ms(kind: int, ask: Ask, at: Party, source: Party) -> Milliseconds:
    """What is compared. A prefix is fetched only if that is cheaper by more than predictions are off: what is gained is
    uncertain, and a second copy is made for certain.
    """
    if kind == PREFILLED:
        total: Milliseconds = total_ms(ask, prefilled(ask, at, source)) + at.more_ms + (at.chance_ms + source.chance_ms)
    else:
        total = ask.doubt * (total_ms(ask, fetched(ask, at, source)) + at.more_ms) + (at.chance_ms + source.chance_ms)
    return total


@usable_in_kernels
def undoubted(ask: Ask) -> Ask:
    """For who would compute the prefix otherwise: to fetch it makes the same second copy."""
    prompt, output, reuse, least, crowd, _, ttft_ms, answer_ms, ttft_error, answer_error = ask
    return Ask(prompt, output, reuse, least, crowd, 1.0, ttft_ms, answer_ms, ttft_error, answer_error)


@usable_in_kernels
def barred(kind: int, ask: Ask, at: Party, source: Party) -> Mask:
    """Whether too little is transferred for this pair, or too much left to compute for who is spared that."""
    if kind == PREFILLED:
        return at.own < ask.least
    rest_is_long = ask.prompt - source.held >= ask.least
    return (source.held - at.cached < ask.least) | (at.spared * rest_is_long > 0)


# --- one request ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Asked:
    """What is to be priced: `more` are terms of a destination, `chance_ms` makes equals differ.

    Whoever is to supply KV supplies `min_remote_tokens` at least.
    """

    facts: Facts
    candidates: Candidates
    more: Mapping[str, Milliseconds]
    chance_ms: Milliseconds
    min_remote_tokens: int

    @property
    def ask(self) -> Ask:
        candidates, output = self.candidates, self.candidates.output_tokens
        if self.facts.output_tokens is not None:
            output = min(output, self.facts.output_tokens)
        prompt = float(max(self.facts.prompt_tokens, 1))
        loads = candidates.loads
        crowd = float(np.maximum(loads.requests - loads.decoding, 0.0) @ candidates.roster.computing)
        return Ask(
            prompt,
            float(output),
            float(candidates.reuse),
            float(self.min_remote_tokens),
            crowd,
            float(candidates.doubt),
            *misses.objectives(self.facts, candidates, float(output)),
        )

    @property
    def parties(self) -> Party:
        """All candidates, as columns."""
        of = self.candidates
        blocks = (each.astype(np.float64) for each in (of.prefix_blocks, of.offloaded_blocks, of.coming))
        found = party(self.ask, of.roster, of.loads, of.rates, *blocks)
        return found._replace(more_ms=sum(self.more.values(), found.more_ms), chance_ms=self.chance_ms)


@dataclass(frozen=True)
class Plan:
    """A kind of plan, and the places of who has a part in it: the source is the destination itself if it is alone."""

    kind: int
    destination: int
    source: int


def cheapest(asked: Asked) -> Plan | None:
    """The plan with the lowest price; None if no plan is left. What is no number is as dear as can be.

    If that is an engine alone, it fetches where it gains anything by that.
    """
    best_ms, best = np.inf, None
    for plans, found_ms in priced(asked):
        prices = np.where(np.isnan(found_ms), np.inf, found_ms)
        if len(plans) and (best is None or prices.min() < best_ms):
            best_ms, best = prices.min(), plans[int(prices.argmin())]
    if best is None or best.kind != ALONE:
        return best
    ask, parties, place = undoubted(asked.ask), asked.parties, best.destination
    for sources in (each.everyone for each in asked.candidates.roster.remotes if place in each.decoders):
        at, source = _at(parties, place), _at(parties, sources)
        found_ms = pair_ms(FETCHED, ask, at, source)
        prices = np.where(barred(FETCHED, ask, at, source) | (sources == place), np.inf, found_ms)
        if np.nanmin(prices, initial=np.inf) < best_ms:
            best_ms, best = np.nanmin(prices), Plan(FETCHED, place, int(sources[np.nanargmin(prices)]))
    return best


def priced(asked: Asked) -> Iterator[tuple[list[Plan], Milliseconds]]:
    """All plans of one kind, and what each costs, kind by kind."""
    roster, parties = asked.candidates.roster, asked.parties
    eligible = [place for place in roster.decoders.tolist() if not parties.spared[place]]
    prices = total_ms(asked.ask, alone(asked.ask, parties)) + parties.more_ms + parties.chance_ms
    yield [Plan(ALONE, place, place) for place in eligible], prices[eligible]
    for remotes in roster.remotes:
        down, across = remotes.decoders, remotes.everyone
        for kind, sources in (PREFILLED, remotes.prefillers), (FETCHED, across):
            at, source = _at(parties, down[:, None]), _at(parties, sources[None, :])
            out = barred(kind, asked.ask, at, source) | (down[:, None] == sources)
            prices = pair_ms(kind, asked.ask, at, source)[~out]
            places = np.argwhere(~out).tolist()
            yield [Plan(kind, int(down[i]), int(sources[j])) for i, j in places], prices


def _at(parties: Party, places: npt.NDArray[np.intp] | int) -> Party:
    return Party(*(column[places] for column in parties))


class Prices(Mapping[str, Milliseconds]):
    """What it would cost to have each candidate do everything, by term. Reckoned when looked at."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked

    @cached_property
    def _terms(self) -> Mapping[str, Milliseconds]:
        ask = self._asked.ask
        return {**with_slo(ask, alone(ask, self._asked.parties))._asdict(), **self._asked.more}

    def __getitem__(self, name: str) -> Milliseconds:
        return self._terms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._terms)

    def __len__(self) -> int:
        return len(self._terms)
