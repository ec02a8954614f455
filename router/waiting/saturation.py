"""Whether an engine has as much to do as it should be given. Pure.

A report counts only while it is fresh, and never against an engine in which this router has little in flight: one
that is stuck or wrong may slow requests down, but cannot stop them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Roster
from vllm_llmd.router.members.membership import Engine
from vllm_llmd.router.members.occupancy import Occupancy, Supposed


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
    own = engine.occupancy
    if own.report_ms != engine.load_at_ms:
        own.reported(engine.load_at_ms)
    return would_be_saturated(engine, own, limits, now_ms)


def would_be_saturated(engine: Engine, own: Occupancy | Supposed, limits: Limits, now_ms: float) -> bool:
    """The same if this router had that in flight there, of which it knows what the latest report covers."""
    requests = len(own)
    if requests <= limits.engine_queue and own.tokens < limits.prefill_tokens:
        return False
    slots = engine.info.max_sequences or limits.engine_requests
    if requests >= slots + limits.engine_queue:
        return True
    load = engine.load
    fresh = engine.load_at_ms > 0 and now_ms - engine.load_at_ms <= limits.fresh_ms
    most = limits.prefill_tokens
    if own.tokens >= most and (not fresh or max(load.prefill_tokens + own.newer_tokens, 0) >= most):
        return True
    if not fresh or requests <= limits.engine_queue:
        return False
    return _beyond(engine, own, slots) >= max(limits.engine_queue, 1)


def _beyond(engine: Engine, own: Occupancy | Supposed, slots: int) -> int:
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
    if not any_free(roster.decoding, limits, now_ms):
        return not roster.decoding
    return not needs_source or not roster.prefilling or any_free(roster.prefilling, limits, now_ms)


def any_free(engines: Mapping[EngineId, Engine], limits: Limits, now_ms: float) -> bool:
    """Whether one of them is not saturated."""
    return any(not saturated(engine, limits, now_ms) for engine in engines.values())
