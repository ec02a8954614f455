"""Where a prefix was sent before, from the text alone: what routers do that hear nothing of the engines' caches. Pure.

Text is cut into chunks of so many characters, named by chained hashes; each name remembers the engines it was sent to.
If loads are far apart, the least busy engine is picked; else whoever was sent most of the text, if that is at least
half of it; else whoever was sent the least text so far.
"""

import random
from collections import Counter, OrderedDict
from typing import Final

import numpy as np

from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Candidates, Places
from vllm_llmd.router.picker import PickInTurn, least
from vllm_llmd.router.policy import Policy, PolicySettings
from vllm_llmd.router.request import Facts

CHUNK_BYTES: Final = 128
CHUNKS_KEPT: Final = 1_000_000
"""About what a tree of 128 MiB of text holds."""

MATCHED_FROM: Final = 0.5
APART_BY: Final = 32
APART_TIMES: Final = 1.1
"""The defaults of the cache-aware policy of SGLang's router: a share, a number of requests, and a factor."""


class ApproximatePrefix:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._sent: OrderedDict[int, set[EngineId]] = OrderedDict()
        self._text_sent: Counter[EngineId] = Counter()

    def pick(self, eligible: Places, facts: Facts, candidates: Candidates) -> int:
        chunks, requests = chunk_names(facts), candidates.loads.requests
        fewest, most = requests[eligible].min(), requests[eligible].max()
        if most - fewest > APART_BY and most > fewest * APART_TIMES:
            return least(eligible, requests, self._rng)
        ids = [candidates.roster.id(int(place)) for place in eligible]
        matched = self._matched(chunks, ids)
        if chunks and max(matched.values()) >= MATCHED_FROM * len(chunks):
            return least(eligible, self._spread(eligible, len(requests), [-matched[each] for each in ids]), self._rng)
        return least(
            eligible, self._spread(eligible, len(requests), [self._text_sent[each] for each in ids]), self._rng
        )

    def _matched(self, chunks: list[int], ids: list[EngineId]) -> dict[EngineId, int]:
        """How many chunks from the start each of the engines was sent."""
        matched, still = dict.fromkeys(ids, 0), set(ids)
        for depth, chunk in enumerate(chunks, 1):
            still &= self._sent.get(chunk, set())
            if not still:
                break
            matched.update(dict.fromkeys(still, depth))
        return matched

    def placed(self, engine: EngineId, facts: Facts) -> None:
        for chunk in chunk_names(facts):
            sent = self._sent.setdefault(chunk, set())
            self._sent.move_to_end(chunk)
            self._text_sent[engine] += engine not in sent
            sent.add(engine)
        while len(self._sent) > CHUNKS_KEPT:
            for forgetting in self._sent.popitem(last=False)[1]:
                self._text_sent[forgetting] -= 1

    @staticmethod
    def _spread(eligible: Places, engines: int, values: list[int]) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        column = np.zeros(engines, np.int64)
        column[eligible] = values
        return column


def chunk_names(facts: Facts) -> list[int]:
    """A name for each whole chunk of the prompt's text, which stands for all before it, too."""
    names, name = [], hash(facts.seed)
    for first in range(0, len(facts.text) - CHUNK_BYTES + 1, CHUNK_BYTES):
        name = hash((name, facts.text[first : first + CHUNK_BYTES]))
        names.append(name)
    return names


def approximate_prefix(settings: PolicySettings) -> Policy:
    """Sources are remembered apart from destinations."""
    rng = settings.rng
    return PickInTurn(ApproximatePrefix(rng), ApproximatePrefix(rng), settings.min_remote_tokens)
