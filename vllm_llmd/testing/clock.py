"""A clock whose hands the test turns."""


class FakeClock:
    """Implements `vllm_llmd.clock.Clock`; starts at `now_ms` and moves only when told."""

    def __init__(self, now_ms: float = 0.0) -> None:
        self._now_ms = now_ms

    def now_ms(self) -> float:
        return self._now_ms

    def advance(self, ms: float) -> None:
        self._now_ms += ms
