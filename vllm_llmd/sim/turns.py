"""Whose turn it is among prompts that are computed in chunks: who is due later yields to those due earlier. Pure.

By `SimRequest.priority`: less goes first. A prompt that is being computed is held, with its blocks and its seat, while
one of less is to be computed. Who lacks what a prompt is about to compute waits for that, and holds nobody.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from vllm_llmd.sim.block_pool import BlockId, BlockPool
from vllm_llmd.sim.limits import Limits
from vllm_llmd.sim.requests import SimRequest

MOST_WAITING: Final = 8
"""So many of those that wait are looked at, in their order."""


class Turns:
    """Of one engine. `held` get no tokens in the step that has begun."""

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        self._limits = limits
        self._pool = pool
        self._in_vain = False
        self.held: frozenset[SimRequest] = frozenset()

    def begin(self, partial: Sequence[SimRequest], first_waiting: Iterable[SimRequest], seats: int) -> None:
        """Of `partial`, prompts that are being computed, some are held, unless that was in vain in the last step.

        `first_waiting` are in order; `seats` are how many of them could be admitted.
        """
        self.held = frozenset()
        if not partial or self._in_vain:
            return
        first = min(each.priority for each in partial)
        if seats > 0:
            first = min((first, *(each.priority for each in self._contenders(partial, first_waiting))))
        self.held = frozenset(each for each in partial if each.priority > first)

    def passes_over(self, request: SimRequest) -> bool:
        """Whether a waiting request waits for one that is held, while others behind it go on."""
        if not self.held or request.blocks:
            return False
        place = len(self._cached(request))
        return any(self._follows(request, place, each) for each in self.held)

    def end(self, computed: Iterable[SimRequest], admitted: bool) -> None:
        """`computed` get tokens in the step; `admitted` tells whether anybody is."""
        goes_on = admitted or any(each.computed < each.prompt_tokens for each in computed)
        self._in_vain = bool(self.held) and not goes_on

    def _contenders(self, partial: Sequence[SimRequest], waiting: Iterable[SimRequest]) -> Iterator[SimRequest]:
        """Those due before some of `partial`, for whom there are blocks; nobody passes one for whom there are none."""
        latest = max(each.priority for each in partial)
        for request in waiting:
            if request.priority >= latest:
                continue
            hits = [] if request.blocks else self._cached(request)
            if not request.blocks and any(self._follows(request, len(hits), each) for each in partial):
                continue
            needed = self._limits.blocks_of(request.total) - len(request.blocks) - len(hits)
            if needed > self._pool.free - self._pool.unheld(hits):
                return
            yield request

    def _cached(self, request: SimRequest) -> Sequence[BlockId]:
        return self._pool.cached(request.names, (request.total - 1) // self._limits.block_size)

    def _follows(self, request: SimRequest, place: int, partial: SimRequest) -> bool:
        """Whether the block at `place`, which the one lacks, is one that the other is about to compute."""
        size = self._limits.block_size
        end = min(partial.prompt_tokens // size, len(partial.names), len(request.names))
        return partial.computed // size <= place < end and request.names[place] == partial.names[place]
