"""The latest decisions, explained or not, for whoever asks why a request went where it went. Pure.

Bounded in number and in bytes; what is oldest goes first. Keeps no prompts and none of the columns a decision was made
from, except those of explanations.
"""

import itertools
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import msgspec

from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Candidates
from vllm_llmd.router.decide import Decision
from vllm_llmd.router.index.texts import Chunks
from vllm_llmd.router.request import Facts

RECORD_BYTES: Final = 1600
"""What a record with its terms and its outcome takes, measured; names that are shared do not count."""

LONGEST_NAME: Final = 256
"""Characters that are kept of what a client or an engine has written."""


class Outcome(msgspec.Struct):
    """What has become of an attempt. `ttft_ms` counts from the request's arrival, the others from when it was sent.

    Tokens are the engine's own counts; None is what it did not tell. `failure` says why there is no whole answer.
    """

    status: int | None = None
    is_stream: bool = False
    ttft_ms: float | None = None
    first_byte_ms: float | None = None
    last_byte_ms: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    failure: str | None = None


class Record(msgspec.Struct):
    """One decision, in short. `destination` is None where nobody could take the request.

    `cached_tokens` of the prompt were expected at the destination. `predicted_ms` is the sum of `terms`, None for a
    policy that does not reckon in milliseconds. `waited_ms` were spent in the queue, `decided_ms` on looking the prompt
    up and choosing. `outcome` is None while the request is under way.
    """

    id: str
    request: str
    at_s: float
    policy: str
    model: str | None
    prompt_tokens: int
    matched_by: Literal["tokens", "text"]
    candidates: int
    destination: EngineId | None
    source: EngineId | None
    until: int | None
    cached_tokens: int
    predicted_ms: float | None
    terms: dict[str, float]
    waited_ms: float
    decided_ms: float
    explained: bool = False
    outcome: Outcome | None = None


@dataclass(frozen=True)
class Made:
    """A decision of an `attempt`, from 1, and all that it was made from. `decision` is None if nobody could take it.

    `saturated` are places of candidates that it was to avoid while others had room, told if it is to be recorded.
    """

    request: str
    attempt: int
    facts: Facts
    chunks: Chunks
    candidates: Candidates
    decision: Decision | None
    waited_ms: float
    decided_ms: float
    saturated: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        """The request's, and from the second decision on which it is."""
        return self.request if self.attempt == 1 else f"{self.request}.{self.attempt}"


class Shown(Protocol):
    """What more there is to tell of a decision."""

    @property
    def size_bytes(self) -> int:
        """Memory that it takes."""

    def shown(self) -> Mapping[str, Any]:
        """As JSON can have it."""


class Sink(Protocol):
    """Takes decisions in as they are made and end. Never waits, never raises."""

    def decided(self, record: Record, made: Made) -> None: ...

    def ended(self, record: Record) -> None: ...


class Decisions:
    """At most `most` records, in `most_bytes`. `wall_s` is the time of day; `sink` gets all of them, kept or not."""

    def __init__(
        self, policy: str, most: int, most_bytes: int, wall_s: Callable[[], float], sink: Sink | None = None
    ) -> None:
        self._policy = policy
        self._most = most
        self._most_bytes = most_bytes
        self._wall_s = wall_s
        self._sink = sink
        self._kept: deque[tuple[Record, Shown | None]] = deque()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def recorded(self) -> bool:
        """Whether they go to a sink, which wants to know who was saturated."""
        return self._sink is not None

    def made(self, made: Made, explanation: Shown | None = None) -> Record:
        """Notes a decision. What becomes of it is told by `ended`."""
        record = _record(made, self._policy, self._wall_s(), explanation is not None)
        self._kept.append((record, explanation))
        self.size_bytes += _size(explanation)
        while self._kept and (len(self._kept) > self._most or self.size_bytes > self._most_bytes):
            self.size_bytes -= _size(self._kept.popleft()[1])
        if self._sink is not None:
            self._sink.decided(record, made)
        return record

    def ended(self, record: Record, outcome: Outcome) -> None:
        """The attempt is over."""
        record.outcome = outcome
        if self._sink is not None:
            self._sink.ended(record)

    def latest(self, limit: int, engine: EngineId | None = None) -> list[Record]:
        """The newest first; only those in which an engine has a part, if one is named."""
        every = (record for record, _ in reversed(self._kept))
        mine = (each for each in every if engine is None or engine in (each.destination, each.source))
        return list(itertools.islice(mine, limit))

    def get(self, decision: str) -> tuple[Record, Shown | None] | None:
        """A decision by its id, with its explanation if there is one."""
        return next((each for each in reversed(self._kept) if each[0].id == decision), None)


def _size(explanation: Shown | None) -> int:
    return RECORD_BYTES if explanation is None else RECORD_BYTES + explanation.size_bytes


def _record(made: Made, policy: str, at_s: float, explained: bool) -> Record:
    facts, decision = made.facts, made.decision
    terms = {} if decision is None else dict(decision.terms)
    return Record(
        made.id,
        made.request,
        at_s,
        policy,
        None if facts.model is None else facts.model[:LONGEST_NAME],
        facts.prompt_tokens,
        "text" if facts.tokens is None else "tokens",
        len(made.candidates),
        None if decision is None else decision.destination,
        None if decision is None else decision.source,
        None if decision is None else decision.source_until,
        0 if decision is None else facts.prompt_tokens - decision.uncached_tokens,
        sum(terms.values()) if terms else None,
        terms,
        made.waited_ms,
        made.decided_ms,
        explained,
    )
