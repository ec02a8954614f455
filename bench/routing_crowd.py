"""The users of a workload in the simulation's time: they do as the benchmark's users. Pure.

A client of a closed loop asks anew as soon as it is answered, and a chat's next turn follows the answer. Prompts are
token ids that are equal where the words are.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from routing_plan import Conversation, Workload
from routing_words import WORDS

from vllm_llmd.simulate.trace import IDS, Tokens, TraceRequest

QUIET_MS: Final = 1000.0
"""Between the requests that warm up and the others."""

APART_MS: Final = 1.0

_IDS: Final = {word: number for number, word in enumerate(WORDS, start=1)}
_HEAD: Final = (1001, 1002, 1003)
_TAIL: Final = (1004, 1005)
"""A chat template has three tokens before what somebody says, and two after."""


@dataclass(frozen=True, slots=True)
class Spoken(TraceRequest):
    """A request whose prompt and answer are known word by word."""

    said: tuple[int, ...] = ()
    told: tuple[int, ...] = ()

    def prompt(self) -> Tokens:
        return np.asarray(self.said, np.uint32)

    def answer(self, number: int) -> Tokens:
        return np.asarray(self.told, np.uint32)


class Crowd:
    """The users of a workload, in the simulation's time.

    A request reaches its engine `overhead_ms` later, and up to `APART_MS` more: of those that are sent at once it is
    chance who comes first.
    """

    def __init__(self, workload: Workload, unit_ms: float, overhead_ms: float, chance: random.Random) -> None:
        self._workload, self._unit_ms, self._overhead_ms, self._chance = workload, unit_ms, overhead_ms, chance
        self._asked: list[tuple[int, int]] = []
        self._next = iter(range(len(workload.conversations)))

    def first(self, now_ms: float = 0.0) -> list[TraceRequest]:
        """Who asks whatever is answered, in order of time."""
        count = self._workload.clients or len(self._workload.conversations)
        numbers = [number for _, number in zip(range(count), self._next, strict=False)]
        at = [0.0 if self._workload.clients else self._of(number).at for number in numbers]
        times_ms = [self._there_ms(now_ms + each * self._unit_ms) for each in at]
        return [self._ask(number, 0, at_ms) for at_ms, number in sorted(zip(times_ms, numbers, strict=True))]

    def follow(self, number: int, now_ms: float) -> Sequence[TraceRequest]:
        """What the same user asks after the answer to the request of that number."""
        conversation, turn = self._asked[number]
        turns = self._of(conversation).turns
        if turn + 1 < len(turns):
            sent_ms = now_ms + turns[turn + 1].pause * self._unit_ms
            return (self._ask(conversation, turn + 1, self._there_ms(sent_ms)),)
        following = next(self._next, None) if self._workload.clients else None
        return () if following is None else (self._ask(following, 0, self._there_ms(now_ms)),)

    def _of(self, number: int) -> Conversation:
        return self._workload.conversations[number]

    def _there_ms(self, sent_ms: float) -> float:
        return sent_ms + self._overhead_ms + self._chance.uniform(0.0, APART_MS)

    def _ask(self, number: int, turn: int, at_ms: float) -> TraceRequest:
        self._asked.append((number, turn))
        said, told = tuple(_prompt(self._of(number), number, turn)), tuple(_answer(self._of(number), number, turn))
        return Spoken(at_ms, len(said), len(told), (), len(told), said=said, told=told)


class Warmed:
    """A crowd after another one, whose requests come first and are not counted."""

    def __init__(self, warming: Crowd, count: int, crowd: Crowd) -> None:
        self._warming, self._count, self._crowd = warming, count, crowd
        self._left = count

    def first(self) -> list[TraceRequest]:
        return self._warming.first()

    def follow(self, number: int, now_ms: float) -> Sequence[TraceRequest]:
        """As a crowd's: the second one begins when the first has all its answers."""
        if number >= self._count:
            return self._crowd.follow(number - self._count, now_ms)
        self._left -= 1
        return self._warming.follow(number, now_ms) if self._left else self._crowd.first(now_ms + QUIET_MS)


def _prompt(conversation: Conversation, number: int, turn: int) -> Iterator[int]:
    """Token ids of all that has been said up to this turn, and of the beginning of the answer."""
    yield from _message(_ids(conversation.system))
    for place, each in enumerate(conversation.turns[: turn + 1]):
        yield from _message(_ids(each.text))
        if place < turn:
            yield from _message(_answer(conversation, number, place))
    yield from _HEAD


def _message(ids: Sequence[int]) -> tuple[int, ...]:
    return (*_HEAD, *ids, *_TAIL)


def _ids(text: str) -> list[int]:
    return [_IDS[word] for word in text.split()]


def _answer(conversation: Conversation, number: int, turn: int) -> Sequence[int]:
    """Token ids that no other answer has."""
    return [IDS + number * 100 + turn] * conversation.turns[turn].answer_tokens
