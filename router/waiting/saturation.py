"""Whether an engine has as much to do as it should be given. Pure.

A report counts only while it is fresh, and never against an engine in which this router has little in flight: one
that is stuck or wrong may slow requests down, but cannot stop them.
"""

from dataclasses import dataclass

from vllm_llmd.router.candidates import Places, Roster
from vllm_llmd.router.members.membership import Engine
from vllm_llmd.router.members.occupancy import Occupancy


@dataclass(frozen=True)
class Limits:
    """An engine that runs as many requests as it can may have `engine_queue` more.

    It runs `engine_requests` where it does not say how many. All that have not begun to answer may have
    `prefill_tokens` of prompt to compute. Reports older than `fresh_ms` do not count.
    """

    engine_queue: int
    engine_requests: int
    prefill_tokens: int
    fresh_ms: float


def saturated(engine: Engine, limits: Limits, now_ms: float) -> bool:
    """Whether requests should rather wait in the router. Never if little is in flight there."""
    return would_be_saturated(engine, engine.occupancy, limits, now_ms)


def would_be_saturated(engine: Engine, own: Occupancy, limits: Limits, now_ms: float) -> bool:
    """The same if this router had that in flight there."""
    load = engine.load
    if len(own) <= limits.engine_queue and own.tokens < limits.prefill_tokens:
        return False
    slots = engine.info.max_sequences or limits.engine_requests
    if len(own) >= slots + limits.engine_queue:
        return True
    own.reported(engine.load_at_ms)
    fresh = engine.load_at_ms > 0 and now_ms - engine.load_at_ms <= limits.fresh_ms
    tokens = min(own.tokens, max(load.prefill_tokens + own.newer_tokens, 0)) if fresh else own.tokens
    if tokens >= limits.prefill_tokens:
        return True
    if not fresh or len(own) <= limits.engine_queue:
        return False
    return _beyond(engine, own, slots) >= max(limits.engine_queue, 1)


def _beyond(engine: Engine, own: Occupancy, slots: int) -> int:
    """How many requests it has that it cannot run, for want of slots or of memory."""
    load, newer = engine.load, own.newer_requests
    cannot_tell = engine.info.max_sequences is None
    if load.waiting and (cannot_tell or load.free_blocks * engine.info.block_size < load.prefill_tokens):
        return load.waiting + newer
    return load.running + load.waiting + load.waiting_for_kv + newer - slots


def has_room(roster: Roster, needs_source: bool, limits: Limits, now_ms: float) -> bool:
    """Whether a request would find an engine that is not saturated, and if it needs a source, a source.

    True where there is no engine at all: waiting for one is not what a queue is for.
    """
    if not _any_free(roster, roster.decoders, limits, now_ms):
        return not len(roster.decoders)
    if not needs_source or not len(roster.prefillers):
        return True
    return _any_free(roster, roster.prefillers, limits, now_ms)


def _any_free(roster: Roster, places: Places, limits: Limits, now_ms: float) -> bool:
    return any(not saturated(roster.engines[place], limits, now_ms) for place in places)
