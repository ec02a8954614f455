"""When a request is due at an engine, and how that is said to one that serves by priority. Pure.

Who is due first is served first. A request is due after so many times as long as its prompt takes there: so short ones
do not wait for long ones, and nobody waits for those who come later than that. Its own objective makes it due sooner.
"""

from collections.abc import Mapping
from typing import Any, Final

from vllm_llmd.due import BAND_MS
from vllm_llmd.router.slo import MOST_URGENT, Wish

STRETCH: Final = 3.0
"""A prompt that takes a second is due three seconds after it has come. Mean latencies of one and of ten are the same
within a few percent; less protects short prompts less, more has long ones wait longer."""

MOST_WORK_MS: Final = 3.6e6


def due_ms(came_ms: float, work_ms: float, ttft_ms: float | None, stretch: float = STRETCH) -> float:
    """By when the first token of a request should come that came then, and whose prompt takes so long to compute."""
    allowed_ms = stretch * min(max(work_ms, 0.0), MOST_WORK_MS) if work_ms == work_ms else 0.0
    return came_ms + (allowed_ms if ttft_ms is None else min(allowed_ms, ttft_ms))


def priority(
    band: int, came_ms: float, work_ms: float | None, ttft_ms: float | None = None, gives: bool = False
) -> int:
    """As vLLM understands it, where less goes first: higher bands first, and in a band whoever is due first.

    `came_ms` is in milliseconds since 1970. `work_ms` may be anything; if it is not known, only the band is said. A
    source that `gives` what others compute there is to do so as soon as it can: where that is waited for, all may wait.
    """
    if work_ms is None:
        return -band
    return int(due_ms(came_ms, work_ms, ttft_ms, 1.0 if gives else STRETCH) - band * BAND_MS)


def band_of(body: Mapping[str, Any], wish: Wish) -> int | None:
    """The priority that a client names, in its header or in its body, where less is more. None for what is neither."""
    said = body.get("priority")
    if said is None:
        return wish.priority
    is_band = isinstance(said, int) and not isinstance(said, bool) and abs(said) <= MOST_URGENT
    return -said if is_band else None
