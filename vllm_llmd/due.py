"""What a priority says of when a request is due, as routers say it and our connector understands it. Values.

A priority, as vLLM understands it, is a time in milliseconds since 1970, less `BAND_MS` for each band of urgency.
"""

from typing import Final, NamedTuple

BAND_MS: Final = 4_000_000_000_000
"""More than any time since 1970 until the year 2096, so that bands stay strict, and little enough that a thousand of
them can be said exactly in JSON."""

SINCE_MS: Final = 1_000_000_000_000
UNTIL_MS: Final = 3_900_000_000_000
"""Times from 2001 to 2093. Whatever else a priority amounts to is none of ours, but a client's own."""


class Rank(NamedTuple):
    """A band, of which less is more urgent, and a due time in it."""

    band: int
    due_ms: int

    def before(self, other: "Rank") -> bool:
        """Whether a request of this rank goes before a begun one of the other: due earlier, and no less urgent.

        That it is more urgent is not enough: what has been begun has blocks that others want, and gives them back by
        being done.
        """
        return self.band <= other.band and self.due_ms < other.due_ms

    def joined(self, other: "Rank") -> "Rank":
        """Of one who goes for both."""
        return Rank(min(self.band, other.band), min(self.due_ms, other.due_ms))


def rank_of(priority: int) -> Rank:
    """A client's own priority counts as a time before all times."""
    return Rank(priority // BAND_MS, priority % BAND_MS if _is_due(priority) else priority)


def once_answering(priority: int) -> int:
    """The priority of a request whose prompt has been computed: when it was due says nothing any more.

    It is before that of all whose prompts are not, so that for want of blocks these give way, and of those that answer
    whoever came last. A client's own priority stays.
    """
    return 0 if _is_due(priority) else priority


def _is_due(priority: int) -> bool:
    return SINCE_MS <= priority % BAND_MS < UNTIL_MS
