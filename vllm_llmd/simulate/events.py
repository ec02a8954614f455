"""What is to happen when, in virtual time. Pure."""

import heapq
import itertools
from collections.abc import Callable
from typing import Any

_Entry = tuple[float, int, Callable[[Any], None], Any]


class Events:
    """A queue in order of time; of one time, in the order in which they were put in. `now_ms` is the time reached."""

    def __init__(self) -> None:
        self._queue: list[_Entry] = []
        self._numbers = itertools.count()
        self._now_ms = 0.0

    def now_ms(self) -> float:
        """Makes the queue a `vllm_llmd.clock.Clock`."""
        return self._now_ms

    def at(self, when_ms: float, call: Callable[[Any], None], argument: Any) -> None:
        """Calls it then. What is past happens now."""
        heapq.heappush(self._queue, (max(when_ms, self._now_ms), next(self._numbers), call, argument))

    def clear(self) -> None:
        """Nothing of all that happens: nobody is held on to for it any more."""
        self._queue.clear()

    def next(self) -> bool:
        """Lets the next one happen; False if there is none."""
        if not self._queue:
            return False
        self._now_ms, _, call, argument = heapq.heappop(self._queue)
        call(argument)
        return True
