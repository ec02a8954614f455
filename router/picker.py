"""Who of the candidates may do what, and how one of several is picked. Pure.

Candidates are spoken of by their places in the columns.
"""

import random
from typing import Protocol, runtime_checkable

from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Candidates, Column, Counts, Places
from vllm_llmd.router.policy import Choice
from vllm_llmd.router.request import Facts


def destinations(candidates: Candidates) -> Places:
    """Who may decode."""
    return candidates.roster.decoders


def sources(candidates: Candidates, destination: int) -> Places:
    """Who may prefill for `destination`."""
    prefillers, kinds = candidates.roster.prefillers, candidates.roster.kinds
    found: Places = prefillers[(kinds[prefillers] == kinds[destination]) & (prefillers != destination)]
    return found


def least(eligible: Places, cost: Column | Counts, rng: random.Random) -> int:
    """Any of those of the eligible, at least one, whose cost is the least. `cost` has a number for every candidate."""
    equals = narrowed(eligible, cost)
    return int(equals[rng.randrange(len(equals))])


def narrowed(eligible: Places, cost: Column | Counts) -> Places:
    """Those of the eligible, at least one, whose cost is the least."""
    here = cost[eligible]
    found: Places = eligible[here == here.min()]
    return found


class Pick(Protocol):
    """One way to pick an engine, whatever for."""

    def pick(self, eligible: Places, facts: Facts, candidates: Candidates) -> int:
        """One of the eligible, of whom there is at least one."""


@runtime_checkable
class RemembersPicked(Protocol):
    """A way to pick that keeps state of what was placed."""

    def placed(self, engine: EngineId, facts: Facts) -> None:
        """The request has gone to this engine, for what such an engine is picked for."""


class PickInTurn:
    """A policy that picks a destination, and then by another pick a source, if enough of the prompt is not cached."""

    def __init__(self, destination: Pick, source: Pick, min_remote_tokens: int) -> None:
        self._destination = destination
        self._source = source
        self._min_remote_tokens = min_remote_tokens

    def choose(self, facts: Facts, candidates: Candidates) -> Choice | None:
        eligible = destinations(candidates)
        if not len(eligible):
            return None
        destination = self._destination.pick(eligible, facts, candidates)
        if facts.prompt_tokens - int(candidates.prefix_tokens[destination]) < self._min_remote_tokens:
            return Choice(destination)
        eligible = sources(candidates, destination)
        source = self._source.pick(eligible, facts, candidates) if len(eligible) else None
        return Choice(destination, source)

    def placed(self, facts: Facts, candidates: Candidates, choice: Choice) -> None:
        for pick, place in ((self._destination, choice.destination), (self._source, choice.source)):
            if place is not None and isinstance(pick, RemembersPicked):
                pick.placed(candidates.roster.id(place), facts)
