"""Engines that say what cannot be, of their load, their size, themselves: no policy may mind, nobody may be stuck."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router import policies
from vllm_llmd.router.candidates import Candidates, Loads, RateColumns, Roster
from vllm_llmd.router.decide import decide
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.members.membership import MOST, Engine, Placed, State
from vllm_llmd.router.members.rates import Rates, packed
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.placement.prospects import prospect
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.request import Facts
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.waiting.saturation import Limits, has_room, saturated
from vllm_llmd.testing.clock import FakeClock
from vllm_llmd.wire import EngineInfo, Heartbeat, Hello, Load, Refused, Snapshot, decode_link, encode

NAMES = sorted(policies.BUILT_IN)
LIMITS = Limits(engine_queue=8, engine_requests=256, prefill_tokens=65_536, fresh_ms=2000)

counts = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([-1, 0, 1, 10**9, 2**62])
floats = st.floats(allow_nan=True, allow_infinity=True)
loads = st.builds(Load, *[counts] * 6, floats, counts, counts, st.none() | counts)
infos = st.builds(
    EngineInfo,
    id=st.uuids().map(lambda each: EngineId(str(each))),
    epoch=st.just(Epoch(1)),
    role=st.sampled_from(["prefill", "decode", "both"]),
    http=st.text(max_size=9),
    models=st.just(["m"]),
    block_size=st.sampled_from([1, 16, 2**31, 2**62]),
    num_blocks=counts,
    max_model_len=counts,
    fingerprint=st.sampled_from(["f", "g", ""]),
    workers=st.just([]),
    labels=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    max_sequences=st.none() | counts,
)
rates = st.builds(Rates, *[floats] * 3)
members = st.lists(st.tuples(infos, loads, loads, counts, st.integers(0, 3)), min_size=1, max_size=6)
prompts = st.sampled_from([0, 1, 300, 5000, 10**6])


def fleet_of(told: list[tuple[EngineInfo, Load, Load, int, int]]) -> Fleet:
    """By messages as they come over the wire, with requests placed between two reports."""
    made = Fleet(RouterSettings(), FakeClock(), "test")
    for info, before, after, _, placed in told:
        sender = info.id.encode()
        for message in (Hello(info), Snapshot(info.id, info.epoch, 0, 0, 1, b"")):
            made.on_message(sender, decode_link(encode(message)))
        for load in (before, after):
            made.on_message(sender, decode_link(encode(Heartbeat(info.id, info.epoch, 0, 0, 0, load))))
            known = made.membership.get(info.id)
            for number in range(placed if known is not None else 0):
                assert known is not None
                known.place(str(number), Placed(1.0, 500))
    return made


@settings(max_examples=80)
@given(members, prompts, st.sampled_from(NAMES), st.integers(0, 99))
def test_whatever_engines_say_every_policy_chooses_one_that_is_there(
    told: list[tuple[EngineInfo, Load, Load, int, int]], tokens: int, name: str, seed: int
) -> None:
    fleet = fleet_of(told)
    facts = Facts("m", None, b"", b"x" * min(tokens, 1000), tokens, None)
    chooser = policies.make(name, PolicySettings(256, random.Random(seed)))
    candidates = fleet.candidates(facts, fleet.cut(facts))
    decision = decide(facts, candidates, chooser)
    assert decision is not None
    ids = {engine.info.id for engine in candidates.roster.engines}
    assert decision.destination in ids and (decision.source is None or decision.source in ids - {decision.destination})
    assert all(math.isfinite(term) for term in decision.terms.values())
    found = prospect(facts, candidates, chooser, lambda each: saturated(each, LIMITS, 0.0))
    assert found is not None and found.engines[0].info.id in ids
    fleet.place("r", decision, facts, fleet.cut(facts))
    fleet.answering("r", decision)
    fleet.done("r", decision)
    fleet.tick()


@settings(max_examples=30)
@given(members)
def test_what_is_shown_of_such_engines_can_be_read(told: list[tuple[EngineInfo, Load, Load, int, int]]) -> None:
    fleet = fleet_of(told)
    assert Metrics(fleet).exposition()
    for engine in fleet.membership.all():
        shown = {name: getattr(engine.load, name) for name in engine.load.__struct_fields__}
        assert all(value is None or 0 <= value <= MOST for value in shown.values())
        json.dumps(shown, allow_nan=False)
        assert engine.requests_ahead >= 0 and engine.tokens_ahead >= 0


@settings(max_examples=40)
@given(members)
def test_no_lie_saturates_a_fleet_in_which_nothing_is_in_flight(
    told: list[tuple[EngineInfo, Load, Load, int, int]],
) -> None:
    fleet = fleet_of([(info, before, after, number, 0) for info, before, after, number, _ in told])
    engines = fleet.membership.ready()
    assert has_room(Roster.of(engines, "m"), True, LIMITS, 0.0)


@settings(max_examples=25)
@example([(Rates(token_ms=0.0, context_ms=1e306), Load(), 0, 0)])
@given(st.lists(st.tuples(rates, loads, st.integers(0, 2**40), st.integers(0, 2**40)), min_size=1, max_size=5))
@pytest.mark.parametrize("name", NAMES)
def test_no_policy_raises_for_columns_that_make_no_sense(name: str, rows: list[tuple[Rates, Load, int, int]]) -> None:
    """Prefixes longer than the prompt, more offloaded than cached, and rates that are no numbers."""
    engines = []
    for number, (rate, load, _, _) in enumerate(rows):
        info = EngineInfo(EngineId(str(number)), Epoch(1), "both", "", ["m"], 16, 100, 10_000, "f", [])
        engine = Engine(info, State.READY, 0, rates=packed(rate))
        engine.reported(load, 1)
        engines.append(engine)
    prefix, offloaded = np.array([row[2:] for row in rows], np.int64).T
    none = Candidates(Roster.of(engines, "m"), prefix, offloaded, prefix, Loads.of(engines), RateColumns.of(engines))
    for tokens in (0, 1, 5000):
        choice = policies.make(name, PolicySettings(256, random.Random(0))).choose(
            Facts("m", None, b"", b"", tokens, None), none
        )
        assert choice is not None and 0 <= choice.destination < len(engines)
        assert choice.source is None or (0 <= choice.source < len(engines) and choice.source != choice.destination)


@pytest.mark.parametrize("block_size", [0, -1, -(2**62)])
def test_an_engine_without_blocks_to_speak_of_is_refused(block_size: int) -> None:
    fleet = Fleet(RouterSettings(), FakeClock(), "test")
    info = EngineInfo(EngineId("e"), Epoch(1), "both", "", ["m"], block_size, 1, 1, "f", [])
    [reply] = fleet.on_message(b"e", Hello(info))
    assert isinstance(reply.message, Refused) and "block_size" in reply.message.reason


@pytest.mark.parametrize("free_blocks", [10**9, 10**18])
def test_an_engine_with_more_free_blocks_than_it_has_is_no_better_than_an_empty_one(free_blocks: int) -> None:
    def engine(name: str, load: Load) -> Engine:
        info = EngineInfo(EngineId(name), Epoch(1), "both", "", ["m"], 16, 1000, 10_000, "f", [])
        made = Engine(info, State.READY, 0)
        made.reported(load, 1)
        return made

    facts = Facts("m", None, b"", b"", 100, None)
    for name in ("weighted", "cost"):
        chooser, picked = policies.make(name, PolicySettings(256, random.Random(0))), set()
        engines = [engine("liar", Load(free_blocks=free_blocks)), engine("honest", Load(free_blocks=1000))]
        zeros = np.zeros(2, np.int64)
        columns = Candidates(Roster.of(engines, "m"), zeros, zeros, zeros, Loads.of(engines), RateColumns.of(engines))
        for _ in range(50):
            decision = decide(facts, replace(columns), chooser)
            assert decision is not None
            picked.add(decision.destination)
        assert picked == {"liar", "honest"}, name
