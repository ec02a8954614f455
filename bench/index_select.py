"""Token ids to a choice among 64 engines, against Dynamo's `SelectionService`, at a million resident blocks.

Ours is what the router does for a prompt of token ids once it has read the body: the text's cut, the block names, the
candidates, the decision. Dynamo's is `select`, awaited. Both hold the same blocks of the same prompts.
"""

import asyncio
import random
import time
from array import array
from collections.abc import Iterator

import numpy as np
from index_dynamo import Selector
from index_fleet import MODEL, FilledFleet
from index_values import Arms, Found, Settings

from vllm_llmd.kernels import hash_chain_cpu
from vllm_llmd.router import policies
from vllm_llmd.router.decide import Decision, decide
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.request import Facts
from vllm_llmd.router.settings import RouterSettings

ENGINES = 64
BLOCK_SIZE = 16
PROMPT_TOKENS = 8192
MESSAGE_BLOCKS = 32
VOCABULARY = 150_000
ONE_HOLDER = 7
CALLS_IN_TURN = 20
"""Dynamo works in threads of its own, which are still busy for a while after an answer."""

Prompt = np.ndarray[tuple[int], np.dtype[np.uint32]]


def prompts(rng: np.random.Generator) -> Iterator[Prompt]:
    """Different ones, for ever."""
    while True:
        yield rng.integers(0, VOCABULARY, PROMPT_TOKENS, np.uint32)


class Sides:
    """Ours and Dynamo's, told of the same blocks."""

    def __init__(self, resident: int) -> None:
        blocks = 2 * resident // ENGINES
        self.ours = FilledFleet(ENGINES, BLOCK_SIZE, blocks)
        self.dynamo = Selector(BLOCK_SIZE)
        self._blocks = blocks
        self._policy = policies.make(RouterSettings().policy, PolicySettings(256, random.Random(0)))

    async def fill(self, resident: int, everyone: Prompt, one: Prompt, rng: np.random.Generator) -> None:
        """`everyone` is held by all engines, `one` by a single one; the rest is of other prompts."""
        await self.dynamo.join(ENGINES, self._blocks)
        others = prompts(rng)
        for number in range(resident // (PROMPT_TOKENS // BLOCK_SIZE)):
            self._store(number % ENGINES, next(others))
        self._store(ONE_HOLDER, one)
        for engine in range(ENGINES):
            self._store(engine, everyone)
        await self.dynamo.settled([everyone.tolist()] * ENGINES)

    def _store(self, engine: int, prompt: Prompt) -> None:
        names = hash_chain_cpu.chain_names(prompt, BLOCK_SIZE)
        self.ours.store(engine, names)
        listed, tokens, parent = names.tolist(), prompt.tolist(), None
        for start in range(0, len(listed), MESSAGE_BLOCKS):
            some = listed[start : start + MESSAGE_BLOCKS]
            theirs = tokens[start * BLOCK_SIZE : (start + len(some)) * BLOCK_SIZE]
            self.dynamo.store(engine, some, parent, theirs)
            parent = some[-1]

    def decide(self, tokens: "array[int]") -> Decision:
        facts = Facts(MODEL, tokens, b"", tokens.tobytes(), len(tokens), None)
        fleet = self.ours.fleet
        decision = decide(facts, fleet.candidates(facts, fleet.cut(facts)), self._policy)
        assert decision is not None
        return decision


async def take_turns(arms: Arms, sides: Sides, tokens: "array[int]", listed: list[int]) -> None:
    """Some calls of one side, then some of the other, in microseconds."""
    for side in random.sample(("ours", "dynamo"), 2):
        for _ in range(CALLS_IN_TURN):
            began = time.perf_counter()
            if side == "ours":
                sides.decide(tokens)
            else:
                await sides.dynamo.select(listed)
            getattr(arms, side).append((time.perf_counter() - began) * 1e6)


async def check(sides: Sides, everyone: Prompt, one: Prompt) -> None:
    """Both know who holds what."""
    for prompt in (everyone, one):
        ours, theirs = sides.decide(array("I", prompt)), await sides.dynamo.select(prompt.tolist())
        assert ours.predicted_blocks == theirs["overlap"]["gpu"] // BLOCK_SIZE == PROMPT_TOKENS // BLOCK_SIZE
    assert sides.decide(array("I", one)).destination == f"engine-{theirs['worker_id']}" == f"engine-{ONE_HOLDER}"


async def compare(settings: Settings) -> list[Arms]:
    rng = np.random.default_rng(0)
    everyone, one = next(prompts(rng)), next(prompts(rng))
    sides = Sides(settings.resident)
    await sides.fill(settings.resident, everyone, one, rng)
    await check(sides, everyone, one)
    found = []
    for what, prompt in (("choice, 64 holders", everyone), ("choice, 1 holder", one)):
        arms = Arms(what, "us", more_is_better=False)
        for _ in range(settings.calls // CALLS_IN_TURN + 1):
            await take_turns(arms, sides, array("I", prompt), prompt.tolist())
        found.append(arms)
    sides.dynamo.close()
    return found


def measure(settings: Settings) -> Found:
    found = asyncio.run(compare(settings))
    return Found({"select_vs_dynamo": min(arms.speed_up for arms in found)}, found)
