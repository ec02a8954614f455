"""The workloads of `make bench-routing`: who asks what, when. Pure; the same seed gives the same requests and times.

Times are in units: how long one engine of this machine takes to prefill 1,000 tokens while the other one does the same.
So the load is the same on slow machines and fast ones.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from routing_words import text

BLOCK_TOKENS: Final = 32
CACHE_BLOCKS: Final = 470
"""Of each engine: 15,040 tokens. The shared system prompts are 1.6 times as many."""


@dataclass(frozen=True)
class Turn:
    """What a user says, how many tokens are answered, and how long after the former turn's answer it is said."""

    text: str
    answer_tokens: int
    pause: float = 0.0


@dataclass(frozen=True)
class Conversation:
    """Turns after a system prompt. Each repeats all that was said before. `at` is when the first one is asked."""

    system: str
    turns: tuple[Turn, ...]
    at: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Conversations; with `clients`, that many are held at any time, one after the other, whatever their `at`."""

    name: str
    conversations: tuple[Conversation, ...]
    clients: int | None = None

    @property
    def requests(self) -> int:
        return sum(len(each.turns) for each in self.conversations)


SYSTEMS: Final = 12
SYSTEM_TOKENS: Final = 2000


def shared(seed: int, scale: float) -> Workload:
    """Any of 12 system prompts of 2,000 tokens, a short question, a short answer; 8 clients that never pause.

    A closed loop: with more to do than round robin can, what is measured is how much an arm can do.
    """
    rng = random.Random(f"shared {seed}")
    systems = _texts(rng, SYSTEMS, SYSTEM_TOKENS)
    conversations = [
        Conversation(rng.choice(systems), (Turn(text(rng, rng.randint(30, 60)), 8),)) for _ in range(round(160 * scale))
    ]
    return Workload("shared", tuple(conversations), clients=8)


def chats(seed: int, scale: float) -> Workload:
    """Chats of 4 to 6 turns, each about a text of its own of 600 to 1,000 tokens, which begin within 16 units."""
    rng = random.Random(f"chats {seed}")
    conversations = []
    for at in _poisson(rng, rate=1.0, until=16.0 * scale):
        document = text(rng, rng.randint(600, 1000))
        pauses = [0.0, *(rng.expovariate(1 / 3) for _ in range(rng.randint(3, 5)))]
        turns = [Turn(text(rng, rng.randint(40, 120)), 24, pause) for pause in pauses]
        conversations.append(Conversation(document, tuple(turns), at))
    return Workload("chats", tuple(conversations))


def mixed(seed: int, scale: float) -> Workload:
    """One of every ten requests is about a document of 2,000 to 3,000 tokens that nobody has asked about before.

    The others are short, with a short system prompt in common. They come at random, for 32 units.
    """
    rng = random.Random(f"mixed {seed}")
    greeting = text(rng, 60)
    conversations = []
    for number, at in enumerate(_poisson(rng, rate=3.0, until=32.0 * scale)):
        if number % 10 == 0:
            long = number + rng.randrange(10)
        system = text(rng, rng.randint(2000, 3000)) if number == long else greeting
        conversations.append(Conversation(system, (Turn(text(rng, rng.randint(60, 200)), 16),), at))
    return Workload("mixed", tuple(conversations))


def bursts(seed: int, scale: float) -> Workload:
    """Every 5 units, 16 requests within a quarter of a unit about the same one of 12 texts of 2,000 tokens.

    The second most wanted of these is half as frequent as the first, and so on (Zipf). So agents fan out, and so
    crowds come. There are 12 bursts: in the first ones most texts are new to every engine.
    """
    rng = random.Random(f"bursts {seed}")
    systems = _texts(rng, SYSTEMS, SYSTEM_TOKENS)
    weights = [1 / rank for rank in range(1, SYSTEMS + 1)]
    conversations = []
    for burst in range(max(round(12 * scale), 1)):
        system = rng.choices(systems, weights)[0]
        for at in sorted(burst * 5.0 + rng.uniform(0.0, 0.25) for _ in range(16)):
            conversations.append(Conversation(system, (Turn(text(rng, rng.randint(100, 300)), 16),), at))
    return Workload("bursts", tuple(conversations))


WORKLOADS: Final = {each.__name__: each for each in (shared, chats, mixed, bursts)}
"""By name; each is made of a seed and the share of its requests that are asked."""


WARM_UP_REQUESTS: Final = 16


def warm_up(count: int) -> Workload:
    """Before every cell, uncounted: requests of 50 to 400 tokens that share nothing, by two clients."""
    rng = random.Random("warm up")
    asked = [Conversation("", (Turn(text(rng, 50 + 350 * number // count), 8),)) for number in range(count)]
    return Workload("warm-up", tuple(asked), clients=2)


def rotated(items: list[str], by: int) -> list[str]:
    """The same round, begun elsewhere."""
    by %= max(len(items), 1)
    return items[by:] + items[:by]


def _texts(rng: random.Random, count: int, tokens: int) -> list[str]:
    return [text(rng, tokens) for _ in range(count)]


def _poisson(rng: random.Random, rate: float, until: float) -> Iterator[float]:
    """Times at random, so many per unit; at least one."""
    at = 0.0
    while at < until:
        yield at
        at += rng.expovariate(rate)
