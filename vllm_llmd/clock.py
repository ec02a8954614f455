"""Time as an argument: whoever needs it is given a Clock, so that tests can turn the hands."""

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock."""

    def now_ms(self) -> float:
        """Milliseconds since an arbitrary start; never goes back."""
        ...


def unix_ms() -> float:
    """Milliseconds since 1970, as this machine has it: what different machines can compare, and may go back."""
    return time.time_ns() / 1e6


class MonotonicClock:
    """The machine's own monotonic clock."""

    def now_ms(self) -> float:
        return time.monotonic_ns() / 1e6
