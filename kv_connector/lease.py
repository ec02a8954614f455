"""Pure lease arithmetic of the destination: until when, by its own clock, the source surely keeps blocks pinned.

The source holds an order's blocks until `lease_ms` after it last heard a renewal. The destination cannot know when
that was, only that it was not before it sent the renewal: so renewal `n`, once answered, covers `sent[n] + lease_ms`,
less a margin for two clocks that run at different speeds.
"""

DRIFT = 0.1
"""Share of a lease that the destination does not use."""

RENEWALS_PER_LEASE = 4


class LeaseView:
    """The destination's knowledge of one order's lease. Times in milliseconds of one monotonic clock."""

    def __init__(self, lease_ms: float) -> None:
        self._lease_ms = lease_ms
        self._sent: dict[int, float] = {}
        self._count = 0
        self._next_due_ms = 0.0
        self.held_until_ms: float | None = None

    def renewal_due(self, now_ms: float) -> bool:
        return now_ms >= self._next_due_ms

    def renew(self, now_ms: float) -> int:
        """Note that a renewal leaves now; returns its number, from 1."""
        self._count += 1
        self._sent[self._count] = now_ms
        self._next_due_ms = now_ms + self._lease_ms / RENEWALS_PER_LEASE
        return self._count

    def answered(self, n: int, held: bool) -> None:
        """The source answered renewal `n`; `held`: it holds blocks under this lease. Unknown `n` is ignored."""
        sent_ms = self._sent.pop(n, None)
        self._sent = {k: v for k, v in self._sent.items() if k > n}
        if sent_ms is None or not held:
            return
        until_ms = sent_ms + self._lease_ms * (1 - DRIFT)
        self.held_until_ms = max(until_ms, self.held_until_ms or until_ms)

    def covers(self, at_ms: float) -> bool:
        """Whether what was read by `at_ms` was surely still pinned then."""
        return self.held_until_ms is not None and at_ms <= self.held_until_ms
