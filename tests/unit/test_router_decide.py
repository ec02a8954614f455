import random
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.names import EngineId, Epoch, Role
from vllm_llmd.router import policies
from vllm_llmd.router.candidates import Candidates, Coming, Loads, RateColumns, Roster
from vllm_llmd.router.costs import queue_ms
from vllm_llmd.router.decide import Decision, Supply, decide, decision_of
from vllm_llmd.router.members.membership import Engine, Placed, State
from vllm_llmd.router.policy import Choice, Policy, PolicySettings
from vllm_llmd.router.request import Facts
from vllm_llmd.wire import EngineInfo, Load


@dataclass(frozen=True)
class Candidate:
    """One row of the columns."""

    info: EngineInfo
    prefix: int
    queue: int
    offloaded: int = 0

    @property
    def engine(self) -> EngineId:
        return self.info.id

    @property
    def role(self) -> Role:
        return self.info.role

    @property
    def fingerprint(self) -> str:
        return self.info.fingerprint


def engine(
    name: str, role: Role = "both", prefix: int = 0, queue: int = 0, fingerprint: str = "f", block_size: int = 16
) -> Candidate:
    info = EngineInfo(EngineId(name), Epoch(1), role, "", ["m"], block_size, 100, 100, fingerprint, [])
    return Candidate(info, prefix, queue)


def columns(*rows: Candidate) -> Candidates:
    engines = [Engine(row.info, State.READY, 0) for row in rows]
    for each, row in zip(engines, rows, strict=True):
        each.reported(Load(waiting=row.queue), 0)
    prefix, offloaded = np.array([(row.prefix, row.offloaded) for row in rows], int).reshape(-1, 2).T
    return Candidates(Roster.of(engines, "m"), prefix, offloaded, prefix, Loads.of(engines), RateColumns.of(engines))


def prefix_first(seed: int = 0) -> Policy:
    return policies.make("prefix_first", PolicySettings(256, random.Random(seed)))


def facts(tokens: int) -> Facts:
    return Facts("m", None, b"", b"", tokens, salt=None)


def choose(tokens: int, *candidates: Candidate, seed: int = 0) -> Decision:
    decision = decide(facts(tokens), columns(*candidates), prefix_first(seed))
    assert decision is not None
    return decision


def coming(at: Candidates, **engines: Coming) -> Candidates:
    """With what is under way there."""
    under_way = {EngineId(name): each for name, each in engines.items()}
    blocks = at.roster.coming(under_way, at.prefix_blocks)
    assert blocks is not None
    return replace(at, prefix_blocks=at.prefix_blocks + blocks, coming_blocks=blocks, under_way=under_way)


def test_who_will_find_what_is_only_on_its_way_there_is_told_the_same_source() -> None:
    """It may be served before the one for whom it comes."""
    at = coming(columns(engine("a"), engine("b")), a=Coming(500, EngineId("b"), 480), b=Coming(480))
    decision = decision_of(Choice(0, work_ms=7.0), facts(600), at)
    assert (decision.destination, decision.source, decision.source_until) == ("a", "b", 480)
    assert decision.prefill_tokens == {"a": 600 - 496, "b": 120 - 120}
    assert decision.work_ms == {"a": 7.0, "b": 7.0}
    assert decision.supply == Supply(EngineId("a"), EngineId("b"), 480)
    assert [decision.gives(EngineId(name)) for name in "ab"] == [False, True]
    assert decision.source_least == 240
    assert decision.choice == Choice(0, work_ms=7.0), "what the policy has chosen is kept"


@pytest.mark.parametrize(
    "under_way",
    [
        {"a": Coming(500)},
        {"a": Coming(500, EngineId("left"), 480)},
        {"a": Coming(500, EngineId("b"), 40)},
        {"b": Coming(500, EngineId("a"), 480)},
    ],
)
def test_what_is_computed_there_or_comes_from_who_left_or_is_there_already_needs_no_source(
    under_way: dict[str, Coming],
) -> None:
    at = coming(columns(engine("a", prefix=3), engine("b")), **under_way)
    decision = decision_of(Choice(0), facts(600), at)
    assert (decision.source, decision.supply) == (None, None)


def test_a_source_that_was_chosen_stays() -> None:
    at = coming(columns(engine("a"), engine("b"), engine("c")), a=Coming(500, EngineId("b"), 480))
    decision = decision_of(Choice(0, source=2, until=320), facts(600), at)
    assert (decision.source, decision.source_least) == ("c", None)
    prefilled = decision_of(Choice(0, source=2), facts(600), at)
    assert not prefilled.gives(EngineId("c")), "it computes the prompt"


def test_no_candidate_no_decision() -> None:
    assert decide(facts(10), columns(), prefix_first()) is None


def test_the_longest_prefix_wins_over_load() -> None:
    decision = choose(100, engine("busy", prefix=3, queue=1000), engine("idle", prefix=2))
    assert (decision.destination, decision.predicted_blocks) == ("busy", 3)
    assert decision.uncached_tokens == 100 - 48


