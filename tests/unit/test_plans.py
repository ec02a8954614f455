"""The compiled search for the cheapest plan and its plain twin, which prices every plan, find the same."""

from array import array
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.names import EngineId, Epoch, Role
from vllm_llmd.router.candidates import Candidates, Loads, RateColumns, Roster
from vllm_llmd.router.costs import CHUNK_TOKENS
from vllm_llmd.router.members.membership import Engine, State, Stock
from vllm_llmd.router.members.rates import PRIOR_ROW
from vllm_llmd.router.placement import plans, plans_cpu
from vllm_llmd.router.placement.plans import ALONE, FETCHED, PREFILLED, Asked, Plan
from vllm_llmd.router.placement.sides import MORE_IS_CHEAPER, Party
from vllm_llmd.router.policy import Choice
from vllm_llmd.router.request import Facts
from vllm_llmd.wire import EngineInfo

ODD = (np.nan, np.inf, -np.inf, -1.0, 0.0, 1e300, -1e300, 1e18)
ROLES: tuple[Role, ...] = ("prefill", "decode", "both")


@dataclass(frozen=True)
class Fleet:
    """`odd` is the share of numbers that make no sense, `even` whether engines are alike in all but what they hold.

    `slo` are objectives of the request, `doubts` by which factors predictions are off.
    """

    engines: int
    roles: tuple[Role, ...]
    kinds: int
    odd: float
    even: bool
    cached: str
    prompt: int
    seed: int
    slo: tuple[float | None, float | None] = (None, None)
    doubts: tuple[float, float] = (1.0, 1.0)


objectives_ms = st.one_of(st.none(), st.sampled_from([1e-9, 1.0, 20.0, 300.0, 2000.0, 1e300, np.inf, np.nan]))
doubts = st.sampled_from([1.0, 1.0, 1.1, 2.0, 150.0, np.inf])

fleets = st.builds(
    Fleet,
    st.integers(1, 40),
    st.sampled_from([("both",), ("prefill", "decode"), ("prefill",), ("decode",), ROLES]),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.0, 0.02, 0.5]),
    st.booleans(),
    st.sampled_from(["nothing", "anything", "one", "alike"]),
    st.sampled_from([1, 17, 300, 2000, 9000]),
    st.integers(0, 2**32),
    st.tuples(objectives_ms, objectives_ms),
    st.tuples(doubts, doubts),
)


