"""Chooses among candidates: the longest cached prefix, then the least load, then chance. Pure.

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
    """Who of the eligible has the longest prefix in tokens; of equals the least loaded; of equals any."""
    if not len(eligible):
        return None
    cached = prefix_tokens(candidates)[eligible]
    longest = eligible[cached == cached.max()]
    queue_ms = candidates.queue_ms[longest]
    equals = longest[queue_ms == queue_ms.min()]
    return int(equals[rng.randrange(len(equals))])


def prefix_tokens(candidates: Candidates) -> Counts:
    return candidates.prefix_blocks * candidates.roster.block_sizes
