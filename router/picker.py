"""Chooses among candidates: the longest cached prefix, most of it on the GPU, the least load, and chance. Pure.

Candidates are spoken of by their places in the columns.
"""

import random

from vllm_llmd.router.candidates import Candidates, Counts, Places


def destinations(candidates: Candidates) -> Places:
    """Who may decode."""
    return candidates.roster.decoders


def sources(candidates: Candidates, destination: int) -> Places:
    """Who may prefill for `destination`."""
    prefillers, kinds = candidates.roster.prefillers, candidates.roster.kinds
    found: Places = prefillers[(kinds[prefillers] == kinds[destination]) & (prefillers != destination)]
    return found


def best(eligible: Places, candidates: Candidates, rng: random.Random) -> int | None:
    """Who of the eligible has the longest prefix in tokens, most of it on the GPU, the least load; of equals any."""
    if not len(eligible):
        return None
    cached = prefix_tokens(candidates)[eligible]
    equals = eligible[cached == cached.max()]
    for cost in (candidates.offloaded_blocks, candidates.queue_ms):
        here = cost[equals]
        equals = equals[here == here.min()]
    return int(equals[rng.randrange(len(equals))])


def prefix_tokens(candidates: Candidates) -> Counts:
    return candidates.prefix_blocks * candidates.roster.block_sizes
