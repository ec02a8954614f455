"""How often, and how soon, a request that failed on one engine is tried on another. Pure.

All retries together are a share of recent requests: when the whole fleet fails, trying again would only multiply the
load that it fails under.
"""

import random
from collections import deque
from typing import Final

WINDOW_MS: Final = 10_000.0
RESERVE: Final = 10
"""Retries that are always there in a window, so that a router with little to do can retry at all."""

FIRST_PAUSE_MS: Final = 20.0
LONGEST_PAUSE_MS: Final = 500.0


def pause_ms(retry: int, rng: random.Random) -> float:
    """How long to wait before the `retry`-th retry of a request, from 1: anything up to a limit that doubles."""
    return rng.uniform(0.0, min(FIRST_PAUSE_MS * 2 ** min(retry - 1, 30), LONGEST_PAUSE_MS))


class RetryBudget:
    """Retries in a window, against `percent` of the requests that came in it or were under way when it began."""

    def __init__(self, percent: int) -> None:
        self._share = percent / 100
        self._under_way = 0
        self._ended: deque[tuple[float, int]] = deque()
        self._retried_ms: deque[float] = deque()

    def began(self) -> None:
        """A request has come."""
        self._under_way += 1

    def ended(self, now_ms: float) -> None:
        """A request is over. Those that end in the same second are kept as one entry."""
        self._under_way -= 1
        second = now_ms // 1000
        if self._ended and self._ended[-1][0] == second:
            self._ended[-1] = (second, self._ended[-1][1] + 1)
        else:
            self._ended.append((second, 1))
            self._pass_over(now_ms)

    def take(self, now_ms: float) -> bool:
        """Whether one more retry is within the budget; if so, it is counted."""
        self._pass_over(now_ms)
        requests = self._under_way + sum(count for _, count in self._ended)
        if self._share == 0 or len(self._retried_ms) >= RESERVE + self._share * requests:
            return False
        self._retried_ms.append(now_ms)
        return True

    def _pass_over(self, now_ms: float) -> None:
        while self._retried_ms and now_ms - self._retried_ms[0] > WINDOW_MS:
            self._retried_ms.popleft()
        while self._ended and now_ms - self._ended[0][0] * 1000 > WINDOW_MS:
            self._ended.popleft()
