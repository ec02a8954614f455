"""What a policy is: what it is asked, what it answers, and what it is made from. Values only.

A policy speaks of candidates by their places in the columns. It may keep state between requests, by what it is told was
placed rather than by what it was asked; it is asked by one thread.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from vllm_llmd.router.candidates import Candidates, Milliseconds
from vllm_llmd.router.request import Facts


@dataclass(frozen=True)
class PolicySettings:
    """What every policy is made from. With fewer uncached prompt tokens than `min_remote_tokens` there is no source."""

    min_remote_tokens: int
    rng: random.Random


@dataclass(frozen=True)
class Choice:
    """`destination` decodes; `source` supplies the KV of the prompt up to token `until`, or to its end if that is None.

    Of what is transferred, `transfer_tokens` are waited for. What they have to compute of the prompt takes the
    destination `work_ms` and the source `source_work_ms`; None where the policy does not reckon in times.
    `terms` are what this costs, and `prices` what it would cost to have each candidate do all of it, by term; in
    predicted milliseconds, and empty where the policy does not reckon in them.
    """

    destination: int
    source: int | None = None
    until: int | None = None
    transfer_tokens: float | None = None
    work_ms: float | None = None
    source_work_ms: float | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    prices: Mapping[str, Milliseconds] = field(default_factory=dict)
    """May be reckoned only when looked at, which it keeps what it is made of for: not to be held for long."""


class Policy(Protocol):
    """Decides where a request goes."""

    def choose(self, facts: Facts, candidates: Candidates) -> Choice | None:
        """None if nobody can take it. Never raises: candidates may be none, and their numbers may be anything."""


@runtime_checkable
class RemembersPlaced(Protocol):
    """A policy that may keep state of what has become of its choices: not every one is taken."""

    def placed(self, facts: Facts, candidates: Candidates, choice: Choice) -> None:
        """The request goes where `choice` says, which was made among these candidates. Never raises."""


def note_placed(policy: Policy, facts: Facts, candidates: Candidates, choice: Choice) -> None:
    """Tells the policy, if it wants to know."""
    if isinstance(policy, RemembersPlaced):
        policy.placed(facts, candidates, choice)


Factory = Callable[[PolicySettings], Policy]
"""What the name of a policy stands for, and what an entry point in `vllm_llmd.policies` names."""
