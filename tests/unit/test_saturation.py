from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.names import EngineId, Epoch, Role
from vllm_llmd.router.candidates import Roster
from vllm_llmd.router.members.membership import Engine, Placed, State
from vllm_llmd.router.members.occupancy import Occupancy
from vllm_llmd.router.waiting.saturation import Limits, has_room, saturated
from vllm_llmd.wire import EngineInfo, Load

INFO = EngineInfo(EngineId("e"), Epoch(1), "both", "", ["m"], 16, 1000, 4096, "f", [], max_sequences=4)
LIMITS = Limits(engine_queue=2, engine_requests=10, prefill_tokens=1000, fresh_ms=2000)


def engine(*, in_flight: int, tokens: int = 0, role: Role = "both", sequences: int | None = 4) -> Engine:
    made = Engine(msgspec.structs.replace(INFO, role=role, max_sequences=sequences), State.READY, 0)
    for number in range(in_flight):
        made.place(str(number), Placed(1.0, tokens))
    return made


def reporting(made: Engine, load: Load, at_ms: float = 10.0) -> Engine:
    made.reported(load, at_ms)
    return made


def test_an_engine_is_saturated_when_it_has_all_it_runs_and_all_that_may_wait() -> None:
    assert [saturated(engine(in_flight=count), LIMITS, 0.0) for count in (5, 6)] == [False, True]


def test_an_engine_that_does_not_say_is_taken_to_run_what_the_settings_say() -> None:
    assert [saturated(engine(in_flight=count, sequences=None), LIMITS, 0.0) for count in (11, 12)] == [False, True]


def test_a_request_that_ends_makes_room() -> None:
    made = engine(in_flight=6)
    made.ended("3")
    assert not saturated(made, LIMITS, 0.0)


def test_requests_of_other_routers_count_by_its_report() -> None:
    others = Load(running=4, waiting=2, free_blocks=500)
    assert saturated(reporting(engine(in_flight=3), others), LIMITS, 11.0)
    assert not saturated(reporting(engine(in_flight=3), replace_load(others, waiting=1)), LIMITS, 11.0)


def replace_load(load: Load, **changes: int) -> Load:
    return msgspec.structs.replace(load, **changes)


def test_what_happened_since_its_report_counts() -> None:
    made = reporting(engine(in_flight=3), Load(running=4, waiting=1, free_blocks=500))
    made.place("new", Placed(11.0, 0))
    assert saturated(made, LIMITS, 12.0)
    made.ended("0")
    made.ended("1")
    made.reported(Load(running=4, waiting=2, free_blocks=500), 13.0)
    assert not saturated(made, LIMITS, 14.0), "this router has little in flight there"


def test_an_old_report_does_not_count() -> None:
    made = reporting(engine(in_flight=3), Load(running=4, waiting=99))
    assert saturated(made, LIMITS, 2010.0)
    assert not saturated(made, LIMITS, 2011.0)


def test_an_engine_without_memory_for_what_waits_is_saturated_before_it_runs_all_it_could() -> None:
    load = Load(running=1, waiting=2, prefill_tokens=800, free_blocks=10)
    assert saturated(reporting(engine(in_flight=3), load), LIMITS, 11.0)
    assert not saturated(reporting(engine(in_flight=3), replace_load(load, free_blocks=100)), LIMITS, 11.0)


def test_prompt_tokens_that_are_to_be_computed_saturate_until_the_answer_begins() -> None:
    made = engine(in_flight=1, tokens=1000)
    assert saturated(made, LIMITS, 0.0)
    made.answering("0")
    assert not saturated(made, LIMITS, 0.0)


def test_a_report_says_that_tokens_are_computed_before_the_answer_begins() -> None:
    made = reporting(engine(in_flight=2, tokens=600), Load(running=2, prefill_tokens=300, free_blocks=500))
    assert not saturated(made, LIMITS, 11.0)
    made.place("new", Placed(12.0, 700))
    assert saturated(made, LIMITS, 13.0)


@given(
    st.builds(Load, *[st.integers(-(2**63), 2**63 - 1)] * 6),
    st.integers(0, 2),
    st.floats(0, 1e9),
    st.sampled_from([None, 1, 4]),
)
def test_no_report_stops_an_engine_in_which_this_router_has_little(
    load: Load, in_flight: int, now_ms: float, sequences: int | None
) -> None:
    made = reporting(engine(in_flight=in_flight, sequences=sequences), load)
    limits = replace(LIMITS, prefill_tokens=1)
    assert saturated(made, limits, now_ms) is False


