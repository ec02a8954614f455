"""Scores added up by weights, as llm-d's endpoint picker does by default: prefix 3, queue 2, KV cache use 2. Pure.

llm-d's default prefix scorer remembers where it has sent which prefix; this one is given the exact index.
"""

import random
from typing import Final

import numpy as np

from vllm_llmd.router.candidates import Candidates, Column, Places
from vllm_llmd.router.picker import PickInTurn, least
from vllm_llmd.router.policy import Policy, PolicySettings
from vllm_llmd.router.request import Facts

PREFIX_WEIGHT: Final = 3.0
QUEUE_WEIGHT: Final = 2.0
KV_USE_WEIGHT: Final = 2.0
"""Those of llm-d's default configuration."""


class Weighted:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, eligible: Places, facts: Facts, candidates: Candidates) -> int:
        loads = candidates.loads
        score = (
            PREFIX_WEIGHT * candidates.prefix_tokens / max(facts.prompt_tokens, 1)
            + QUEUE_WEIGHT * shortest_first(loads.waiting, eligible)
            + KV_USE_WEIGHT * np.minimum(loads.free_blocks / candidates.roster.num_blocks, 1.0)
        )
        return least(eligible, -score, self._rng)


def shortest_first(waiting: Column, eligible: Places) -> Column:
    """1 for the shortest queue of the eligible, 0 for the longest, and what lies between by its length."""
    shortest, longest = waiting[eligible].min(), waiting[eligible].max()
    if shortest == longest:
        return np.ones_like(waiting)
    score: Column = (longest - waiting) / (longest - shortest)
    return score


def weighted(settings: PolicySettings) -> Policy:
    pick = Weighted(settings.rng)
    return PickInTurn(pick, pick, settings.min_remote_tokens)
