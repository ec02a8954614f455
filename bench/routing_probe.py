"""How fast an engine is without a router: requests of several lengths and numbers, to all engines at once.

Says how long a unit is, and what the simulator is told of the engines' speed.
"""

import asyncio
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from pd_engines import Engine
from routing_client import Users
from routing_plan import Conversation, Turn, Workload
from routing_values import Asked, Probe
from routing_words import text

UNIT_TOKENS: Final = 1000


@dataclass(frozen=True)
class Crowd:
    """Requests that reach an engine at once: how many, how many words are cached of each prompt and how many follow.

    `answer_tokens` are answered to each.
    """

    requests: int
    cached_words: int
    words: int
    answer_tokens: int


CROWDS: Final = (
    *(Crowd(1, 0, words, 1) for words in (32, 200, 450, 1000, 2000, 3000)),
    *(Crowd(requests, 0, 40, 24) for requests in (1, 2, 4, 8)),
    *(Crowd(requests, 1500, 40, 24) for requests in (1, 4)),
    Crowd(8, 0, 250, 16),
    Crowd(6, 1500, 150, 16),
)
"""Prefill alone; next to nothing but decoding, without and with a long context; and both in the same steps."""

ROUNDS: Final = 2
_TEMPLATE_TOKENS: Final = 30
"""What SmolLM2's chat template adds to a single message."""


async def held(http: str, unit_s: float, workload: Workload) -> Users:
    """The conversations of a workload with one server. Raises BenchError."""
    async with Users(http, unit_s) as users:
        await users.hold(workload)
    return users


async def unit_ms(engines: Sequence[Engine]) -> float:
    """How long a prefill of 1,000 tokens takes while all engines have one: five each, after five that warm them."""
    for number in range(2):
        prompts = _texts(f"unit {number}", 5, UNIT_TOKENS - _TEMPLATE_TOKENS)
        workload = Workload("unit", tuple(Conversation("", (Turn(prompt, 1),)) for prompt in prompts), clients=1)
        asked = itertools.chain.from_iterable(await _everywhere(engines, workload))
    return median(each.ttft_ms for each in asked)


async def probes(engines: Sequence[Engine]) -> list[Probe]:
    """Every crowd twice, on each engine."""
    found: list[Probe] = []
    groups = itertools.count()
    for number in range(ROUNDS):
        for place, crowd in enumerate(CROWDS):
            system = " ".join(_texts(f"cached {place}", 1, crowd.cached_words))
            if system and not number:
                await _everywhere(engines, _crowd(system, _texts(f"first {place}", 1, crowd.words), crowd))
            asked = await _everywhere(
                engines, _crowd(system, _texts(f"{number} {place}", crowd.requests, crowd.words), crowd)
            )
            for each in asked:
                found += _probes(next(groups), each)
    return found


def _probes(group: int, asked: Sequence[Asked]) -> Iterator[Probe]:
    for each in asked:
        yield Probe(
            group=group,
            prompt_tokens=each.prompt_tokens,
            cached_tokens=each.cached_tokens,
            output_tokens=each.output_tokens,
            ttft_ms=each.ttft_ms,
            tpot_ms=each.tpot_ms,
        )


async def _everywhere(engines: Sequence[Engine], workload: Workload) -> list[list[Asked]]:
    """What was asked of each engine."""
    users = await asyncio.gather(*(held(engine.http, 0.0, workload) for engine in engines))
    return [each.asked for each in users]


def _crowd(system: str, prompts: Sequence[str], crowd: Crowd) -> Workload:
    asked = [Conversation(system, (Turn(prompt, crowd.answer_tokens),)) for prompt in prompts]
    return Workload("probe", tuple(asked), clients=len(asked))


def _texts(seed: str, count: int, words: int) -> list[str]:
    rng = random.Random(f"{seed} {words}")
    return [text(rng, words) for _ in range(count)]
