"""What the steps hold that a probe's requests wait for, as the simulator's own scheduler has it. Pure.

How long these steps take is linear in what they hold, so that speeds follow from times by least squares.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from routing_plan import BLOCK_TOKENS, CACHE_BLOCKS
from routing_values import Probe

from vllm_llmd.names import BlockName
from vllm_llmd.sim.limits import Limits
from vllm_llmd.sim.requests import SimRequest
from vllm_llmd.sim.scheduler import Scheduler
from vllm_llmd.sim.speeds import Speeds, Work

_APART: Final = 1_000_000
"""Between the names of blocks of two requests."""


@dataclass(frozen=True)
class Awaited:
    """The steps up to a request's first token, and those from there to its last one."""

    to_first: Sequence[Work]
    to_last: Sequence[Work]


@dataclass(frozen=True, kw_only=True)
class _Recorder(Speeds):
    """Every step takes a millisecond, and is written down."""

    steps: list[Work] = field(default_factory=list)

    def work_ms(self, work: Work) -> float:
        self.steps.append(work)
        return 1.0


def awaited(probe: Probe, step_tokens: int) -> list[Awaited]:
    """Of each of the requests that an engine gets.

    They come one after the other, so that the first has a step of its own, in which the others arrive.
    """
    speeds = _Recorder()
    engine = Scheduler(Limits(block_size=BLOCK_TOKENS, blocks=CACHE_BLOCKS, token_budget=step_tokens), speeds)
    like = probe.asked[0]
    if like.cached_tokens:
        _play(engine, [SimRequest("cached", like.cached_tokens + 1, 1, _names(0, like.cached_tokens, 0))])
    speeds.steps.clear()
    ends = _play(
        engine,
        [
            SimRequest(
                str(number),
                like.prompt_tokens,
                like.output_tokens,
                _names(number, like.cached_tokens, like.prompt_tokens),
            )
            for number in range(1, probe.at_once + 1)
        ],
    )
    return [Awaited(speeds.steps[:first], speeds.steps[first:last]) for first, last in ends]


def _names(number: int, cached_tokens: int, tokens: int) -> list[BlockName]:
    """All requests have what is cached in common, and nothing else."""
    shared = cached_tokens // BLOCK_TOKENS
    own = range(shared + number * _APART, tokens // BLOCK_TOKENS + number * _APART)
    return [BlockName(name) for name in (*range(1, shared + 1), *own)]


def _play(engine: Scheduler, requests: Sequence[SimRequest]) -> list[tuple[int, int]]:
    """After how many steps each has its first token, and its last one."""
    first, *others = requests
    now_ms = float(engine.counts.steps)
    engine.submit(first, now_ms)
    engine.step(now_ms)
    for request in others:
        engine.submit(request, now_ms)
    ends: dict[str, tuple[int, int]] = {}
    taken = 0
    while engine.next_ms is not None:
        taken += 1
        for request, _ in engine.step(engine.next_ms).made:
            ends[request.id] = ends.get(request.id, (taken, taken))[0], taken
    return [ends[request.id] for request in requests]
