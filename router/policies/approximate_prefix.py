"""Where a prefix was sent before, from the text alone: what routers do that hear nothing of the engines' caches. Pure.

Text is cut into chunks of so many characters, named by chained hashes; each name remembers the engines it was sent to.
If loads are far apart, the least busy engine is picked; else whoever was sent most of the text, if that is at least
half of it; else whoever was sent the least text so far.
"""

import random
from collections import Counter, OrderedDict
from collections.abc import Set as AbstractSet
from typing import Final

import numpy as np

from vllm_llmd.kernels.hash_chain_cpu import piece_names, xxh64
from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Candidates, Counts, Places
from vllm_llmd.router.picker import PickInTurn, least
from vllm_llmd.router.policy import Policy, PolicySettings
from vllm_llmd.router.request import Facts, Latest

CHUNK_BYTES: Final = 128
CHUNKS_KEPT: Final = 1_000_000
"""About what a tree of 128 MiB of text holds."""

MATCHED_FROM: Final = 0.5
APART_BY: Final = 32
APART_TIMES: Final = 1.1
"""The defaults of the cache-aware policy of SGLang's router: a share, a number of requests, and a factor."""

NOBODY: Final[AbstractSet[EngineId]] = frozenset()


class ApproximatePrefix:
    """`latest` are the chunks of the latest request, which several may share."""

    def __init__(self, rng: random.Random, latest: Latest[list[int]]) -> None:
        self._rng = rng
        self._latest = latest
        self._sent: OrderedDict[int, set[EngineId]] = OrderedDict()
        self._text_sent: Counter[EngineId] = Counter()

    def pick(self, eligible: Places, facts: Facts, candidates: Candidates) -> int:
        chunks, requests = self._chunks(facts), candidates.loads.requests
        fewest, most = requests[eligible].min(), requests[eligible].max()
        if most - fewest > APART_BY and most > fewest * APART_TIMES:
            return least(eligible, requests, self._rng)
        matched = self._matched(chunks, candidates)
        if chunks and matched[eligible].max() >= MATCHED_FROM * len(chunks):
            return least(eligible, -matched, self._rng)
        return least(eligible, self._text_sent_to(eligible, candidates), self._rng)

    def _matched(self, chunks: list[int], candidates: Candidates) -> Counts:
        """How many chunks from the start each candidate was sent."""
        matched = np.zeros(len(candidates), np.int64)
        depth, still = 0, self._sent.get(chunks[0], NOBODY) if chunks else NOBODY
        while still:
            depth += 1
            further = still & self._sent.get(chunks[depth], NOBODY) if depth < len(chunks) else NOBODY
            if len(further) < len(still):
                for engine in still - further:
                    place = candidates.roster.place_of.get(engine)
                    if place is not None:
                        matched[place] = depth
            still = further
        return matched

    def _text_sent_to(self, eligible: Places, candidates: Candidates) -> Counts:
        sent = np.zeros(len(candidates), np.int64)
        sent[eligible] = [self._text_sent[candidates.roster.id(place)] for place in eligible.tolist()]
        return sent

    def placed(self, engine: EngineId, facts: Facts) -> None:
        sent, new = self._sent, 0
        for chunk in self._chunks(facts):
            known = sent.get(chunk)
            if known is None:
                sent[chunk] = {engine}
                new += 1
                continue
            sent.move_to_end(chunk)
            if engine not in known:
                known.add(engine)
                new += 1
        self._text_sent[engine] += new
        while len(self._sent) > CHUNKS_KEPT:
            for forgetting in self._sent.popitem(last=False)[1]:
                self._text_sent[forgetting] -= 1

    def _chunks(self, facts: Facts) -> list[int]:
        return self._latest.of(facts, lambda: chunk_names(facts))


def chunk_names(facts: Facts) -> list[int]:
    """A name for each whole chunk of the prompt's text, which stands for all before it, too."""
    whole = len(facts.text) // CHUNK_BYTES * CHUNK_BYTES
    names: list[int] = piece_names(facts.text[:whole], CHUNK_BYTES, xxh64(facts.seed, 0)).tolist()
    return names


def approximate_prefix(settings: PolicySettings) -> Policy:
    """Sources are remembered apart from destinations."""
    latest: Latest[list[int]] = Latest()
    destination, source = (ApproximatePrefix(settings.rng, latest) for _ in range(2))
    return PickInTurn(destination, source, settings.min_remote_tokens)
