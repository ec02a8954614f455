"""How fast engines are: requests of several lengths and numbers, to all of them at once.

Says how long a unit is, and what the simulator is told of the engines' speed.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from pd_engines import Engine
from routing_client import Users
from routing_plan import Conversation, Turn, Workload
from routing_values import Probe
from routing_words import text

UNIT_TOKENS: Final = 1000


@dataclass(frozen=True)
class Volley:
    """Requests that reach each engine at once: whether a long beginning of their prompts is cached, what follows."""

    at_once: int
    cached: bool
    words: int
    answer_tokens: int


CACHED_WORDS: Final = 1500
VOLLEYS: Final = (
    *(Volley(1, False, words, 1) for words in (32, 200, 450, 1000, 2000, 3000)),
    *(Volley(at_once, False, 40, 24) for at_once in (1, 2, 4, 8)),
    *(Volley(at_once, True, 40, 24) for at_once in (1, 8)),
    Volley(8, False, 250, 16),
    Volley(6, True, 150, 16),
)
"""Prefill alone; next to nothing but decoding, without and with a long context; and both in the same steps."""

_TEMPLATE_TOKENS: Final = 30
"""What SmolLM2's chat template adds to a single message."""


async def held(http: str, unit_s: float, workload: Workload) -> Users:
    """The conversations of a workload with one server. Raises BenchError."""
    async with Users(http, unit_s) as users:
        await users.hold(workload)
    return users


async def unit_ms(engines: Sequence[Engine], seed: str, count: int = 5) -> float:
    """How long a prefill of 1,000 tokens takes while all engines have one, of texts of their own: so many each."""
    prompts = _texts(f"unit {seed}", count, UNIT_TOKENS - _TEMPLATE_TOKENS)
    workload = _workload("", prompts, answer_tokens=1, clients=1)
    users = await asyncio.gather(*(held(engine.http, 0.0, workload) for engine in engines))
    return median(asked.ttft_ms for each in users for asked in each.asked)


async def probes(http: str, engines: int, seed: str) -> list[Probe]:
    """Every volley, through a router that sends each request to the engine that comes next."""
    found = []
    [cached] = _texts(f"{seed}, cached", 1, CACHED_WORDS)
    await held(http, 0.0, _workload(cached, _texts(seed, engines, 40), answer_tokens=1, clients=engines))
    for place, volley in enumerate(VOLLEYS):
        prompts = _texts(f"{seed}, {place}", volley.at_once * engines, volley.words)
        workload = _workload(cached if volley.cached else "", prompts, volley.answer_tokens, clients=len(prompts))
        users = await held(http, 0.0, workload)
        found.append(Probe(at_once=volley.at_once, asked=users.asked))
    return found


def _workload(system: str, prompts: Sequence[str], answer_tokens: int, clients: int) -> Workload:
    asked = [Conversation(system, (Turn(prompt, answer_tokens),)) for prompt in prompts]
    return Workload("probe", tuple(asked), clients)


def _texts(seed: str, count: int, words: int) -> list[str]:
    rng = random.Random(f"{seed} {words}")
    return [text(rng, words) for _ in range(count)]
