"""What needs no index: engines in turn, by chance, and the least busy of all or of two. Pure."""

import random

from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Candidates, Places
from vllm_llmd.router.picker import PickInTurn, least
from vllm_llmd.router.policy import Policy, PolicySettings
from vllm_llmd.router.request import Facts


class InTurn:
    def __init__(self) -> None:
        self._count = 0

    def pick(self, eligible: Places, facts: Facts, candidates: Candidates) -> int:
        return int(eligible[self._count % len(eligible)])

    def placed(self, engine: EngineId, facts: Facts) -> None:
        self._count += 1


class ByChance:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, eligible: Places, facts: Facts, candidates: Candidates) -> int:
        return int(eligible[self._rng.randrange(len(eligible))])


class LeastRequests:
    """By requests in the engine, those included that were just sent there; of `among` engines drawn by chance, or all.

    Requests are what routers without an index count.
    """

    def __init__(self, rng: random.Random, among: int | None = None) -> None:
        self._rng = rng
        self._among = among

    def pick(self, eligible: Places, facts: Facts, candidates: Candidates) -> int:
        if self._among is not None and self._among < len(eligible):
            eligible = eligible[self._rng.sample(range(len(eligible)), self._among)]
        return least(eligible, candidates.loads.requests, self._rng)


def round_robin(settings: PolicySettings) -> Policy:
    return PickInTurn(InTurn(), InTurn(), settings.min_remote_tokens)


def by_chance(settings: PolicySettings) -> Policy:
    pick = ByChance(settings.rng)
    return PickInTurn(pick, pick, settings.min_remote_tokens)


def least_requests(settings: PolicySettings) -> Policy:
    pick = LeastRequests(settings.rng)
    return PickInTurn(pick, pick, settings.min_remote_tokens)


def power_of_two(settings: PolicySettings) -> Policy:
    pick = LeastRequests(settings.rng, among=2)
    return PickInTurn(pick, pick, settings.min_remote_tokens)
