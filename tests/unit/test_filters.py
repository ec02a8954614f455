"""Who may take a request: labels, context, and filters of other packages, for every policy alike."""

import random
from array import array
from dataclasses import replace
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from vllm_llmd.names import EngineId, Epoch, Role
from vllm_llmd.router import policies
from vllm_llmd.router.audit.barred import barred
from vllm_llmd.router.candidates import Candidates
from vllm_llmd.router.decide import Decision, decide, placed
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.members.selector import read_selector
from vllm_llmd.router.placement import filters
from vllm_llmd.router.placement.rosters import KEPT, Wanted
from vllm_llmd.router.policy import Policy, PolicySettings
from vllm_llmd.router.request import Facts, RequestError, read_facts
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.testing.clock import FakeClock
from vllm_llmd.wire import EngineInfo, Heartbeat, Hello, Load, Snapshot

NAMES = sorted(policies.BUILT_IN)


def policy(name: str) -> Policy:
    return policies.make(name, PolicySettings(256, random.Random(0)))


def fleet() -> Fleet:
    return Fleet(RouterSettings(), FakeClock(), "test")


def join(to: Fleet, name: str, role: Role = "both", longest: int = 4096, ready: bool = True, **labels: str) -> None:
    engine = EngineId(name)
    info = EngineInfo(engine, Epoch(1), role, "http://e", ["m"], 16, 100, longest, "f", [], labels)
    to.on_message(name.encode(), Hello(info))
    if ready:
        to.on_message(name.encode(), Snapshot(engine, Epoch(1), 0, 0, 1, b""))
        to.on_message(name.encode(), Heartbeat(engine, Epoch(1), 0, 0, 0, Load(free_blocks=100)))


def decided(by: Fleet, facts: Facts, chooser: Policy) -> Decision | None:
    return decide(facts, by.candidates(facts, by.cut(facts)), chooser)


def text(tokens: int, **body: object) -> Facts:
    return read_facts("completion", {"model": "m", "prompt": "x" * 4 * tokens, **body})


def ids(tokens: int, **body: object) -> Facts:
    return read_facts("completion", {"model": "m", "prompt": [7] * tokens, **body})


def ready(by: Fleet, facts: Facts) -> set[str]:
    return {engine.info.id for engine in by.roster(by.rosters.wanted(facts)).engines}


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_keeps_to_a_selector_for_destinations_and_sources(name: str) -> None:
    site, chooser = fleet(), policy(name)
    for zone in "ab":
        join(site, f"decode-{zone}", "decode", zone=zone)
        join(site, f"prefill-{zone}", "prefill", zone=zone)
    asked = replace(text(1000), selector=read_selector("zone=b"))
    for _ in range(20):
        decision = decided(site, asked, chooser)
        assert decision is not None
        assert (decision.destination, decision.source) == ("decode-b", "prefill-b")


def test_nobody_matches_where_nobody_does() -> None:
    site = fleet()
    join(site, "a", zone="a")
    assert decided(site, replace(text(10), selector=read_selector("zone=b")), policy("cost")) is None


def test_what_is_not_selected_is_not_paid_for() -> None:
    """The very same roster serves all who ask for nothing."""
    site = fleet()
    join(site, "a")
    plain = site.candidates(text(10), site.cut(text(10))).roster
    assert site.candidates(text(100), site.cut(text(100))).roster is plain


def test_selectors_without_end_do_not_take_memory_without_end() -> None:
    site = fleet()
    join(site, "a")
    for number in range(KEPT + 100):
        site.roster(Wanted("m", read_selector(f"x!={number}")))
    assert len(site.rosters._made) == KEPT


def test_labels_that_change_count_at_once() -> None:
    site, asked = fleet(), replace(text(10), selector=read_selector("zone=b"))
    join(site, "a", zone="a")
    assert ready(site, asked) == set()
    join(site, "a", zone="b")
    assert ready(site, asked) == {"a"}


# --- context ------------------------------------------------------------------------------------------------------


@pytest.fixture
def lengths() -> Fleet:
    site = fleet()
    join(site, "short", longest=1000)
    join(site, "middle", longest=4000)
    join(site, "long", longest=9000)
    return site


