"""Why an engine was no candidate for a request. Pure; asked only when a decision is explained."""

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Candidates
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.members.health import Circuit
from vllm_llmd.router.members.membership import Engine, State
from vllm_llmd.router.placement.filters import Filtered
from vllm_llmd.router.placement.rosters import may_take
from vllm_llmd.router.policy import Policy
from vllm_llmd.router.request import Facts


class Barred(NamedTuple):
    """An engine that was no candidate, or one that a filter did not let through."""

    engine: EngineId
    why: str


def barred(fleet: Fleet, facts: Facts, candidates: Candidates, tried: Collection[EngineId]) -> list[Barred]:
    """Everyone that was no candidate, in the order in which they joined. `tried` are those that it was tried on."""
    among = {engine.info.id for engine in candidates.roster.engines}
    others = (engine for engine in fleet.membership.all() if engine.info.id not in among)
    return [Barred(engine.info.id, _why(fleet, engine, facts, tried)) for engine in others]


def filtered(policy: Policy, facts: Facts, candidates: Candidates) -> list[Barred]:
    """Candidates that a filter keeps from decoding, once for each such filter."""
    if not isinstance(policy, Filtered):
        return []
    ids = [engine.info.id for engine in candidates.roster.engines]
    return [
        Barred(ids[place], f"filter {name}")
        for name, lets_through in policy.lets_through(facts, candidates).items()
        for place in np.flatnonzero(~lets_through).tolist()
    ]


def saturated(candidates: Candidates, is_saturated: Callable[[Engine], bool]) -> list[Barred]:
    """Candidates that a request does not go to while others have room; none of them where all are saturated."""
    engines = candidates.roster.engines
    found = [Barred(engine.info.id, "saturated") for engine in engines if is_saturated(engine)]
    return found if len(found) < len(engines) else []


def _why(fleet: Fleet, engine: Engine, facts: Facts, tried: Collection[EngineId]) -> str:
    """The first reason that there is."""
    if engine.state is not State.READY:
        return engine.state.value
    if engine.draining:
        return "draining"
    if not engine.info.serves(facts.model):
        return "other model"
    if facts.selector is not None and not facts.selector.matches(engine.info.labels):
        return "other labels"
    if not may_take(engine, fleet.rosters.wanted(facts)):
        return "context too short"
    if engine.info.id in tried:
        return "tried before"
    circuit = fleet.health.standing(engine.info.id).circuit
    if circuit is not Circuit.CLOSED:
        return f"circuit {circuit.value}"
    return "cannot go on with the stream"
