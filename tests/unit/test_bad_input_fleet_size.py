"""Ten thousand engines: they join, report, are chosen from, and are told of each other no oftener than can be."""

import random
from array import array

import pytest

from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router import policies
from vllm_llmd.router.decide import decide
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.members.selector import read_selector
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.request import Facts
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.testing.clock import FakeClock
from vllm_llmd.wire import EngineInfo, Heartbeat, Hello, Load, Members, Snapshot

ENGINES = 10_000
FACTS = Facts("m", array("I", range(3000)), b"", b"", 3000, None)


def join(fleet: Fleet, number: int, epoch: int = 1) -> None:
    engine, sender = EngineId(f"e{number}"), b"%d" % number
    info = EngineInfo(engine, Epoch(epoch), "both", "http://e", ["m"], 16, 1000, 4096, "f", [], {"n": str(number)})
    fleet.on_message(sender, Hello(info))
    fleet.on_message(sender, Snapshot(engine, Epoch(epoch), 0, 0, 1, b""))
    fleet.on_message(sender, Heartbeat(engine, Epoch(epoch), 0, 0, 0, Load(free_blocks=1000, running=number % 7)))


@pytest.fixture(scope="module")
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="module")
def fleet(clock: FakeClock) -> Fleet:
    made = Fleet(RouterSettings(), clock, "test")
    for number in range(ENGINES):
        join(made, number)
    made.tick()
    return made


@pytest.mark.parametrize("name", sorted(policies.BUILT_IN))
def test_each_policy_chooses_among_them(fleet: Fleet, name: str) -> None:
    chooser = policies.make(name, PolicySettings(256, random.Random(0)))
    for number in range(20):
        decision = decide(FACTS, fleet.candidates(FACTS, fleet.cut(FACTS)), chooser)
        assert decision is not None
        fleet.place(str(number), decision, FACTS, fleet.cut(FACTS))
        fleet.done(str(number), decision)


def test_one_of_them_can_be_asked_for(fleet: Fleet) -> None:
    asked = Facts("m", None, b"", b"", 10, None, selector=read_selector("n=7777"))
    decision = decide(asked, fleet.candidates(asked, fleet.cut(asked)), policies.make("cost", SETTINGS))
    assert decision is not None and decision.destination == "e7777"


SETTINGS = PolicySettings(256, random.Random(0))


def test_all_are_told_of_all_with_one_message_and_not_again_at_once(fleet: Fleet, clock: FakeClock) -> None:
    fleet.membership.changed = True
    replies = fleet.members_to_publish()
    assert len(replies) == ENGINES and len({id(reply.message) for reply in replies}) == 1
    assert isinstance(replies[0].message, Members)
    join(fleet, 0, epoch=2)
    assert fleet.members_to_publish() == []
    clock.advance(60_000)
    assert len(fleet.members_to_publish()) == ENGINES