def candidates(fleet: Fleet, rng: np.random.Generator) -> Candidates:
    engines = [engine(fleet, number, rng) for number in range(fleet.engines)]
    roster = Roster.of(engines, "m")
    blocks = -(-fleet.prompt // roster.block_sizes)
    share = {
        "nothing": np.zeros(len(engines)),
        "anything": rng.random(len(engines)),
        "one": np.arange(len(engines)) == rng.integers(len(engines)),
        "alike": np.full(len(engines), 0.9),
    }
    prefix = (blocks * share[fleet.cached]).astype(np.int64)
    offloaded = (prefix * rng.choice([0.0, 0.0, 0.5, 1.0], len(engines))).astype(np.int64)
    tables = Loads(loads(fleet, rng)), RateColumns(rates(fleet, rng))
    of = Candidates(roster, prefix, offloaded, prefix, *tables)
    return replace(of, doubt=fleet.doubts[0], step_doubt=fleet.doubts[1])


def engine(fleet: Fleet, number: int, rng: np.random.Generator) -> Engine:
    role = fleet.roles[rng.integers(len(fleet.roles))]
    kind, size = f"kind {rng.integers(fleet.kinds)}", int(rng.choice([16, 32, 128]))
    info = EngineInfo(EngineId(f"e{number}"), Epoch(1), role, "", ["m"], size, 1000, 10_000, kind, [])
    return Engine(info, State.READY, 0, stock=Stock(None) if rng.random() < 0.1 else None)


def loads(fleet: Fleet, rng: np.random.Generator) -> np.ndarray:
    most = {"requests": 60, "running": 40, "waiting": 9, "tokens": 9000, "batch": 40}
    return table(Loads.ROW, {name: np.arange(most.get(name, 1000)) for name in Loads.ROW.names or ()}, fleet, rng)


def rates(fleet: Fleet, rng: np.random.Generator) -> np.ndarray:
    prior = dict(zip(RateColumns.ROW.names or (), np.frombuffer(PRIOR_ROW).tolist(), strict=True))
    values = {name: value * np.array([0.1, 1, 1, 1, 3]) for name, value in prior.items()}
    return table(RateColumns.ROW, values, fleet, rng)


def table(row: np.dtype, values: dict[str, np.ndarray], fleet: Fleet, rng: np.random.Generator) -> np.ndarray:
    made = np.zeros(fleet.engines, row)
    for name in row.names or ():
        made[name] = rng.choice(values[name], 1 if fleet.even else fleet.engines)
        odd = rng.random(fleet.engines) < fleet.odd
        made[name][odd] = rng.choice(ODD, odd.sum())
    return made


def asked(fleet: Fleet) -> Asked:
    rng = np.random.default_rng(fleet.seed)
    at = candidates(fleet, rng)
    ttft_ms, tpot_ms = fleet.slo
    facts = Facts("m", array("I"), b"", b"", fleet.prompt, None, ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    more = {"far_ms": rng.normal(0, 100, fleet.engines)} if rng.random() < 0.3 else {}
    return Asked(facts, at, more, 1e-6 * rng.random(fleet.engines), int(rng.choice([0, 1, 256])))


def plan_of(choice: Choice) -> Plan:
    if choice.source is None:
        return Plan(ALONE, choice.destination, choice.destination)
    return Plan(PREFILLED if choice.until is None else FETCHED, choice.destination, choice.source)


@given(fleets)
def test_no_pair_is_cheaper_than_with_one_that_is_as_good_as_the_best_in_everything(fleet: Fleet) -> None:
    question = asked(replace(fleet, odd=0.0))
    parties = question.parties
    imagined = Party(
        *(column.max() if k in MORE_IS_CHEAPER else column.min() for k, column in enumerate(parties)),
    )
    at, source = Party(*parties), Party(*(column[:, None] for column in parties))
    for kind in PREFILLED, FETCHED:
        prices = plans.pair_ms(kind, question.ask, at, source)
        slack = 1e-9 * np.abs(prices)
        assert (plans.pair_ms(kind, question.ask, at, imagined) <= prices + slack).all()
        assert (plans.pair_ms(kind, question.ask, imagined, source) <= prices + slack).all()


SEARCH = plans_cpu.Search()
"""One for all, as in a router: what it found last must not matter."""


@settings(max_examples=300)
@given(fleets)
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_the_search_finds_a_plan_than_which_none_is_cheaper(fleet: Fleet) -> None:
    question = asked(fleet)
    choice, plain = SEARCH.cheapest(question), plans.cheapest(question)
    assert (choice is None) == (plain is None)
    if choice is None or plain is None:
        return
    prices = {plan: ms for some, of in plans.priced(question) for plan, ms in zip(some, of.tolist(), strict=True)}
    found, least = (np.inf if np.isnan(prices[plan]) else prices[plan] for plan in (plan_of(choice), plain))
    assert found == pytest.approx(least, rel=1e-9, abs=1e-9)


@given(fleets)
@pytest.mark.filterwarnings("ignore:overflow")
def test_nobody_computes_alone_what_is_sooner_there_if_it_is_fetched(fleet: Fleet) -> None:
    question = asked(replace(fleet, odd=0.0))
    choice = SEARCH.cheapest(question)
    if choice is None or choice.source is not None:
        return
    ask, parties, place = plans.undoubted(question.ask), question.parties, choice.destination
    at = Party(*(column[[place]] for column in parties))
    alone_ms = plans.total_ms(ask, plans.alone(ask, at)) + at.more_ms + at.chance_ms
    others = [each.everyone for each in question.candidates.roster.remotes if place in each.decoders]
    for sources in ([other for other in each if other != place] for each in others):
        source = Party(*(column[sources] for column in parties))
        fetched_ms = plans.pair_ms(FETCHED, ask, at, source)[~plans.barred(FETCHED, ask, at, source)]
        assert (fetched_ms >= alone_ms - 1e-9 * np.abs(alone_ms)).all()


@given(fleets)
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_the_terms_of_what_is_found_are_those_of_the_plain_formulas(fleet: Fleet) -> None:
    question = asked(fleet)
    choice = SEARCH.cheapest(question)
    if choice is None:
        return
    parties, plan = question.parties, plan_of(choice)
    at, source = (Party(*(column[[place]] for column in parties)) for place in (plan.destination, plan.source))
    plain = (
        plans.alone(question.ask, at),
        plans.prefilled(question.ask, at, source),
        plans.fetched(question.ask, at, source),
    )[plan.kind]
    for name, column in plans.with_slo(question.ask, plain)._asdict().items():
        assert choice.terms[name] == pytest.approx(float(column[0]), rel=1e-9, abs=1e-9, nan_ok=True)
    waited_for = (None, np.minimum(at.own, CHUNK_TOKENS), source.held - at.cached)[plan.kind]
    assert choice.transfer_tokens == (None if waited_for is None else waited_for[0])


@pytest.mark.parametrize("roles", [("both",), ("prefill", "decode")])
@pytest.mark.parametrize("cached", ["nothing", "anything", "one", "alike"])
def test_among_more_engines_than_can_all_be_paired_one_is_found_that_is_as_good(
    roles: tuple[Role, ...], cached: str
) -> None:
    question = replace(asked(Fleet(300, roles, 1, 0.0, True, cached, 9000, 0)), min_remote_tokens=0, more={})
    choice = SEARCH.cheapest(question)
    prices = {plan: ms for some, of in plans.priced(question) for plan, ms in zip(some, of.tolist(), strict=True)}
    assert choice is not None and prices[plan_of(choice)] == pytest.approx(min(prices.values()), rel=1e-3)


@given(fleets)
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_without_an_objective_nothing_can_be_in_vain(fleet: Fleet) -> None:
    question = asked(replace(fleet, slo=(None, None), odd=0.0))
    choice = SEARCH.cheapest(question)
    assert choice is None or (choice.terms["slo_ms"] == 0 and not choice.prices["slo_ms"].any())


@pytest.mark.parametrize("slo", [(None, None), (1000.0, None), (5000.0, 20.0)])
def test_a_search_among_hundreds_of_engines_agrees_with_one_that_prices_all_pairs(
    slo: tuple[float | None, float | None],
) -> None:
    for seed, cached in enumerate(("nothing", "anything", "one", "alike") * 3):
        for roles in (("both",), ("prefill", "decode")):
            question = asked(Fleet(300, roles, 1, 0.0, seed % 2 == 0, cached, 9000, seed, slo, (1.5, 1.2)))
            choice = SEARCH.cheapest(question)
            assert choice is not None and plan_of(choice) == plans.cheapest(question)
