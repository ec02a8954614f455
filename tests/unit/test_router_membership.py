import itertools

import msgspec
import pytest

from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router.members.membership import TRANSITIONS, Event, Membership, Placed, State
from vllm_llmd.wire import EngineInfo, Load

A = EngineId("a")
INFO = EngineInfo(A, Epoch(1), "both", "http://h", ["m"], 16, 1, 1, "f", [])


@pytest.fixture
def members() -> Membership:
    members = Membership(stale_after_ms=100, gone_after_ms=1000)
    members.tick(0)
    members.join(INFO, 0)
    return members


def state(members: Membership) -> State | None:
    engine = members.get(A)
    return None if engine is None else engine.state


def age(members: Membership, start_ms: int, end_ms: int) -> None:
    for now_ms in range(start_ms, end_ms + 1, 10):
        members.tick(now_ms)


def test_an_engine_is_ready_only_once_its_index_is_exact(members: Membership) -> None:
    assert state(members) is State.JOINING and not members.ready()
    members.index_exact(A)
    assert state(members) is State.READY and [engine.info for engine in members.ready()] == [INFO]


def test_a_silent_engine_is_not_ready_and_then_gone(members: Membership) -> None:
    members.index_exact(A)
    age(members, 0, 100)
    assert state(members) is State.READY
    age(members, 110, 1000)
    assert state(members) is State.STALE and not members.ready()
    members.changed = False
    assert members.tick(1001) == [A]
    assert state(members) is None and members.changed


def test_an_engine_heard_again_must_tell_again_what_it_holds(members: Membership) -> None:
    members.index_exact(A)
    age(members, 0, 200)
    assert members.heard(A, 200)
    assert state(members) is State.JOINING
    assert not members.heard(A, 201)


def test_time_in_which_the_router_stood_still_makes_nobody_stale(members: Membership) -> None:
    members.index_exact(A)
    members.tick(5000)
    assert state(members) is State.READY
    age(members, 5010, 5200)
    assert state(members) is State.STALE


def test_a_new_life_replaces_the_old_one_whose_messages_are_refused(members: Membership) -> None:
    members.index_exact(A)
    assert members.join(msgspec.structs.replace(INFO, epoch=Epoch(2)), 1)
    assert state(members) is State.JOINING
    assert members.standing(A, Epoch(2)) == "current"
    assert members.standing(A, Epoch(1)) == "former"
    assert members.standing(A, Epoch(3)) == "unknown"


def test_a_former_life_may_come_back_when_the_later_one_is_silent(members: Membership) -> None:
    members.join(msgspec.structs.replace(INFO, epoch=Epoch(2)), 1)
    age(members, 0, 200)
    assert members.standing(A, Epoch(1)) == "unknown"
    assert members.join(INFO, 200)
    assert members.standing(A, Epoch(2)) == "former" and members.standing(A, Epoch(1)) == "current"


def test_an_engine_that_left_is_forgotten(members: Membership) -> None:
    members.left(A)
    assert state(members) is None and members.changed and members.standing(A, Epoch(1)) == "unknown"


def test_the_list_is_to_be_published_when_it_changes_and_only_then(members: Membership) -> None:
    members.changed = False
    assert not members.join(INFO, 1) and not members.changed
    members.index_exact(A)
    assert not members.changed
    members.join(msgspec.structs.replace(INFO, workers=["tcp://w"]), 2)
    assert members.changed and members.infos()[0].workers == ["tcp://w"]


def test_a_load_report_covers_what_was_placed_before_the_report_before_it(members: Membership) -> None:
    engine = members.get(A)
    assert engine is not None
    engine.place("early", Placed(5, 0))
    members.reported(A, Load(), 10)
    engine.place("late", Placed(15, 0))
    members.reported(A, Load(running=1), 20)
    assert list(engine.unreported) == ["late"] and engine.load.running == 1
    members.reported(A, Load(), 30)
    assert not engine.unreported


LOADS = [Load(running=3), Load(waiting=3), Load(waiting_for_kv=3)]


@pytest.mark.parametrize("load", LOADS)
def test_ahead_is_what_this_router_has_there_and_what_others_have_by_the_report(
    members: Membership, load: Load
) -> None:
    engine = members.get(A)
    assert engine is not None
    engine.place("early", Placed(5, 100))
    assert (engine.requests_ahead, engine.tokens_ahead) == (1, 100)
    members.reported(A, msgspec.structs.replace(load, prefill_tokens=107), 10)
    assert (engine.requests_ahead, engine.tokens_ahead) == (3, 107)
    engine.place("late", Placed(15, 30))
    engine.place("late", Placed(15, 40))
    assert (engine.requests_ahead, engine.tokens_ahead) == (4, 147)
    engine.answering("early")
    assert (engine.requests_ahead, engine.tokens_ahead) == (4, 47)
    engine.ended("early")
    engine.ended("never placed")
    assert (engine.requests_ahead, engine.tokens_ahead) == (3, 47)


