"""HOT PATH: one request and the engines that could serve it -> where to decode and who supplies the KV. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Candidates, Roster
from vllm_llmd.router.policy import Choice, Policy, note_placed
from vllm_llmd.router.request import Facts
from vllm_llmd.router.upstream.seen import Seen


class Supply(NamedTuple):
    """`source` supplies `destination` with a prompt, up to token `until`."""

    destination: EngineId
    source: EngineId
    until: int


@dataclass(frozen=True)
class Decision:
    """`predicted_blocks` of the prompt are cached at `destination`, `claimed_blocks` if the index is right.

    `source` supplies KV up to token `source_until`, or to the prompt's end if that is None, unless fewer tokens than
    `source_least` lack. `prefill_tokens` says how many of the prompt's tokens each of the two then computes, and
    `work_ms` how long that takes, where the policy has said so: what others make ready for it counts as well. `terms`
    are its costs in milliseconds; `choice` is what the policy chose, `seen` what the request found there, and
    `source_seen` at the source.
    """

    destination: EngineId
    source: EngineId | None
    predicted_blocks: int
    claimed_blocks: int
    uncached_tokens: int
    terms: Mapping[str, float]
    source_until: int | None = None
    source_least: int | None = None
    prefill_tokens: Mapping[EngineId, int] = field(default_factory=dict)
    work_ms: Mapping[EngineId, float] = field(default_factory=dict)
    choice: Choice | None = None
    seen: Seen | None = None
    source_seen: Seen | None = None

    @property
    def supply(self) -> Supply | None:
        if self.source is None or self.seen is None:
            return None
        return Supply(self.destination, self.source, self.source_until or int(self.seen.prompt_tokens))

    def gives(self, engine: EngineId) -> bool:
        """Whether it supplies what it has, or what others compute there, and computes nothing for it."""
        return engine == self.source and self.source_until is not None

    def new_tokens(self, engine: EngineId) -> int:
        """How many of the prompt's tokens one of the two needs blocks for."""
        return self.uncached_tokens if engine == self.destination else self.prefill_tokens.get(engine, 0)

    def without_prices(self) -> "Decision":
        """The same, to be kept while the request is under way: prices hold on to the columns of all candidates."""
        choice = None if self.choice is None else replace(self.choice, prices={})
        return replace(self, choice=choice)


def decide(facts: Facts, candidates: Candidates, policy: Policy) -> Decision | None:
    """Where the request goes; None if there is no candidate."""
    choice = policy.choose(facts, candidates)
    return None if choice is None else decision_of(choice, facts, candidates)


def placed(decision: Decision, facts: Facts, candidates: Candidates, policy: Policy) -> None:
    """The request goes there: a policy that keeps state of it is told."""
    if decision.choice is not None:
        note_placed(policy, facts, candidates, decision.choice)


def decision_of(choice: Choice, facts: Facts, candidates: Candidates) -> Decision:
    """A choice in terms that hold when the columns are gone."""
    made = choice
    choice, least = supplied_as_others(made, facts, candidates)
    roster, at, source = candidates.roster, choice.destination, choice.source
    predicted_blocks = int(candidates.prefix_blocks[at])
    uncached_tokens = max(facts.prompt_tokens - predicted_blocks * int(roster.block_sizes[at]), 0)
    prefill_tokens = {roster.id(at): uncached_tokens}
    if source is not None:
        until = facts.prompt_tokens if choice.until is None else choice.until
        cached_tokens = int(candidates.prefix_blocks[source]) * int(roster.block_sizes[source])
        prefill_tokens = {
            roster.id(at): min(max(facts.prompt_tokens - until, 0), uncached_tokens),
            roster.id(source): max(until - cached_tokens, 0),
        }
    return Decision(
        destination=roster.id(at),
        source=None if source is None else roster.id(source),
        predicted_blocks=predicted_blocks,
        claimed_blocks=int(candidates.claimed_blocks[at]),
        uncached_tokens=uncached_tokens,
        terms=choice.terms,
        source_until=choice.until,
        source_least=least,
        prefill_tokens=prefill_tokens,
        work_ms=_work_ms(choice, roster),
        choice=made,
        seen=_seen(facts, candidates, at),
        source_seen=None if source is None else _seen(facts, candidates, source),
    )


def supplied_as_others(choice: Choice, facts: Facts, candidates: Candidates) -> tuple[Choice, int | None]:
    """Where what it will find is only on its way there for another request, it comes with the same source.

    Engines serve who is due first. If that is this one, and not the one that has KV sent, it would compute all of it.
    If most is there by its turn, nothing is to be asked for: how many tokens of a text others share is an estimate.
    """
    roster, at = candidates.roster, choice.destination
    coming = candidates.under_way.get(roster.id(at))
    if choice.source is not None or coming is None or coming.source is None:
        return choice, None
    source, block_size = roster.place_of.get(coming.source), int(roster.block_sizes[at])
    there = int(candidates.prefix_blocks[at] - candidates.coming[at]) * block_size
    until = min(coming.supplied, facts.prompt_tokens) // block_size * block_size
    if source is None or source == at or until <= there:
        return choice, None
    return replace(choice, source=source, until=until, source_work_ms=choice.work_ms), max((until - there) // 2, 1)


def _work_ms(choice: Choice, roster: Roster) -> Mapping[EngineId, float]:
    said = {choice.destination: choice.work_ms, choice.source: choice.source_work_ms}
    return {roster.id(at): ms for at, ms in said.items() if at is not None and ms is not None}


def _seen(facts: Facts, candidates: Candidates, place: int) -> Seen:
    loads, block_size = candidates.loads, int(candidates.roster.block_sizes[place])
    cached_tokens = min(int(candidates.prefix_blocks[place]) * block_size, facts.prompt_tokens)
    return Seen(
        batch=float(loads.batch[place]),
        waiting=float(loads.waiting[place]),
        tokens=float(loads.tokens[place]),
        prompt_tokens=float(facts.prompt_tokens),
        cached_tokens=float(cached_tokens),
        offloaded_tokens=float(min(int(candidates.offloaded_blocks[place]) * block_size, cached_tokens)),
    )
