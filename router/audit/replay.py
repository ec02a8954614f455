"""Recorded decisions put to other policies: what they would have chosen, and what the cost model thinks of it. Pure.

Every decision is looked at on its own: loads and caches are those that the recorded policy has made.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np

from vllm_llmd.names import EngineId
from vllm_llmd.router.audit.decisions import Outcome
from vllm_llmd.router.audit.recorded import Event, Recorded
from vllm_llmd.router.audit.recording import Began, Ended, Lost
from vllm_llmd.router.candidates import Candidates
from vllm_llmd.router.members.membership import Engine
from vllm_llmd.router.placement.plans import UNTIL_FIRST_BYTE, Asked, alone, fetched, prefilled, with_slo
from vllm_llmd.router.placement.prospects import prospect
from vllm_llmd.router.placement.sides import Party
from vllm_llmd.router.policy import Choice, Policy, note_placed
from vllm_llmd.router.request import Facts

AS_GOOD: Final = 0.001
"""Prices that differ by less, as a share, are the same."""


Make = Callable[[str, int], Policy]


class Score(msgspec.Struct):
    """How a policy's choices compare with those that were taken, over `decisions` in which it chose somebody.

    `agree` is the share with the same destination and source; `cheaper` and `dearer` are shares by predicted price.
    `mean_ms` is the mean predicted price of its choices, `mean_taken_ms` of those taken; `cached_share` is of prompt
    tokens that were cached where they were to come from; `source_share` of choices with a source. `busiest_to_mean` is
    by destinations.
    """

    policy: str
    decisions: int
    agree: float
    cheaper: float
    dearer: float
    mean_ms: float
    mean_taken_ms: float
    cached_share: float
    source_share: float
    busiest_to_mean: float


class TtftError(msgspec.Struct):
    """Predicted time to the first byte against the measured one, of streams that were answered.

    `ratio` is the median of predicted over measured; the errors are shares of what was measured.
    """

    answers: int
    mean_measured_ms: float
    mean_predicted_ms: float
    ratio: float
    error_p50: float
    error_p90: float


class Report(msgspec.Struct):
    """`nobody`: decisions for which there was no engine. `lost`: not in the recording."""

    recorded_policies: list[str]
    decisions: int
    nobody: int
    lost: int
    scores: list[Score]
    ttft: TtftError | None


@dataclass
class _Tally:
    """Sums over the choices of one policy."""

    name: str
    policy: Policy | None = None
    decisions: int = 0
    agreed: int = 0
    cheaper: int = 0
    dearer: int = 0
    total_ms: float = 0.0
    taken_ms: float = 0.0
    cached_tokens: float = 0.0
    prompt_tokens: float = 0.0
    sources: int = 0
    destinations: Counter[EngineId] = field(default_factory=Counter)

    def score(self, engines: int) -> Score:
        count = max(self.decisions, 1)
        busiest = max(self.destinations.values(), default=0)
        return Score(
            policy=self.name,
            decisions=self.decisions,
            agree=self.agreed / count,
            cheaper=self.cheaper / count,
            dearer=self.dearer / count,
            mean_ms=self.total_ms / count,
            mean_taken_ms=self.taken_ms / count,
            cached_share=self.cached_tokens / max(self.prompt_tokens, 1.0),
            source_share=self.sources / count,
            busiest_to_mean=busiest * engines / count,
        )


class Replay:
    """Takes a recording in, event by event. `make` makes a policy of a name and the `min_remote_tokens` of a router."""

    def __init__(self, names: Sequence[str], make: Make) -> None:
        """Raises ConfigError for a policy that there is not."""
        self._make = make
        self._tallies = [_Tally(name) for name in names]
        self._taken = _Tally("taken")
        self._make_policies(0)
        self._began: Began | None = None
        self._recorded: list[str] = []
        self._engines: set[EngineId] = set()
        self._nobody = 0
        self._lost = 0
        self._expected_ms: dict[str, float] = {}
        self._predicted, self._measured = array("d"), array("d")

    def take(self, event: Event) -> None:
        match event:
            case Began():
                self._begin(event)
            case Recorded():
                self._decide(event)
            case Ended():
                self._end(event.id, event.outcome)
            case Lost():
                self._lost += event.decisions

    def report(self) -> Report:
        engines = len(self._engines)
        return Report(
            self._recorded,
            self._taken.decisions,
            self._nobody,
            self._lost,
            [each.score(engines) for each in (self._taken, *self._tallies)],
            ttft_error(self._predicted, self._measured),
        )

    def _make_policies(self, min_remote_tokens: int) -> None:
        for tally in self._tallies:
            tally.policy = self._make(tally.name, min_remote_tokens)

    def _begin(self, began: Began) -> None:
        """Another router, which knew nothing of the one before; the same one goes on after it has lost some."""
        if began == self._began:
            return
        self._began = began
        self._make_policies(began.min_remote_tokens)
        if began.policy not in self._recorded:
            self._recorded.append(began.policy)

    def _decide(self, recorded: Recorded) -> None:
        if recorded.destination is None or self._began is None:
            self._nobody += 1
            return
        taken = Choice(recorded.destination, recorded.source, recorded.until)
        prices = Prices(recorded.facts, recorded.candidates, self._began.min_remote_tokens)
        terms = prices.terms(taken)
        taken_ms = sum(terms.values())
        self._expected_ms[recorded.id] = sum(terms[name] for name in UNTIL_FIRST_BYTE)
        roster = recorded.candidates.roster
        self._engines.update(roster.id(place) for place in roster.decoders.tolist())
        self._taken.agreed += 1
        self._count(self._taken, recorded, taken, taken_ms, taken_ms)
        for tally in self._tallies:
            assert tally.policy is not None, "made when the router's life began"
            choice = choice_of(recorded, tally.policy)
            if choice is not None:
                note_placed(tally.policy, recorded.facts, recorded.candidates, choice)
                tally.agreed += (choice.destination, choice.source) == (taken.destination, taken.source)
                self._count(tally, recorded, choice, sum(prices.terms(choice).values()), taken_ms)

    @staticmethod
    def _count(tally: _Tally, recorded: Recorded, choice: Choice, total_ms: float, taken_ms: float) -> None:
        tally.decisions += 1
        tally.cheaper += total_ms < taken_ms * (1 - AS_GOOD)
        tally.dearer += total_ms > taken_ms * (1 + AS_GOOD)
        tally.total_ms += total_ms
        tally.taken_ms += taken_ms
        tally.cached_tokens += cached_tokens(recorded.facts, recorded.candidates, choice)
        tally.prompt_tokens += recorded.facts.prompt_tokens
        tally.sources += choice.source is not None
        tally.destinations[recorded.candidates.roster.id(choice.destination)] += 1

    def _end(self, decision: str, outcome: Outcome) -> None:
        expected_ms = self._expected_ms.pop(decision, None)
        measured_ms = outcome.first_byte_ms
        whole = outcome.is_stream and outcome.status == 200 and outcome.failure is None
        if expected_ms is not None and measured_ms is not None and measured_ms > 0 and whole:
            self._predicted.append(expected_ms)
            self._measured.append(measured_ms)


def choice_of(recorded: Recorded, policy: Policy) -> Choice | None:
    """What can begin at once, as the router asks for it: among those with room if what is best has none."""

    def is_saturated(engine: Engine) -> bool:
        return engine.info.id in recorded.saturated

    found = prospect(recorded.facts, recorded.candidates, policy, is_saturated)
    return None if found is None else found.choice


class Prices:
    """What plans for one request cost, as the policy `cost` reckons, without terms of other packages."""

    def __init__(self, facts: Facts, candidates: Candidates, min_remote_tokens: int) -> None:
        asked = Asked(facts, candidates, {}, np.zeros(len(candidates)), min_remote_tokens)
        self._ask = asked.ask
        self._parties = asked.parties

    def terms(self, choice: Choice) -> dict[str, float]:
        """Of one plan, whoever has chosen it; what is no number counts as nothing."""
        at = self._party(choice.destination)
        if choice.source is None:
            terms = alone(self._ask, at)
        elif choice.until is None:
            terms = prefilled(self._ask, at, self._party(choice.source))
        else:
            until = np.array(float(choice.until))
            terms = fetched(self._ask, at, self._party(choice.source)._replace(held=until, given=until))
        shown = with_slo(self._ask, terms)
        return {name: float(np.nan_to_num(value)) for name, value in shown._asdict().items()}

    def _party(self, place: int) -> Party:
        return Party(*(column[place] for column in self._parties))


def cached_tokens(facts: Facts, candidates: Candidates, choice: Choice) -> int:
    """Prompt tokens that nobody would have to compute."""
    if choice.source is not None and choice.until is not None:
        return min(choice.until, facts.prompt_tokens)
    place = choice.destination if choice.source is None else choice.source
    return min(int(candidates.prefix_tokens[place]), facts.prompt_tokens)


def ttft_error(predicted_ms: Iterable[float], measured_ms: Iterable[float]) -> TtftError | None:
    """None if nothing was measured."""
    predicted, measured = np.array([*predicted_ms]), np.array([*measured_ms])
    if not len(measured):
        return None
    errors = np.abs(predicted - measured) / measured
    return TtftError(
        answers=len(measured),
        mean_measured_ms=float(measured.mean()),
        mean_predicted_ms=float(predicted.mean()),
        ratio=float(np.median(predicted / measured)),
        error_p50=float(np.quantile(errors, 0.5)),
        error_p90=float(np.quantile(errors, 0.9)),
    )
