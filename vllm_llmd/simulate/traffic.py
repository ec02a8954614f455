"""What can be made of a trace: less of it, more users like these, more load; or one that is made up. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from vllm_llmd.errors import ConfigError
from vllm_llmd.router.slo import Wish
from vllm_llmd.simulate.settings import Slo
from vllm_llmd.simulate.trace import HASHED_TOKENS, IDS, TraceRequest

BEST_EFFORT: Final = -1
"""The priority of those whom nobody hurries: any below 0 would do."""


def first(requests: Sequence[TraceRequest], most: int | None, minutes: float | None) -> list[TraceRequest]:
    """What comes in the first minutes, and of that so many at the most; None bounds nothing."""
    end_ms = None if minutes is None else requests[0].at_ms + minutes * 60_000
    return [request for request in requests[:most] if end_ms is None or request.at_ms < end_ms]


def spread(requests: Sequence[TraceRequest], rng: random.Random) -> list[TraceRequest]:
    """Those that have one timestamp come at random times between it and the next.

    Published traces tell time in steps of seconds; nobody's users come in such steps.
    """
    times = sorted({request.at_ms for request in requests})
    until = dict(zip(times, [*times[1:], times[-1]], strict=True))
    moved = [replace(each, at_ms=rng.uniform(each.at_ms, until[each.at_ms])) for each in requests]
    return sorted(moved, key=lambda request: request.at_ms)


def copies(requests: Sequence[TraceRequest], count: int) -> list[TraceRequest]:
    """As many users more: each copy asks at the same times, and shares no prompt with another copy."""
    ids = 1 + max(hash_id for request in requests for hash_id in request.hash_ids)
    if ids * count > IDS:
        raise ConfigError(f"copies must be at most {IDS // ids} for this trace; got {count}")
    return [
        replace(request, hash_ids=[hash_id + copy * ids for hash_id in request.hash_ids]) if copy else request
        for request in requests
        for copy in range(count)
    ]


def hastened(requests: Sequence[TraceRequest], speedup: float) -> list[TraceRequest]:
    """The same in less time, from 0 on."""
    began_ms = requests[0].at_ms
    return [replace(request, at_ms=(request.at_ms - began_ms) / speedup) for request in requests]


def tightened(requests: Sequence[TraceRequest], share: float, slo: Slo, rng: random.Random) -> list[TraceRequest]:
    """This share of them, by chance, has to keep `slo`."""
    return [replace(request, slo=slo) if rng.random() < share else request for request in requests]


def with_best_effort(requests: Sequence[TraceRequest], share: float, rng: random.Random) -> list[TraceRequest]:
    """Clients say of this share of them, by chance, that they are best effort; these have no objectives."""
    best_effort = Wish(priority=BEST_EFFORT)
    return [replace(each, wish=best_effort, slo=None) if rng.random() < share else each for each in requests]


def telling(requests: Sequence[TraceRequest], slo: Slo) -> list[TraceRequest]:
    """Clients say in headers what their requests have to keep: `slo`, unless it is something else."""
    return [replace(request, wish=_wish(request.slo or slo)) for request in requests]


def _wish(slo: Slo) -> Wish:
    return Wish(ttft_ms=slo.ttft_ms, tpot_ms=slo.tpot_ms)


def rate_of(requests: Sequence[TraceRequest]) -> float:
    """Requests per second."""
    lasts_ms = requests[-1].at_ms - requests[0].at_ms
    if not lasts_ms > 0:
        raise ConfigError("rate needs a trace that lasts longer than an instant: give speedup instead")
    return len(requests) / lasts_ms * 1000


@dataclass(frozen=True, kw_only=True)
class Chats:
    """Made-up chats: each begins with one of `systems` system prompts, and each turn with all that was said before.

    Lengths are means in blocks of 512 tokens; `output_tokens` is a mean, too. Times are in seconds.
    """

    systems: int = 16
    system_blocks: int = 4
    turns: int = 4
    turn_blocks: int = 2
    output_tokens: int = 200
    rate: float = 8.0
    pause_s: float = 20.0


def synthetic(count: int, rng: random.Random, chats: Chats = Chats()) -> list[TraceRequest]:
    """So many requests of such chats, in order of arrival."""
    fresh = iter(range(IDS))
    systems = [[next(fresh) for _ in range(rng.randint(1, 2 * chats.system_blocks))] for _ in range(chats.systems)]
    made: list[TraceRequest] = []
    begins_s = 0.0
    while len(made) < 2 * count:  # chats that begin later may have turns that come earlier
        begins_s += rng.expovariate(chats.rate / chats.turns)
        said, at_s = list(rng.choice(systems)), begins_s
        for _ in range(rng.randint(1, 2 * chats.turns - 1)):
            said = [*said, *(next(fresh) for _ in range(rng.randint(1, 2 * chats.turn_blocks - 1)))]
            tokens = len(said) * HASHED_TOKENS - rng.randrange(HASHED_TOKENS)
            output_tokens = 1 + int(rng.expovariate(1 / chats.output_tokens))
            made.append(TraceRequest(round(at_s * 1000), tokens, output_tokens, said))
            at_s += rng.expovariate(1 / chats.pause_s)
    return sorted(made, key=lambda request: request.at_ms)[:count]
