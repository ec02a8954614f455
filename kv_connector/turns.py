"""Pure: which prompts stand still for a step so that others go on that are due earlier, and which are not begun yet.

See docs/decisions/0031-due-times.md.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from vllm_llmd.due import Rank
from vllm_llmd.names import RequestId

LOOKED_AT: Final = 8
"""So many of those that wait are looked at before a step, in their order."""


class Prompt(NamedTuple):
    """One that is to be computed, by its blocks' hashes, in order; of these, `computed` need not be."""

    request: RequestId
    rank: Rank
    hashes: Sequence[Any]
    computed: int


def follows(waiting: Prompt, begun: Prompt) -> bool:
    """Whether the next block that it would compute is one that the other will."""
    at = max(waiting.computed, begun.computed)
    return at < min(len(waiting.hashes), len(begun.hashes)) and waiting.hashes[at] == begun.hashes[at]


class Turns:
    """What has been begun, as of the latest step, and for whom that held others."""

    def __init__(self) -> None:
        self._begun: Sequence[Prompt] = ()
        self._held_for: set[RequestId] = set()

    def held(self, begun: Sequence[Prompt], waiting: Sequence[Prompt]) -> set[RequestId]:
        """Of the begun ones, those that the coming step leaves out. Who waits is told in order, if it could begin.

        Whom others follow is due when they are, if that is earlier. Nobody is left out in a step after one that left
        out others for nothing: then there was no room for those for whom it did.
        """
        for_nothing = bool(self._held_for) and self._held_for <= {each.request for each in waiting}
        self._begun, self._held_for = begun, set()
        if for_nothing or not begun:
            return set()
        ranks = {each.request: each.rank for each in begun}
        others = []
        for each in waiting:
            led_by = [other.request for other in begun if follows(each, other)]
            ranks.update({leader: ranks[leader].joined(each.rank) for leader in led_by})
            others += [] if led_by else [each]
        all_ranks = {*ranks.values(), *(each.rank for each in others)}
        held = {request for request, rank in ranks.items() if any(each.before(rank) for each in all_ranks)}
        if len(held) == len(ranks):
            begun_ranks = ranks.values()
            self._held_for = {each.request for each in others if any(each.rank.before(rank) for rank in begun_ranks)}
        return held

    def must_wait(self, waiting: Prompt) -> bool:
        """Whether it is not to be begun in this step, since it would compute what another one has begun to."""
        return any(follows(waiting, each) for each in self._begun if each.request != waiting.request)
