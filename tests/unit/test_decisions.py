"""The latest decisions, and why they were made."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.names import EngineId, Epoch, Role
from vllm_llmd.router import policies
from vllm_llmd.router.audit import explain
from vllm_llmd.router.audit.barred import Barred, barred, filtered, saturated
from vllm_llmd.router.audit.decisions import RECORD_BYTES, Decisions, Made, Outcome, Record
from vllm_llmd.router.decide import decide
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.placement.filters import Filtered
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.request import Facts, RequestError
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.testing.clock import FakeClock
from vllm_llmd.wire import EngineInfo, Heartbeat, Hello, Load, Snapshot

FACTS = Facts("m", None, b"", b"a text of some length", 4000, None)


def join(fleet: Fleet, name: str, role: Role = "both", model: str = "m", ready: bool = True) -> None:
    engine, epoch = EngineId(name), Epoch(1)
    info = EngineInfo(engine, epoch, role, "http://e", [model], 16, 1000, 10_000, "f", [])
    fleet.on_message(name.encode(), Hello(info))
    if ready:
        fleet.on_message(name.encode(), Snapshot(engine, epoch, 0, 0, 1, b""))
        fleet.on_message(name.encode(), Heartbeat(engine, epoch, 0, 0, 0, Load(running=3, free_blocks=1000)))


def fleet_of(*names: str, clock: FakeClock | None = None) -> Fleet:
    fleet = Fleet(RouterSettings(), clock or FakeClock(), "r")
    for name in names:
        join(fleet, name)
    return fleet


def made(fleet: Fleet, request: str = "r-1", policy: str = "cost", tried: Sequence[EngineId] = (), n: int = 1) -> Made:
    chunks = fleet.cut(FACTS)
    candidates = fleet.candidates(FACTS, chunks, tried)
    decision = decide(FACTS, candidates, policies.make(policy, PolicySettings(256, random.Random(0))))
    return Made(request, n, FACTS, chunks, candidates, decision, waited_ms=1.5, decided_ms=0.25)


def ring(most: int = 100, most_bytes: int = 1 << 20) -> Decisions:
    return Decisions("cost", most, most_bytes, lambda: 1e9)


def why_of(fleet: Fleet, one: Made, tried: Sequence[EngineId] = ()) -> explain.Explanation:
    return explain.explanation(one, barred(fleet, one.facts, one.candidates, tried))


# --- the latest -----------------------------------------------------------------------------------------------------


def test_the_newest_comes_first_and_the_oldest_is_forgotten() -> None:
    decisions, fleet = ring(most=3), fleet_of("a")
    for number in range(5):
        decisions.made(made(fleet, f"r-{number}"))
    assert [record.id for record in decisions.latest(10)] == ["r-4", "r-3", "r-2"]
    assert [record.id for record in decisions.latest(1)] == ["r-4"]
    assert decisions.get("r-1") is None
    assert decisions.get("r-3") is not None


def test_a_record_says_what_was_decided_and_what_it_was_expected_to_cost() -> None:
    [record] = [ring().made(made(fleet_of("a", "b")))]
    assert record.destination in ("a", "b") and record.candidates == 2 and record.source is None
    assert (record.prompt_tokens, record.cached_tokens, record.matched_by) == (4000, 0, "text")
    assert record.predicted_ms == pytest.approx(sum(record.terms.values())) and record.terms["prefill_ms"] > 0
    assert (record.waited_ms, record.decided_ms, record.at_s) == (1.5, 0.25, 1e9)


def test_a_policy_without_prices_predicts_nothing() -> None:
    record = ring().made(made(fleet_of("a"), policy="round_robin"))
    assert record.destination == "a" and record.predicted_ms is None and not record.terms


def test_a_request_that_nobody_can_take_is_a_decision_too() -> None:
    record = ring().made(made(fleet_of()))
    assert record.destination is None and record.candidates == 0


def test_a_second_decision_for_a_request_has_an_id_of_its_own() -> None:
    decisions, fleet = ring(), fleet_of("a", "b")
    decisions.made(made(fleet))
    assert decisions.made(made(fleet, n=2)).id == "r-1.2"
    assert {record.request for record in decisions.latest(10)} == {"r-1"}


def test_decisions_are_found_by_the_engines_that_have_a_part_in_them() -> None:
    decisions, fleet = ring(), Fleet(RouterSettings(), FakeClock(), "r")
    join(fleet, "p", "prefill")
    join(fleet, "d", "decode")
    decisions.made(made(fleet))
    for engine in ("p", "d"):
        assert [record.id for record in decisions.latest(10, EngineId(engine))] == ["r-1"]
    assert decisions.latest(10, EngineId("other")) == []


def test_an_outcome_is_told_once_the_request_is_over() -> None:
    decisions = ring()
    record = decisions.made(made(fleet_of("a")))
    assert record.outcome is None
    decisions.ended(record, Outcome(status=200, ttft_ms=12.0))
    assert decisions.latest(1)[0].outcome == Outcome(status=200, ttft_ms=12.0)


class Listening:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def decided(self, record: Record, made: Made) -> None:
        self.heard.append(f"decided {record.id}")

    def ended(self, record: Record) -> None:
        self.heard.append(f"ended {record.id}")


def test_a_sink_gets_what_is_not_kept_too() -> None:
    sink = Listening()
    decisions = Decisions("cost", 0, 0, lambda: 0.0, sink)
    decisions.ended(decisions.made(made(fleet_of("a"))), Outcome())
    assert not len(decisions) and sink.heard == ["decided r-1", "ended r-1"]


NOBODY = made(fleet_of())
SOMEBODY = made(fleet_of("a"))


@given(st.lists(st.integers(0, 5000)), st.integers(0, 6), st.integers(0, 20_000))
def test_neither_number_nor_bytes_are_exceeded_and_only_the_oldest_go(
    sizes: list[int], most: int, most_bytes: int
) -> None:
    class Sized:
        def __init__(self, size_bytes: int) -> None:
            self.size_bytes = size_bytes

        def shown(self) -> dict[str, int]:
            return {}

    decisions, one = Decisions("p", most, most_bytes, lambda: 0.0), NOBODY
    for number, size in enumerate(sizes):
        decisions.made(replace(one, request=str(number)), Sized(size) if size else None)
    kept = [int(record.id) for record in decisions.latest(len(sizes))]
    assert kept == list(range(len(sizes) - 1, len(sizes) - 1 - len(kept), -1))
    used = [RECORD_BYTES + sizes[number] for number in kept]
    assert len(kept) <= most and sum(used) == decisions.size_bytes <= most_bytes
    oldest = len(sizes) - len(kept) - 1
    if oldest >= 0 and len(kept) < most:
        assert sum(used) + RECORD_BYTES + sizes[oldest] > most_bytes or any(
            RECORD_BYTES + size > most_bytes for size in sizes[oldest:]
        )


# --- why ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "asks"), [(None, False), ("1", True), (" True ", True), ("0", False), ("false", False)]
)
def test_the_header_asks_or_does_not(value: str | None, asks: bool) -> None:
    assert explain.wanted(value) is asks


@pytest.mark.parametrize("value", ["", "2", "yes please", "1,1"])
def test_another_value_is_an_error_that_names_the_header(value: str) -> None:
    with pytest.raises(RequestError, match="x-llmd-explain must be 1 or 0") as caught:
        explain.wanted(value)
    assert caught.value.param == "x-llmd-explain"


def test_all_candidates_are_told_with_prices_that_add_up() -> None:
    fleet = Fleet(RouterSettings(), FakeClock(), "r")
    join(fleet, "p", "prefill")
    join(fleet, "d", "decode")
    shown = why_of(fleet, made(fleet)).shown()
    assert [(each["engine"], each["role"], each["decodes"]) for each in shown["candidates"]] == [
        ("p", "prefill", False),
        ("d", "decode", True),
    ]
    for each in shown["candidates"]:
        assert each["total_ms"] == pytest.approx(sum(each["prices"].values()), abs=0.01)
        assert each["load"]["running"] == 3 and each["load"]["free_blocks"] == 1000
    assert shown["barred"] == []


def test_without_prices_there_is_no_total() -> None:
    fleet = fleet_of("a")
    why = why_of(fleet, made(fleet, policy="random"))
    assert why.shown()["candidates"][0]["total_ms"] is None and why.cheapest(3) == []


def test_everyone_who_is_no_candidate_is_told_with_a_reason() -> None:
    clock = FakeClock()
    fleet = fleet_of("stale", clock=clock)
    clock.advance(RouterSettings().stale_after_ms + 1)
    fleet.membership.tick(clock.now_ms())
    clock.advance(1)
    for name in ("fine", "drained", "failing", "tried"):
        join(fleet, name)
    join(fleet, "other", model="another")
    join(fleet, "new", ready=False)
    fleet.membership.get(EngineId("stale")).heard_ms = 0  # type: ignore[union-attr]
    fleet.membership.tick(clock.now_ms())
    fleet.membership.drain(EngineId("drained"))
    for _ in range(5):
        fleet.health.failed(EngineId("failing"), clock.now_ms())
    one = made(fleet, tried=[EngineId("tried")])
    assert [engine.info.id for engine in one.candidates.roster.engines] == ["fine"]
    assert dict(barred(fleet, one.facts, one.candidates, ["tried"])) == {
        "stale": "stale",
        "drained": "draining",
        "failing": "circuit open",
        "tried": "tried before",
        "other": "other model",
        "new": "joining",
    }


def test_whom_a_filter_keeps_from_decoding_is_told_with_its_name() -> None:
    fleet = fleet_of("a", "b")
    chosen = Filtered(
        policies.make("cost", PolicySettings(256, random.Random(0))),
        {"only_b": lambda _, of: np.array([engine.info.id == "b" for engine in of.roster.engines])},
    )
    chunks = fleet.cut(FACTS)
    candidates = fleet.candidates(FACTS, chunks)
    one = Made("r-1", 1, FACTS, chunks, candidates, decide(FACTS, candidates, chosen), 0.0, 0.0)
    why = explain.explanation(one, filtered(chosen, FACTS, candidates))
    assert one.decision is not None and one.decision.destination == "b"
    assert [(each["engine"], each["decodes"]) for each in why.shown()["candidates"]] == [("a", False), ("b", True)]
    assert why.shown()["barred"] == [{"engine": "a", "why": "filter only_b"}]
    assert [engine for engine, _ in why.cheapest(5)] == ["b"]


def test_who_is_saturated_is_told_unless_all_are() -> None:
    fleet = fleet_of("a", "b")
    one = made(fleet)
    assert saturated(one.candidates, lambda engine: engine.info.id == "a") == [Barred(EngineId("a"), "saturated")]
    assert saturated(one.candidates, lambda _: True) == saturated(one.candidates, lambda _: False) == []
    why = explain.explanation(one, [Barred(EngineId("a"), "saturated")])
    assert [(each["engine"], each["decodes"]) for each in why.shown()["candidates"]] == [("a", False), ("b", True)]


def test_the_summary_tells_the_choice_and_the_cheapest() -> None:
    fleet = fleet_of("a", "b", "c")
    one = made(fleet)
    why = why_of(fleet, one)
    record = ring().made(one, why)
    headers = explain.headers(record, why)
    summary = json.loads(headers["x-llmd-explain"])
    assert headers["x-llmd-decision"] == record.id
    assert summary["destination"] == record.destination and summary["candidates"] == 3
    assert {engine for engine, _ in summary["cheapest"]} == {"a", "b", "c"}
    prices = [price for _, price in summary["cheapest"]]
    assert prices == sorted(prices) and summary["total_ms"] == pytest.approx(sum(summary["terms"].values()), abs=0.1)


@given(st.lists(st.text(min_size=1, max_size=900), min_size=1, max_size=40, unique=True), st.floats())
def test_the_summary_is_short_and_can_be_sent_whatever_engines_are_called(names: list[str], price: float) -> None:
    engines = [EngineId(name) for name in names]
    columns = {name: np.zeros(len(engines)) for name in (*explain.LOADS, "cached_tokens")}
    prices = {"queue_ms": np.full(len(engines), price)}
    why = explain.Explanation(
        engines, ["both"] * len(engines), [True] * len(engines), columns, prices, [Barred(engines[0], "stale")]
    )
    record = replace_destination(ring().made(SOMEBODY), engines[0], price)
    said = explain.headers(record, why)["x-llmd-explain"]
    assert len(said) <= explain.SUMMARY_BYTES and said.isascii() and said.isprintable()
    json.loads(said, parse_constant=pytest.fail)


def replace_destination(record: Record, engine: EngineId, price: float) -> Record:
    record.destination, record.terms, record.predicted_ms = engine, {"queue_ms": price}, price
    return record


def test_an_explanation_knows_how_much_memory_it_takes() -> None:
    small, large = fleet_of("a"), fleet_of(*(f"e{number}" for number in range(50)))
    assert why_of(large, made(large)).size_bytes > 20 * why_of(small, made(small)).size_bytes
