"""Every way to serve one request, priced: on one engine, prefilled by a source, or with a prefix from a source. Pure.

Prices are sums of the terms in `costs`, as columns; pairs are priced only as far as `pairs` asks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vllm_llmd.router import costs, pairs
from vllm_llmd.router.candidates import Candidates, Column, Milliseconds, Places
from vllm_llmd.router.pairs import Matrix, Pair, Sides
from vllm_llmd.router.policy import Choice
from vllm_llmd.router.request import Facts

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Asked:
    """What is to be priced: `more` are terms of a destination, `jitter_ms` is chance. Filters bar all but `allowed`.

    Whoever is to supply KV supplies `min_remote_tokens` at least.
    """

    facts: Facts
    candidates: Candidates
    more: Mapping[str, Milliseconds]
    allowed: Mask | None
    jitter_ms: Milliseconds
    min_remote_tokens: int


class Plans:
    """All plans for one request. Columns are over all candidates, whether they may do it or not."""

    def __init__(self, asked: Asked) -> None:
        candidates = asked.candidates
        loads, rates, sizes = candidates.loads, candidates.rates, candidates.roster.block_sizes
        self._asked = asked
        self._prompt = float(max(asked.facts.prompt_tokens, 1))
        self._cached = np.minimum(candidates.prefix_tokens, self._prompt - 1)
        self._own = self._prompt - self._cached
        self._batch = loads.batch
        output = candidates.output_tokens
        if asked.facts.output_tokens is not None:
            output = min(output, asked.facts.output_tokens)
        decode_ms = costs.decode_ms(output, loads, rates)
        new_tokens = self._own + output
        self._reload_ms = costs.reload_ms((candidates.offloaded_blocks * sizes).astype(np.float64), rates)
        self._queue_ms = costs.queue_ms(loads, rates)
        self._prefill_ms = costs.prefill_ms(self._own, self._cached, rates)
        self.stays: dict[str, Milliseconds] = {
            "decode_ms": decode_ms,
            "decode_interference_ms": costs.decode_interference_ms(output, loads, rates),
            "memory_ms": costs.memory_ms(new_tokens, candidates, candidates.reuse, rates),
            "blocks_ms": costs.full_ms(new_tokens, candidates, decode_ms),
            **asked.more,
        }
        """What a destination costs, whoever computes the prompt."""
        self._stays_ms = _total(self.stays) + asked.jitter_ms

    def cheapest(self) -> Choice | None:
        """None if no plan is left."""
        best_ms, choice = self._cheapest_alone()
        for remotes in self._asked.candidates.roster.remotes:
            destinations = self._let_through(remotes.decoders)
            prefilled = self._prefilled(destinations, remotes.prefillers, best_ms)
            if prefilled is not None:
                best_ms, choice = prefilled.ms, self._prefilled_choice(prefilled)
            fetched = self._fetched(destinations, remotes.everyone, best_ms)
            if fetched is not None:
                best_ms, choice = fetched.ms, self._fetched_choice(fetched)
        return choice

    def _let_through(self, places: Places) -> Places:
        allowed = self._asked.allowed
        return places if allowed is None else places[allowed[places]]

    # --- alone --------------------------------------------------------------------------------------------------

    @cached_property
    def alone(self) -> dict[str, Milliseconds]:
        """The terms of each candidate that does everything."""
        interference_ms = costs.prefill_interference_ms(self._prefill_ms, self._asked.candidates.loads)
        return {
            "queue_ms": self._queue_ms,
            "prefill_ms": self._prefill_ms,
            "reload_ms": self._reload_ms,
            "cold_ms": self._asked.candidates.rates.cold_ms,
            "prefill_interference_ms": interference_ms,
            **self.stays,
        }

    @cached_property
    def _spared(self) -> Mask:
        """Who is not to compute what it lacks of the prompt, since others are there for that."""
        helped = self._asked.candidates.roster.helped
        spared = np.zeros(len(self._own), bool)
        spared[helped] = self._own[helped] >= self._asked.min_remote_tokens
        return spared

    def _cheapest_alone(self) -> tuple[float, Choice | None]:
        roster = self._asked.candidates.roster
        eligible = self._let_through(roster.decoders)
        if len(roster.helped):
            eligible = eligible[~self._spared[eligible]]
        if not len(eligible):
            return np.inf, None
        total_ms = (_total(self.alone) + self._asked.jitter_ms)[eligible]
        at = int(total_ms.argmin())
        place = int(eligible[at])
        return float(total_ms[at]), Choice(place, terms=_at(self.alone, place), prices=self.alone)

    # --- prefilled by a source ----------------------------------------------------------------------------------

    @cached_property
    def _supplies_ms(self) -> Milliseconds:
        """What a source costs that computes whatever it lacks of the prompt."""
        interference_ms = costs.prefill_interference_ms(self._prefill_ms, self._asked.candidates.loads)
        memory_ms = costs.memory_ms(
            self._own, self._asked.candidates, self._asked.candidates.reuse, self._asked.candidates.rates
        )
        jitter_ms = self._asked.jitter_ms
        return self._queue_ms + self._prefill_ms + self._reload_ms + interference_ms + memory_ms + jitter_ms

    @cached_property
    def _join_ms(self) -> Milliseconds:
        return costs.join_ms(self._asked.candidates.loads, self._asked.candidates.rates)

    def _prefilled(self, destinations: Places, sources: Places, bound_ms: float) -> Pair | None:
        rates = self._asked.candidates.rates
        if len(sources):
            destinations = destinations[self._own[destinations] >= self._asked.min_remote_tokens]
        if not len(sources) or not len(destinations):
            return None
        stays_ms, supplies_ms = (self._stays_ms + self._join_ms)[destinations], self._supplies_ms[sources]
        own, latency_ms = self._own[destinations], rates.transfer_ms[destinations]
        token_ms = rates.transfer_token_ms[destinations]
        least_ms = costs.transfer_ms(own, self._prefill_ms[sources].max(), latency_ms, token_ms)
        sides = Sides(
            destinations,
            sources,
            destination_from_ms=stays_ms + least_ms + supplies_ms.min(),
            source_from_ms=supplies_ms + (stays_ms + least_ms).min(),
            bound_ms=bound_ms,
        )
        return pairs.cheapest(sides, self._prefilled_ms)

    def _prefilled_ms(self, destinations: Places, sources: Places) -> Matrix:
        down = destinations[:, None]
        price: Matrix = self._stays_ms[down] + self._join_ms[down] + self._supplies_ms[sources]
        price = price + self._transfer_ms(self._own[down], self._prefill_ms[sources], down)
        return np.where(down == sources, np.inf, price)

    def _transfer_ms(self, tokens: Column, source_prefill_ms: Column, destinations: Places) -> Milliseconds:
        rates = self._asked.candidates.rates
        latency_ms, token_ms = rates.transfer_ms[destinations], rates.transfer_token_ms[destinations]
        return costs.transfer_ms(tokens, source_prefill_ms, latency_ms, token_ms)

    def _prefilled_choice(self, pair: Pair) -> Choice:
        at, source = pair.destination, pair.source
        down = np.array([at])
        transfer_ms = self._transfer_ms(self._own[down], self._prefill_ms[source], down)
        terms = {
            "queue_ms": float(self._queue_ms[source] + self._join_ms[at]),
            "prefill_ms": float(self._prefill_ms[source]),
            "reload_ms": float(self._reload_ms[source]),
            "transfer_ms": float(transfer_ms[0]),
            "prefill_interference_ms": float(self._prefill_ms[source] * self._batch[source]),
        }
        waited_for = min(float(self._own[at]), costs.CHUNK_TOKENS)
        return Choice(at, source, None, waited_for, terms | _at(self.stays, at), self.alone)

    # --- with a prefix from a source ----------------------------------------------------------------------------

    @cached_property
    def _held(self) -> Column:
        """Tokens from the start of the prompt that an engine could give away at once."""
        candidates = self._asked.candidates
        sizes = candidates.roster.block_sizes
        found: Column = (
            np.minimum(candidates.prefix_blocks - candidates.offloaded_blocks, (int(self._prompt) - 1) // sizes) * sizes
        )
        return found

    def _fetched(self, destinations: Places, sources: Places, bound_ms: float) -> Pair | None:
        if not len(destinations):
            return None
        held, least_tokens = self._held[sources], self._cached[destinations].min() + self._asked.min_remote_tokens
        if held.max() < least_tokens:
            return None
        sources, rates = sources[held >= least_tokens], self._asked.candidates.rates
        down, latency_ms = destinations, rates.transfer_ms[destinations]
        wait_ms, stays_ms = self._queue_ms[down], self._stays_ms[down] + rates.cold_ms[down]
        held, queued_ms = self._held[sources], self._queue_ms[sources]
        rest_ms = self._rest_ms(held.max(), down)
        at_once_ms = (self._prompt - held) * rates.token_ms[down].min()
        sides = Sides(
            destinations,
            sources,
            destination_from_ms=np.maximum(wait_ms, queued_ms.min() + latency_ms) + rest_ms + stays_ms,
            source_from_ms=np.maximum(wait_ms.min(), queued_ms + latency_ms.min()) + at_once_ms + stays_ms.min(),
            bound_ms=bound_ms,
        )
        return pairs.cheapest(sides, self._fetched_ms)

    def _rest_ms(self, held: Column | np.float64, destinations: Places) -> Milliseconds:
        """Computing what comes after what is held, and what that takes from those that decode there."""
        rates = self._asked.candidates.rates
        context = (held + self._prompt) / 2000
        per_token_ms = rates.token_ms[destinations] + rates.context_ms[destinations] * context
        found: Milliseconds = (self._prompt - held) * per_token_ms * (1 + self._batch[destinations])
        return found

    def _fetched_ms(self, destinations: Places, sources: Places) -> Matrix:
        down, rates, asked = destinations[:, None], self._asked.candidates.rates, self._asked
        fetched = self._held[sources] - self._cached[down]
        arrives_ms = self._queue_ms[sources] + rates.transfer_ms[down] + fetched * rates.transfer_token_ms[down]
        price: Matrix = np.maximum(self._queue_ms[down], arrives_ms)
        price = price + self._rest_ms(self._held[sources], down) + self._stays_ms[down] + rates.cold_ms[down]
        rest_is_long = self._prompt - self._held[sources] >= asked.min_remote_tokens
        barred = self._spared[down] & rest_is_long
        return np.where(barred | (fetched < asked.min_remote_tokens) | (down == sources), np.inf, price)

    def _fetched_choice(self, pair: Pair) -> Choice:
        at, source, rates = pair.destination, pair.source, self._asked.candidates.rates
        down, held = np.array([at]), float(self._held[source])
        fetch_ms = rates.transfer_ms[at] + (held - self._cached[at]) * rates.transfer_token_ms[at]
        rest_ms = float(self._rest_ms(self._held[[source]], down)[0])
        prefill_ms = rest_ms / (1 + float(self._batch[at]))
        ready_ms = max(float(self._queue_ms[at]), float(self._queue_ms[source] + fetch_ms))
        terms = {
            "queue_ms": float(self._queue_ms[at]),
            "transfer_ms": ready_ms - float(self._queue_ms[at]),
            "prefill_ms": prefill_ms,
            "cold_ms": float(rates.cold_ms[at]),
            "prefill_interference_ms": rest_ms - prefill_ms,
        }
        fetched = held - float(self._cached[at])
        return Choice(at, source, int(held), fetched, terms | _at(self.stays, at), self.alone)


def _total(terms: Mapping[str, Milliseconds]) -> Milliseconds:
    total: Milliseconds = np.zeros(len(next(iter(terms.values()))))
    for term in terms.values():
        total += term
    return total


def _at(terms: Mapping[str, Milliseconds], place: int) -> dict[str, float]:
    return {name: float(term[place]) for name, term in terms.items()}
