"""What a request can have at once, and what it would wait for."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from vllm_llmd.names import EngineId, Epoch, Role
from vllm_llmd.router import policies
from vllm_llmd.router.candidates import Candidates, Loads, RateColumns, Roster
from vllm_llmd.router.members.membership import Engine, State
from vllm_llmd.router.placement.prospects import Prospect, prospect
from vllm_llmd.router.policy import Choice, PolicySettings, note_placed
from vllm_llmd.router.request import Facts
from vllm_llmd.wire import EngineInfo, Load

NAMES = sorted(policies.BUILT_IN)


def engine(name: str, role: Role = "both", waiting: int = 0, running: int = 0) -> Engine:
    made = Engine(EngineInfo(EngineId(name), Epoch(1), role, "", ["m"], 16, 1000, 9999, "f", []), State.READY, 0)
    made.reported(Load(running=running, waiting=waiting, free_blocks=1000), 1)
    return made


def columns(engines: Sequence[Engine], **prefix: int) -> Candidates:
    blocks = np.array([prefix.get(each.info.id, 0) for each in engines], np.int64)
    none = np.zeros_like(blocks)
    return Candidates(Roster.of(engines, "m"), blocks, none, blocks, Loads.of(engines), RateColumns.of(engines))


def facts(tokens: int = 1000) -> Facts:
    return Facts("m", None, b"", b"", tokens, None)


def found(engines: Sequence[Engine], saturated: str, name: str = "cost", tokens: int = 1000, **prefix: int) -> Prospect:
    policy = policies.make(name, PolicySettings(256, random.Random(0)))
    made = prospect(facts(tokens), columns(engines, **prefix), policy, lambda each: each.info.id in saturated.split())
    assert made is not None
    return made


def names(made: Prospect) -> list[str]:
    return [each.info.id for each in made.engines]


@dataclass
class Said:
    """A policy that says the cheapest of some plans whose engines it sees."""

    plans: dict[str, float]
    priced: bool = True
    asked: list[int] = field(default_factory=list)

    def choose(self, _: Facts, candidates: Candidates) -> Choice | None:
        self.asked.append(len(candidates.roster.decoders))
        by_id = {candidates.roster.id(int(place)): int(place) for place in candidates.roster.decoders}
        cheapest = min((name for name in self.plans if name in by_id), key=lambda name: self.plans[name], default=None)
        if cheapest is None:
            return None
        return Choice(by_id[EngineId(cheapest)], terms={"queue_ms": self.plans[cheapest]} if self.priced else {})


def test_where_there_is_room_the_policy_is_asked_once() -> None:
    said = Said({"a": 1, "b": 2})
    made = prospect(facts(), columns([engine("a"), engine("b")]), said, lambda each: each.info.id == "b")
    assert made is not None and names(made) == ["a"] and made.wait is None
    assert said.asked == [2]


def test_what_waiting_saves_is_the_difference_to_what_can_begin_now() -> None:
    said = Said({"a": 100, "b": 350})
    made = prospect(facts(), columns([engine("a"), engine("b")]), said, lambda each: each.info.id == "a")
    assert made is not None and made.wait is not None
    assert names(made) == ["b"]
    assert (made.wait.engine.info.id, made.wait.tokens, made.wait.saves_ms) == ("a", 1000, 250)


def test_a_policy_without_prices_takes_the_best_that_has_room() -> None:
    said = Said({"a": 1, "b": 2}, priced=False)
    made = prospect(facts(), columns([engine("a"), engine("b")]), said, lambda each: each.info.id == "a")
    assert made is not None and names(made) == ["b"] and made.wait is None


def test_a_policy_that_was_asked_twice_remembers_what_was_placed() -> None:
    engines, asked = [engine("a"), engine("b")], replace(facts(), text=b"one " * 300)
    chooser, candidates = policies.make("approximate_prefix", PolicySettings(256, random.Random(0))), columns(engines)
    note_placed(chooser, asked, candidates, Choice(0))
    made = prospect(asked, candidates, chooser, lambda each: each.info.id == "a")
    assert made is not None and names(made) == ["b"]
    note_placed(chooser, asked, candidates, made.choice)
    sent = Counter(names(made)[0] for _ in range(40) if (made := prospect(asked, candidates, chooser, lambda _: False)))
    assert min(sent["a"], sent["b"]) > 5  # both have it by now


def test_where_all_are_saturated_it_is_what_the_policy_says() -> None:
    said = Said({"a": 1, "b": 2})
    made = prospect(facts(), columns([engine("a"), engine("b")]), said, lambda _: True)
    assert made is not None and names(made) == ["a"] and made.wait is None


def test_nobody_is_nothing() -> None:
    assert prospect(facts(), columns([]), Said({}), lambda _: True) is None


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_begins_at_one_that_has_room_if_any_has(name: str) -> None:
    engines = [engine(each) for each in "abcdef"]
    for _ in range(10):
        assert set(names(found(engines, "a b c e f", name, a=50, b=10))) == {"d"}


def test_a_cached_prefix_is_worth_a_wait_where_it_cannot_be_fetched() -> None:
    engines = [engine("a"), engine("b")]
    made = found(engines, "a", tokens=160, a=9)
    assert made.wait is not None and made.wait.engine.info.id == "a" and made.wait.tokens == 16
    assert made.wait.saves_ms == pytest.approx(144 * 0.1, rel=0.2)


def test_a_prefill_engine_that_is_saturated_is_waited_for_or_left() -> None:
    engines = [engine("d", "decode"), engine("p", "prefill"), engine("q", "prefill", waiting=5)]
    made = found(engines, "p")
    assert names(made) == ["d", "q"]
    assert made.wait is not None and made.wait.engine.info.id == "p"


def test_a_source_that_only_gives_what_it_has_cached_need_have_no_room() -> None:
    engines = [engine("holder", running=200), engine("idle")]
    made = found(engines, "holder", tokens=4000, holder=200)
    assert made.choice.source == 0 and names(made) == ["idle"] and made.wait is None


def test_without_a_prefill_engine_that_has_room_it_is_what_the_policy_says() -> None:
    made = found([engine("d", "decode"), engine("p", "prefill")], "p")
    assert names(made) == ["d", "p"] and made.wait is None