@given(st.integers(-(2**63), 2**63 - 1))
def test_no_report_hides_what_this_router_has_in_flight(lie: int) -> None:
    made = reporting(engine(in_flight=6), Load(running=lie, waiting=lie))
    assert saturated(made, LIMITS, 11.0)


def room(*engines: Engine, needs_source: bool = True) -> bool:
    for number, each in enumerate(engines):
        each.info = msgspec.structs.replace(each.info, id=EngineId(str(number)))
    return has_room(Roster.of(engines, "m"), needs_source, LIMITS, 0.0)


def test_one_engine_with_room_is_enough() -> None:
    full, free = engine(in_flight=6), engine(in_flight=5)
    assert room(full, free) and not room(full, full)


def test_without_engines_nobody_waits() -> None:
    assert room()


def test_a_long_prompt_waits_for_a_prefill_engine_and_a_short_one_does_not() -> None:
    decode, prefill = engine(in_flight=0, role="decode"), engine(in_flight=6, role="prefill")
    assert not room(decode, prefill) and room(decode, prefill, needs_source=False)
    assert room(decode, prefill, engine(in_flight=0, role="prefill"))


@pytest.mark.parametrize("again", ["sent", "ended"])
def test_a_request_counts_once(again: str) -> None:
    made = engine(in_flight=1, tokens=5)
    if again == "sent":
        made.place("0", Placed(1.0, 5))
        assert (len(made.occupancy), made.occupancy.tokens, made.occupancy.newer_requests) == (1, 5, 1)
    made.ended("0")
    made.ended("0")
    assert (len(made.occupancy), made.occupancy.tokens, made.occupancy.newer_requests) == (0, 0, 0)


steps = st.tuples(st.sampled_from(["sent", "supplies", "answering", "ended"]), st.integers(0, 4), st.integers(0, 9))


@given(st.lists(steps))
def test_what_is_in_flight_adds_up_whatever_comes_and_goes(told: list[tuple[str, int, int]]) -> None:
    made, open_tokens, own, answering = Occupancy(), dict[int, int](), set[int](), set[int]()
    for what, request, tokens in told:
        if what in ("sent", "supplies"):
            getattr(made, what)(str(request), tokens)
            if request not in open_tokens | dict.fromkeys(answering, 0):
                open_tokens[request] = tokens
                own |= {request} if what == "sent" else set()
        elif what == "answering":
            made.answering(str(request))
            if open_tokens.pop(request, None) is not None:
                answering.add(request)
                own.add(request)
        else:
            made.ended(str(request))
            open_tokens.pop(request, None)
            answering.discard(request)
            own.discard(request)
    assert (len(made), made.own_requests) == (len(open_tokens) + len(answering), len(own))
    assert (made.tokens, made.answering_requests) == (sum(open_tokens.values()), len(answering))
    assert made.own_tokens == sum(tokens for request, tokens in open_tokens.items() if request in own)


changes = st.tuples(st.sampled_from(["gone", "back", "more"]), st.integers(0, 4), st.integers(0, 9))


@given(st.lists(steps), st.lists(changes))
def test_what_would_be_in_flight_is_what_will_be(
    told: list[tuple[str, int, int]], tried: list[tuple[str, int, int]]
) -> None:
    made, gone, more = Occupancy(), set[int](), dict[str, int]()
    for what, request, tokens in told:
        getattr(made, what)(str(request), *([tokens] if what in ("sent", "supplies") else []))
    supposed = made.supposed(7.0)
    for number, (what, request, tokens) in enumerate(tried):
        if what == "gone" and request not in gone:
            supposed.without(str(request))
            gone.add(request)
        elif what == "back" and request in gone:
            supposed.again(str(request))
            gone.remove(request)
        elif what == "more":
            supposed.more(1, tokens)
            more[f"more {number}"] = tokens
    for request in gone:
        made.ended(str(request))
    for name, tokens in more.items():
        made.sent(name, tokens)
    assert len(supposed) == len(made)
    assert (supposed.tokens, supposed.newer_tokens) == (made.tokens, made.newer_tokens)
    assert supposed.newer_requests == made.newer_requests
