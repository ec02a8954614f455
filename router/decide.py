"""HOT PATH: one request and the engines that could serve it -> where to decode and who supplies the KV. Pure."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_llmd.names import EngineId
from vllm_llmd.router import costs, picker
from vllm_llmd.router.candidates import Candidates
from vllm_llmd.router.request import Facts


@dataclass(frozen=True)
class Policy:
    """`min_remote_tokens`: with fewer uncached prompt tokens, the destination prefills by itself."""

    min_remote_tokens: int
    rng: random.Random


@dataclass(frozen=True)
class Decision:
    """`predicted_blocks` of the prompt are cached at `destination`, `claimed_blocks` if the index is right.

    `terms` are its costs in milliseconds.
    """

    destination: EngineId
    source: EngineId | None
    predicted_blocks: int
    claimed_blocks: int
    uncached_tokens: int
    terms: Mapping[str, float]


def decide(facts: Facts, candidates: Candidates, policy: Policy) -> Decision | None:
    """Where the request goes; None if there is no candidate."""
    destination = picker.best(picker.destinations(candidates), candidates, policy.rng)
    if destination is None:
        return None
    roster, predicted_blocks = candidates.roster, int(candidates.prefix_blocks[destination])
    uncached_tokens = max(facts.prompt_tokens - predicted_blocks * int(roster.block_sizes[destination]), 0)
    source = None
    if uncached_tokens >= policy.min_remote_tokens:
        source = picker.best(picker.sources(candidates, destination), candidates, policy.rng)
    queue_ms = float(candidates.queue_ms[destination])
    return Decision(
        destination=roster.id(destination),
        source=None if source is None else roster.id(source),
        predicted_blocks=predicted_blocks,
        claimed_blocks=int(candidates.claimed_blocks[destination]),
        uncached_tokens=uncached_tokens,
        terms={"queue_ms": queue_ms, "prefill_ms": costs.prefill_ms(uncached_tokens)},
    )
