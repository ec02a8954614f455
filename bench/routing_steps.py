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


def awaited(group: Sequence[Probe], step_tokens: int) -> list[Awaited]:
    """Of requests that came to an engine at once, in order of their first tokens."""
    speeds = _Recorder()
    engine = Scheduler(Limits(block_size=BLOCK_TOKENS, blocks=CACHE_BLOCKS, token_budget=step_tokens), speeds)
    cached = max(each.cached_tokens for each in group)
    if cached:
        _play(engine, [SimRequest("cached", cached + 1, 1, _names(0, cached, cached))])
    speeds.steps.clear()
    asked = [
        SimRequest(
            str(number), each.prompt_tokens, each.output_tokens, _names(number, each.cached_tokens, each.prompt_tokens)
        )
        for number, each in enumerate(group, start=1)
    ]
    ends = _play(engine, asked)
    found = sorted((ends[request.id] for request in asked), key=lambda each: each[0])
    return [Awaited(speeds.steps[:first], speeds.steps[first:last]) for first, last in found]


def _names(number: int, cached_tokens: int, tokens: int) -> list[BlockName]:
    """All requests have what is cached in common, and nothing else."""
    shared = cached_tokens // BLOCK_TOKENS
    own = range(shared + number * _APART, tokens // BLOCK_TOKENS + number * _APART)
    return [BlockName(name) for name in (*range(1, shared + 1), *own)]


def _play(engine: Scheduler, requests: Sequence[SimRequest]) -> dict[str, tuple[int, int]]:
    """After how many steps each has its first token, and its last one."""
    began_ms = float(engine.counts.steps)
    for request in requests:
        engine.submit(request, began_ms)
    ends: dict[str, tuple[int, int]] = {}
    taken = -1
    while engine.next_ms is not None:
        taken += 1
        for request, _ in engine.step(engine.next_ms).made:
            ends[request.id] = ends.get(request.id, (taken, taken))[0], taken
    return ends
