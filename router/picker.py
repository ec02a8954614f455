"""Chooses among candidates: the longest cached prefix, then the least load, then chance. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_llmd.names import EngineId, Role


@dataclass(frozen=True)
class Candidate:
    """An engine that is ready and serves the model. `prefix_blocks`: how much of the prompt it has cached."""

    engine: EngineId
    role: Role
    fingerprint: str
    block_size: int
    prefix_blocks: int
    queue_ms: float


def destinations(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Who may decode: engines with a role for it, or anyone when there is none."""
    return [candidate for candidate in candidates if candidate.role != "prefill"] or candidates


def sources(candidates: Sequence[Candidate], destination: Candidate) -> Sequence[Candidate]:
    """Who may prefill for `destination`."""
    return [
        candidate
        for candidate in candidates
        if candidate.role == "prefill"
        and candidate.fingerprint == destination.fingerprint
        and candidate.engine != destination.engine
    ]


def best(candidates: Sequence[Candidate], rng: random.Random) -> Candidate | None:
    """The candidate with the longest prefix in tokens; of equals the least loaded; of equals any."""
    return min(
        candidates,
        key=lambda candidate: (-candidate.prefix_blocks * candidate.block_size, candidate.queue_ms, rng.random()),
        default=None,
    )
