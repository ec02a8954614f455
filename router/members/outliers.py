"""Which engines are far slower than others at the same work, by the time to the first byte of their streams. Pure.

A time is compared with the median of the fleet's for requests of the same shape, so that long prompts and long queues
count against nobody; then an engine's times with those of each other engine.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from vllm_llmd.names import EngineId

TIMES_KEPT: Final = 64
"""Of each shape."""
OTHERS_NEEDED: Final = 8
"""Times of other engines without which a time says nothing."""

EXCESSES_KEPT: Final = 16
EXCESSES_NEEDED: Final = 8

SLOW_FACTOR: Final = 3.0
DEVIATIONS: Final = 5.0
_MAD_TO_SIGMA: Final = 1.4826


@dataclass(frozen=True)
class Shape:
    """What makes requests take equally long: sizes by powers of two. `remote`: the KV comes from another engine."""

    tokens_log2: int
    ahead_log2: int
    remote: bool

    @classmethod
    def of(cls, uncached_tokens: int, requests_ahead: int, remote: bool) -> "Shape":
        return cls(uncached_tokens.bit_length(), requests_ahead.bit_length(), remote)


class Latencies:
    """Recent times by shape, and by engine how far its own were above the fleet's, as logarithms."""

    def __init__(self) -> None:
        self._times: dict[Shape, deque[tuple[EngineId, float]]] = {}
        self._excesses: dict[EngineId, deque[float]] = {}

    def took(self, engine: EngineId, shape: Shape, first_byte_ms: float) -> None:
        """Takes one time in."""
        time_log = math.log(max(first_byte_ms, 0.001))
        times = self._times.setdefault(shape, deque(maxlen=TIMES_KEPT))
        if sum(other != engine for other, _ in times) >= OTHERS_NEEDED:
            excesses = self._excesses.setdefault(engine, deque(maxlen=EXCESSES_KEPT))
            excesses.append(time_log - median(each for _, each in times))
        times.append((engine, time_log))

    def slow(self, engines: Sequence[EngineId]) -> list[EngineId]:
        """Those whose times are `SLOW_FACTOR` times the others' and out of their range, the slowest first."""
        typical = {
            engine: median(self._excesses[engine])
            for engine in engines
            if len(self._excesses.get(engine, ())) >= EXCESSES_NEEDED
        }
        slow = [engine for engine in typical if self._is_outlier(engine, typical)]
        return sorted(slow, key=lambda engine: -typical[engine])

    @staticmethod
    def _is_outlier(engine: EngineId, typical: dict[EngineId, float]) -> bool:
        others = [excess for other, excess in typical.items() if other != engine]
        if not others:
            return False
        middle = median(others)
        deviation = _MAD_TO_SIGMA * median(abs(other - middle) for other in others)
        return typical[engine] - middle > max(math.log(SLOW_FACTOR), DEVIATIONS * deviation)

    def forget(self, engine: EngineId) -> None:
        """Nothing of what the engine took counts any longer."""
        self._excesses.pop(engine, None)
        for times in self._times.values():
            for kept in [each for each in times if each[0] == engine]:
                times.remove(kept)
