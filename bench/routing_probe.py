"""How fast an engine is without a router: requests of several lengths and numbers, to all engines at once.

Says how long a unit is, and what the simulator is told of the engines' speed.
"""

import asyncio
import random
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Final

from pd_engines import Engine
from routing_client import Users
from routing_plan import Conversation, Turn, Workload
from routing_values import Asked, Probe
from routing_words import text

UNIT_TOKENS: Final = 1000
PREFILLS: Final = (32, 200, 450, 1000, 2000, 3500)
"""Words of prompts that no cache knows."""

DECODES: Final = ((1, 40), (2, 40), (4, 40), (8, 40), (1, 1500), (4, 1500))
"""Requests at once, and words of their prompts, which are cached by then."""

DECODED: Final = 32
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
        asked = await _everywhere(engines, _workload(prompts, answer_tokens=1, clients=1))
    return median(each.ttft_ms for each in asked)


async def probes(engines: Sequence[Engine]) -> list[Probe]:
    """Every length and number twice, on each engine."""
    found: list[Probe] = []
    for number in range(2):
        for words in PREFILLS:
            prompts = _texts(f"prefill {number}", 1, words)
            found += _probes(1, await _everywhere(engines, _workload(prompts, answer_tokens=1, clients=1)))
        for at_once, words in DECODES:
            prompts = _texts(f"decode {number} {at_once}", at_once, words)
            await _everywhere(engines, _workload(prompts, answer_tokens=1, clients=at_once))
            asked = await _everywhere(engines, _workload(prompts, answer_tokens=DECODED, clients=at_once))
            found += _probes(at_once, asked)
    return found


def _probes(at_once: int, asked: Sequence[Asked]) -> Iterator[Probe]:
    for each in asked:
        yield Probe(
            at_once=at_once,
            prompt_tokens=each.prompt_tokens,
            cached_tokens=each.cached_tokens,
            ttft_ms=each.ttft_ms,
            tpot_ms=each.tpot_ms if each.output_tokens > 1 else None,
        )


async def _everywhere(engines: Sequence[Engine], workload: Workload) -> list[Asked]:
    users = await asyncio.gather(*(held(engine.http, 0.0, workload) for engine in engines))
    return [asked for each in users for asked in each.asked]


def _workload(prompts: Sequence[str], answer_tokens: int, clients: int) -> Workload:
    asked = [Conversation("", (Turn(prompt, answer_tokens),)) for prompt in prompts]
    return Workload("probe", tuple(asked), clients)


def _texts(seed: str, count: int, words: int) -> list[str]:
    rng = random.Random(f"{seed} {words}")
    return [text(rng, words) for _ in range(count)]
