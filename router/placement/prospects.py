"""What a request can have at once, and what it would save to wait for an engine that is saturated. Pure.

A policy says where the request would best go. If that engine is saturated while others have room, the policy is asked
again among those: what it says then is what can begin at once, and the difference in price is what waiting is worth.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vllm_llmd.router.candidates import Candidates, Roster
from vllm_llmd.router.decide import decision_of
from vllm_llmd.router.members.membership import Engine
from vllm_llmd.router.placement.filters import decoding, prefilling
from vllm_llmd.router.policy import Choice, Policy
from vllm_llmd.router.request import Facts

IsSaturated = Callable[[Engine], bool]


@dataclass(frozen=True)
class Wait:
    """Going to `engine`, which would compute `tokens` of the prompt, costs `saves_ms` less than what can begin now."""

    engine: Engine
    tokens: int
    saves_ms: float


@dataclass(frozen=True)
class Prospect:
    """`choice` can begin at once, on `engines`: those that compute for it. `wait` is what may be better."""

    choice: Choice
    engines: tuple[Engine, ...]
    wait: Wait | None = None


def prospect(facts: Facts, candidates: Candidates, policy: Policy, is_saturated: IsSaturated) -> Prospect | None:
    """None if nobody can take the request. Where all are saturated, or none is, it is what the policy says."""
    best = policy.choose(facts, candidates)
    if best is None:
        return None
    computing = _computing(best, candidates.roster)
    busy = next((engine for engine in computing if is_saturated(engine)), None)
    if busy is None:
        return Prospect(best, computing)
    roster = _with_room(candidates.roster, is_saturated)
    now = policy.choose(facts, replace(candidates, roster=roster)) if len(roster.decoders) else None
    if now is None:
        return Prospect(best, computing)
    engines = _computing(now, candidates.roster)
    if not best.terms or not now.terms:  # it does not reckon in milliseconds, so waiting has no price
        return Prospect(now, engines)
    tokens = decision_of(best, facts, candidates).prefill_tokens.get(busy.info.id, 0)
    return Prospect(now, engines, Wait(busy, tokens, sum(now.terms.values()) - sum(best.terms.values())))


def _computing(choice: Choice, roster: Roster) -> tuple[Engine, ...]:
    """Who gives time to it. A source that gives only what it has cached does not."""
    destination = roster.engines[choice.destination]
    if choice.source is None or choice.until is not None:
        return (destination,)
    return destination, roster.engines[choice.source]


def _with_room(roster: Roster, is_saturated: IsSaturated) -> Roster:
    room = np.array([not is_saturated(engine) for engine in roster.engines], bool)
    return prefilling(decoding(roster, room), room)