def test_of_equal_prefixes_the_one_with_most_on_the_gpu_wins_over_load() -> None:
    rows = [engine("idle", prefix=3), engine("busy", prefix=3, queue=1000), engine("short", prefix=2)]
    rows[0] = replace(rows[0], offloaded=2)
    assert choose(100, *rows).destination == "busy"
    assert choose(100, rows[0], rows[2]).destination == "idle"


def test_of_equal_prefixes_the_least_loaded_wins() -> None:
    assert choose(100, engine("a", queue=2), engine("b", queue=1), engine("c", queue=3)).destination == "b"


def test_of_equals_chance_decides() -> None:
    assert {choose(1, engine("a"), engine("b"), seed=seed).destination for seed in range(50)} == {"a", "b"}


def test_a_prefill_engine_does_not_decode_unless_there_is_no_other() -> None:
    assert choose(1, engine("p", "prefill", prefix=9), engine("d", "decode")).destination == "d"
    alone = choose(1000, engine("p", "prefill"), engine("q", "prefill", queue=1))
    assert (alone.destination, alone.source) == ("p", "q")


def test_a_long_uncached_part_gets_the_prefill_engine_with_the_longest_prefix_then_the_least_load() -> None:
    sources = (
        engine("p", "prefill", prefix=1, queue=9),
        engine("q", "prefill", prefix=1, queue=5),
        engine("r", "prefill"),
    )
    assert choose(1000, engine("d", "decode"), *sources).source == "q"


def test_a_short_uncached_part_gets_no_source() -> None:
    prefill = engine("p", "prefill")
    assert choose(255, engine("d"), prefill).source is None
    assert choose(256, engine("d"), prefill).source == "p"
    assert choose(256, engine("d", prefix=1), prefill).source is None


def test_a_prefill_engine_whose_blocks_are_not_valid_elsewhere_is_no_source() -> None:
    assert choose(1000, engine("d"), engine("p", "prefill", fingerprint="other")).source is None


def test_prefixes_are_compared_in_tokens() -> None:
    assert choose(100, engine("a", prefix=3), engine("b", prefix=2, block_size=32)).destination == "b"


def test_load_counts_requests_and_tokens_ahead_of_each_candidate() -> None:
    engines = [Engine(engine(name).info, State.READY, 0) for name in ("idle", "one request", "one token")]
    engines[1].place("r", Placed(0, 0))
    engines[2].place("r", Placed(0, 1))
    idle, one_request, one_token = queue_ms(Loads.of(engines), RateColumns.of(engines))
    assert idle < one_request < one_token


def test_the_columns_of_a_roster_are_in_one_order() -> None:
    rows = engine("p", "prefill", fingerprint="g"), engine("d", "decode", block_size=32), engine("b", fingerprint="g")
    roster = columns(*rows).roster
    assert [roster.id(place) for place in roster.decoders] == ["d", "b"]
    assert [roster.id(place) for place in roster.prefillers] == ["p"]
    assert roster.kinds[0] == roster.kinds[2] != roster.kinds[1]
    assert roster.block_sizes.tolist() == [16, 32, 16]


@pytest.mark.parametrize(("model", "adapter"), [("m", None), (None, None), ("poet", "poet")])
def test_engines_that_name_blocks_alike_are_looked_up_together(model: str | None, adapter: str | None) -> None:
    rows = engine("a"), engine("b", block_size=32), engine("c")
    infos = [msgspec.structs.replace(row.info, adapters=["poet"]) for row in rows]
    roster = Roster.of([Engine(info, State.READY, 0) for info in infos], model)
    assert {shape: places.tolist() for shape, places in roster.shapes} == {(16, adapter): [0, 2], (32, adapter): [1]}


roles = st.sampled_from(["prefill", "decode", "both"])
fleets = st.lists(
    st.builds(engine, st.uuids().map(str), roles, st.integers(0, 9), st.integers(0, 100), st.sampled_from("fg")),
    min_size=1,
)


@given(fleets, st.integers(0, 2000))
def test_a_source_is_always_a_prefill_engine_other_than_the_destination_and_of_its_kind(
    fleet: list[Candidate], tokens: int
) -> None:
    decision, by_id = choose(tokens, *fleet), {candidate.engine: candidate for candidate in fleet}
    destination = by_id[decision.destination]
    if any(candidate.role != "prefill" for candidate in fleet):
        assert destination.role != "prefill"
    if decision.source is not None:
        source = by_id[decision.source]
        assert source.role == "prefill" and source is not destination
        assert source.fingerprint == destination.fingerprint
        assert decision.uncached_tokens >= 256


def test_what_is_kept_of_a_decision_is_all_but_its_prices() -> None:
    policy = policies.make("cost", PolicySettings(256, random.Random(0)))
    decision = decide(facts(1000), columns(engine("a", "prefill"), engine("b", "decode")), policy)
    assert decision is not None and decision.choice is not None and decision.choice.prices
    kept = decision.without_prices()
    assert kept.choice is not None and not kept.choice.prices
    assert replace(kept, choice=replace(kept.choice, prices=decision.choice.prices)) == decision