@pytest.mark.parametrize(
    ("asked", "takers"),
    [
        (text(900), {"short", "middle", "long"}),
        (text(900, max_tokens=200), {"middle", "long"}),
        (text(4000), {"middle", "long"}),
        (text(4001), {"long"}),
        (text(9001), {"short", "middle", "long"}),  # an estimate: let them say
        (ids(1000), {"short", "middle", "long"}),
        (ids(1000, max_tokens=1), {"middle", "long"}),
        (ids(1001), {"middle", "long"}),
        (ids(4001, max_tokens=9000), {"long"}),
        (ids(900, max_tokens=9000), {"short", "middle", "long"}),  # engines may give a shorter answer
        (ids(9001), set()),
        (ids(9001, truncate_prompt_tokens=-1), {"short", "middle", "long"}),
    ],
)
def test_an_engine_too_short_for_a_request_does_not_get_it(lengths: Fleet, asked: Facts, takers: set[str]) -> None:
    assert ready(lengths, asked) == takers


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_keeps_to_the_length(lengths: Fleet, name: str) -> None:
    chooser = policy(name)
    assert {decided(lengths, ids(5000), chooser).destination for _ in range(9)} == {"long"}  # type: ignore[union-attr]


def test_a_prompt_too_long_for_all_is_refused_in_openais_words(lengths: Fleet) -> None:
    with pytest.raises(RequestError, match=r"maximum context length is 9000 tokens.*9001 tokens") as raised:
        lengths.rosters.check(ids(9001))
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("asked", [ids(9000), ids(9001, truncate_prompt_tokens=5), text(10**6), text(1)])
def test_what_an_engine_may_take_is_not_refused(lengths: Fleet, asked: Facts) -> None:
    lengths.rosters.check(asked)


def test_token_ids_that_this_router_has_made_are_an_estimate(lengths: Fleet) -> None:
    asked = replace(text(1), tokens=array("I", [7] * 9001), prompt_tokens=9001, tokenized=True)
    lengths.rosters.check(asked)
    assert len(ready(lengths, asked)) == 3


def test_an_engine_that_is_not_ready_may_be_long_enough(lengths: Fleet) -> None:
    join(lengths, "longer", longest=20_000, ready=False)
    lengths.rosters.check(ids(9001))
    assert ready(lengths, ids(9001)) == set()


def test_an_engine_that_does_not_say_how_long_it_is_takes_everything(lengths: Fleet) -> None:
    join(lengths, "silent", longest=0)
    lengths.rosters.check(ids(10**6))
    assert ready(lengths, ids(10**6)) == {"silent"}


def test_nobody_at_all_is_not_too_short() -> None:
    fleet().rosters.check(ids(10**6))


def test_why_an_engine_is_no_candidate_can_be_told(lengths: Fleet) -> None:
    join(lengths, "b", longest=9000, zone="b")
    asked = replace(ids(5000), selector=read_selector("zone!=b"))
    why = {each.engine: each.why for each in barred(lengths, asked, lengths.candidates(asked, lengths.cut(asked)), [])}
    assert why == {"short": "context too short", "middle": "context too short", "b": "other labels"}


# --- of other packages --------------------------------------------------------------------------------------------


def only_b(_: Facts, candidates: Candidates) -> filters.Mask:
    return np.array([each.info.id.endswith("b") for each in candidates.roster.engines])


def nobody(_: Facts, candidates: Candidates) -> filters.Mask:
    return np.zeros(len(candidates), bool)


def filtered(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    entries = [EntryPoint(which, f"tests.unit.test_filters:{which}", filters.GROUP)]
    monkeypatch.setattr(policies, "entry_points", lambda group: [each for each in entries if each.group == group])
    monkeypatch.setattr(EntryPoint, "load", lambda self: globals()[self.value.partition(":")[2]])


@pytest.mark.parametrize("name", NAMES)
def test_a_filter_of_another_package_binds_every_policys_destinations(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    filtered(monkeypatch, "only_b")
    site, chooser = fleet(), policy(name)
    for which in ("decode-a", "decode-b"):
        join(site, which, "decode")
    join(site, "prefill-a", "prefill")
    for _ in range(20):
        decision = decided(site, text(1000), chooser)
        assert decision is not None and (decision.destination, decision.source) == ("decode-b", "prefill-a")


def test_a_policy_behind_filters_is_told_what_was_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    filtered(monkeypatch, "only_b")
    site, chooser, destinations = fleet(), policy("round_robin"), []
    for which in ("a", "1b", "2b"):
        join(site, which)
    for _ in range(3):
        candidates = site.candidates(text(10), site.cut(text(10)))
        decision = decide(text(10), candidates, chooser)
        assert decision is not None
        placed(decision, text(10), candidates, chooser)
        destinations.append(decision.destination)
    assert destinations == ["1b", "2b", "1b"]


@pytest.mark.parametrize("name", NAMES)
def test_filters_may_leave_nobody(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    filtered(monkeypatch, "nobody")
    site = fleet()
    join(site, "a")
    assert decided(site, text(10), policy(name)) is None
