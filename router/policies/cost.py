"""The plan that adds the least latency to all requests, in predicted milliseconds. Pure.

Terms of other packages join it by entry points in `vllm_llmd.terms`.
"""

import random
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from vllm_llmd.router import policies
from vllm_llmd.router.candidates import Candidates, Milliseconds
from vllm_llmd.router.placement.plans import Asked
from vllm_llmd.router.placement.plans_cpu import Search
from vllm_llmd.router.policy import Choice, Policy, PolicySettings
from vllm_llmd.router.request import Facts

TERMS: Final = "vllm_llmd.terms"

Term = Callable[[Facts, Candidates], Milliseconds]
"""What it costs to decode at each candidate, beside what this package thinks of."""

JITTER_MS: Final = 1e-6
"""By so much plans may differ and still be equals, among whom chance decides."""

CHANCES_PER_ENGINE: Final = 64
"""So many numbers are drawn that one request says nothing of the next."""

WORST_MS: Final = 1e12


class Cost:
    def __init__(self, settings: PolicySettings, terms: Mapping[str, Term]) -> None:
        self._min_remote_tokens = settings.min_remote_tokens
        self._chances = Chances(settings.rng)
        self._terms = terms
        self._search = Search()

    def choose(self, facts: Facts, candidates: Candidates) -> Choice | None:
        if not len(candidates.roster.decoders):
            return None
        more = {f"{name}_ms": _usable(term(facts, candidates)) for name, term in self._terms.items()}
        chance_ms = self._chances.ms(len(candidates))
        return self._search.cheapest(Asked(facts, candidates, more, chance_ms, self._min_remote_tokens))


class Chances:
    """What makes equals differ. Numbers are drawn once; each request gets some of them in a row."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._drawn_ms = np.zeros(0)

    def ms(self, engines: int) -> Milliseconds:
        """One for each engine. Not to be written to."""
        if len(self._drawn_ms) < CHANCES_PER_ENGINE * engines:
            draws = np.random.default_rng(self._rng.getrandbits(64))
            self._drawn_ms = JITTER_MS * draws.random(2 * CHANCES_PER_ENGINE * engines)
        first = int(self._rng.random() * (len(self._drawn_ms) - engines))
        found: Milliseconds = self._drawn_ms[first : first + engines]
        return found


def _usable(term: Milliseconds) -> Milliseconds:
    found: Milliseconds = np.nan_to_num(term, nan=0.0, posinf=WORST_MS, neginf=0.0)
    return found


def cost(settings: PolicySettings) -> Policy:
    """Raises ConfigError if what another package adds cannot be had."""
    return Cost(settings, policies.loaded(TERMS))