def test_a_report_of_what_this_router_has_sent_says_nothing_of_others(members: Membership) -> None:
    engine = members.get(A)
    assert engine is not None
    for number in range(3):
        engine.place(str(number), Placed(5, 100))
    members.reported(A, Load(running=1, waiting=2, prefill_tokens=9000), 10)
    assert (engine.requests_ahead, engine.tokens_ahead) == (3, 300)


def test_what_an_engine_is_to_supply_counts_by_its_reports(members: Membership) -> None:
    """Whether its destination has asked for it yet, this router does not know."""
    engine = members.get(A)
    assert engine is not None
    engine.place("r", Placed(5, 100, 100, supplies=True))
    assert (engine.requests_ahead, engine.tokens_ahead) == (1, 100)
    members.reported(A, Load(), 10)
    members.reported(A, Load(), 20)
    assert (engine.requests_ahead, engine.tokens_ahead) == (0, 0)
    members.reported(A, Load(running=1, prefill_tokens=70), 30)
    assert (engine.requests_ahead, engine.tokens_ahead) == (1, 70)


def test_blocks_are_wanted_for_what_waits_and_for_what_is_not_reported_yet(members: Membership) -> None:
    engine = members.get(A)
    assert engine is not None
    engine.place("early", Placed(5, 0, 100))
    members.reported(A, Load(prefill_tokens=7, unplaced_tokens=20), 10)
    assert engine.unplaced_ahead == 120
    engine.place("late", Placed(15, 0, 30))
    engine.ended("early")
    assert engine.unplaced_ahead == 50
    members.reported(A, Load(prefill_tokens=7), 20)
    members.reported(A, Load(prefill_tokens=7), 30)
    assert engine.unplaced_ahead == 7
    members.reported(A, Load(unplaced_tokens=-5), 40)
    assert engine.unplaced_ahead == 0


def test_the_version_is_another_after_every_change_of_who_is_there_and_how(members: Membership) -> None:
    versions = [members.version]
    for change in (
        lambda: members.index_exact(A),
        lambda: members.join(msgspec.structs.replace(INFO, workers=["tcp://w"]), 2),
        lambda: members.join(msgspec.structs.replace(INFO, id=EngineId("other")), 3),
        lambda: members.left(A),
    ):
        change()
        versions.append(members.version)
    assert len(set(versions)) == len(versions)
    members.reported(EngineId("other"), Load(), 4)
    assert members.version == versions[-1]


def test_nothing_leads_out_of_gone_and_joining_leads_to_ready_by_an_exact_index_alone() -> None:
    assert not [before for before, _ in TRANSITIONS if before is State.GONE]
    to_ready = [key for key, after in TRANSITIONS.items() if after is State.READY]
    assert to_ready == [(State.JOINING, Event.INDEX_EXACT)]


def test_every_state_can_be_left_for_good() -> None:
    for before, after in itertools.product((State.JOINING, State.READY, State.STALE), (State.GONE,)):
        assert TRANSITIONS[before, Event.LEFT] is after


def test_a_drained_engine_is_ready_but_takes_nothing_until_it_is_undrained_or_lives_again(members: Membership) -> None:
    members.index_exact(A)
    version = members.version
    members.drain(A)
    assert len(members.ready()) == 1 and not members.accepting() and members.version != version
    members.undrain(A)
    assert len(members.accepting()) == 1
    members.drain(A)
    members.join(msgspec.structs.replace(INFO, epoch=Epoch(2)), 1)
    members.index_exact(A)
    assert len(members.accepting()) == 1


def test_an_engine_that_says_it_is_leaving_cannot_be_undrained(members: Membership) -> None:
    members.index_exact(A)
    members.says_leaving(A, True)
    members.undrain(A)
    assert not members.accepting()
    version = members.version
    members.says_leaving(A, True)
    assert members.version == version
    members.says_leaving(A, False)
    assert len(members.accepting()) == 1


def test_an_engine_has_the_requests_placed_on_it_until_they_end_reported_or_not(members: Membership) -> None:
    engine = members.get(A)
    assert engine is not None
    engine.place("r", Placed(0, 10))
    engine.place("r", Placed(0, 10))
    for now_ms in (1, 2, 3):
        members.reported(A, Load(), now_ms)
    assert len(engine.occupancy) == 1 and not engine.unreported
    engine.ended("r")
    assert not len(engine.occupancy)
