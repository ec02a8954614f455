"""Who of the candidates may do what, beyond what rosters say: one place for all policies. Pure.

A policy sees only who may: what bars an engine takes it out of the roster's places, not out of the columns.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from vllm_llmd.router.candidates import Candidates, Places, Remotes, Roster
from vllm_llmd.router.policy import Choice, Policy, note_placed
from vllm_llmd.router.request import Facts

GROUP: Final = "vllm_llmd.filters"

Mask = npt.NDArray[np.bool_]
"""Yes or no for every candidate, shape (engines,)."""

Filter = Callable[[Facts, Candidates], Mask]
"""Who of the candidates may decode."""


class Filtered:
    """A policy that sees only who all filters let through."""

    def __init__(self, policy: Policy, filters: Mapping[str, Filter]) -> None:
        self._policy = policy
        self._filters = filters

    def choose(self, facts: Facts, candidates: Candidates) -> Choice | None:
        may_decode = np.ones(len(candidates), bool)
        for lets_through in self.lets_through(facts, candidates).values():
            may_decode &= lets_through
        return self._policy.choose(facts, replace(candidates, roster=decoding(candidates.roster, may_decode)))

    def placed(self, facts: Facts, candidates: Candidates, choice: Choice) -> None:
        note_placed(self._policy, facts, candidates, choice)

    def lets_through(self, facts: Facts, candidates: Candidates) -> dict[str, Mask]:
        """What each filter says, by its name."""
        return {name: np.asarray(each(facts, candidates), bool) for name, each in self._filters.items()}


def decoding(roster: Roster, may_decode: Mask) -> Roster:
    """The roster with fewer that may decode. Who prefills, or gives KV away, still does."""
    return replace(
        roster,
        decoders=_kept(roster.decoders, may_decode),
        remotes=tuple(replace(each, decoders=_kept(each.decoders, may_decode)) for each in roster.remotes),
    )


def prefilling(roster: Roster, may_prefill: Mask) -> Roster:
    """The roster with fewer that compute prompts for others. They still give away what they have cached."""

    def fewer(remotes: Remotes) -> Remotes:
        return replace(remotes, prefillers=_kept(remotes.prefillers, may_prefill))

    return replace(
        roster,
        prefillers=_kept(roster.prefillers, may_prefill),
        remotes=tuple(map(fewer, roster.remotes)),
    )


def _kept(places: Places, may: Mask) -> Places:
    found: Places = places[may[places]]
    return found
