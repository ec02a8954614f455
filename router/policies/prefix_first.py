"""The longest cached prefix, most of it on the GPU, the least load, and chance, in this order. Pure."""

import random
from typing import Final

from vllm_llmd.router.candidates import Candidates, Places
from vllm_llmd.router.picker import PickInTurn, least, narrowed
from vllm_llmd.router.policy import Policy, PolicySettings
from vllm_llmd.router.request import Facts

MS_PER_REQUEST: Final = 10.0
MS_PER_PREFILL_TOKEN: Final = 0.1
"""A request counts as much as a hundred prompt tokens: what both take of a step."""


class PrefixFirst:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, eligible: Places, facts: Facts, candidates: Candidates) -> int:
        equals = narrowed(eligible, -candidates.prefix_tokens)
        equals = narrowed(equals, candidates.offloaded_blocks)
        loads = candidates.loads
        queue_ms = loads.requests * MS_PER_REQUEST + loads.tokens * MS_PER_PREFILL_TOKEN
        return least(equals, queue_ms, self._rng)


def prefix_first(settings: PolicySettings) -> Policy:
    pick = PrefixFirst(settings.rng)
    return PickInTurn(pick, pick, settings.min_remote_tokens)
