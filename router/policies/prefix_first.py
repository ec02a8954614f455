"""The longest cached prefix, most of it on the GPU, the least load, and chance, in this order. Pure."""

import random

from vllm_llmd.router import costs
from vllm_llmd.router.candidates import Candidates, Places
from vllm_llmd.router.picker import PickInTurn, least, narrowed
from vllm_llmd.router.policy import Policy, PolicySettings
from vllm_llmd.router.request import Facts


class PrefixFirst:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, eligible: Places, facts: Facts, candidates: Candidates) -> int:
        equals = narrowed(eligible, -candidates.prefix_tokens)
        equals = narrowed(equals, candidates.offloaded_blocks)
        loads = candidates.loads
        return least(equals, costs.queue_ms(loads.requests, loads.tokens), self._rng)


def prefix_first(settings: PolicySettings) -> Policy:
    pick = PrefixFirst(settings.rng)
    return PickInTurn(pick, pick, settings.min_remote_tokens)
