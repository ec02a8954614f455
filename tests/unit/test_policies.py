"""What every policy by its name keeps to, and what each of the plain ones does."""

import random
from collections import Counter
from importlib.metadata import EntryPoint

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.errors import ConfigError
from vllm_llmd.names import EngineId, Epoch, Role
from vllm_llmd.router import policies
from vllm_llmd.router.candidates import Candidates
from vllm_llmd.router.decide import Decision, decide, placed
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.policies import approximate_prefix
from vllm_llmd.router.policy import Choice, Policy, PolicySettings, note_placed
from vllm_llmd.router.request import Facts, read_facts
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.testing.clock import FakeClock
from vllm_llmd.wire import EngineInfo, Heartbeat, Hello, Load, Snapshot

NAMES = sorted(policies.BUILT_IN)


def policy(name: str, seed: int = 0) -> Policy:
    return policies.make(name, PolicySettings(256, random.Random(seed)))


def facts(text: str = "x" * 4000) -> Facts:
    return read_facts("completion", {"prompt": text})


class Site:
    """A fleet without sockets. Engines are added, then asked for."""

    def __init__(self) -> None:
        self.fleet = Fleet(RouterSettings(), FakeClock(), "test")

    def add(self, name: str, role: Role = "both", load: Load | None = None, fingerprint: str = "f") -> None:
        engine = EngineId(name)
        info = EngineInfo(engine, Epoch(1), role, "http://e", ["m"], 16, 100, 10_000, fingerprint, [])
        self.fleet.on_message(name.encode(), Hello(info))
        self.fleet.on_message(name.encode(), Snapshot(engine, Epoch(1), 0, 0, 1, b""))
        self.fleet.on_message(name.encode(), Heartbeat(engine, Epoch(1), 0, 0, 0, load or Load(free_blocks=100)))

    def candidates(self, asked: Facts) -> Candidates:
        return self.fleet.candidates(asked, self.fleet.cut(asked))

    def decide(self, chooser: Policy, asked: Facts | None = None) -> Decision:
        asked = asked or facts()
        candidates = self.candidates(asked)
        decision = decide(asked, candidates, chooser)
        assert decision is not None
        placed(decision, asked, candidates, chooser)
        return decision

    def shares(self, chooser: Policy, requests: int) -> Counter[EngineId]:
        return Counter(self.decide(chooser).destination for _ in range(requests))


def site(*names: str, **loads: Load) -> Site:
    made = Site()
    for name in names:
        made.add(name, load=loads.get(name))
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_has_no_choice_where_there_is_no_candidate(name: str) -> None:
    assert decide(facts(), Site().candidates(facts()), policy(name)) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_takes_the_only_engine_whatever_it_reports(name: str) -> None:
    odd = Load(running=-7, waiting=2**62, prefill_tokens=-1, free_blocks=2**40, step_ms=float("nan"))
    assert site("a", a=odd).decide(policy(name)).destination == "a"


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_spreads_a_burst_over_engines_that_are_all_alike(name: str) -> None:
    burst, chooser = site("a", "b", "c", "d"), policy(name)
    picked: Counter[EngineId] = Counter()
    for number in range(80):
        asked = facts(f"{number} " * 100)
        decision = burst.decide(chooser, asked)
        burst.fleet.place(f"r-{number}", decision, asked, burst.fleet.cut(asked))
        picked[decision.destination] += 1
    assert len(picked) == 4 and max(picked.values()) <= 40


counts = st.integers(-(2**40), 2**40)
loads = st.builds(
    Load,
    running=counts,
    waiting=counts,
    prefill_tokens=counts,
    free_blocks=counts,
    step_ms=st.floats(allow_nan=True, allow_infinity=True),
)
fleets = st.lists(st.tuples(st.sampled_from(["prefill", "decode", "both"]), loads, st.sampled_from("fg")), min_size=1)


@given(fleets, st.integers(0, 9000), st.sampled_from(NAMES))
def test_a_policy_names_engines_that_may_do_what_they_are_to_do(
    fleet: list[tuple[Role, Load, str]], characters: int, name: str
) -> None:
    made, roles = Site(), {}
    for number, (role, load, fingerprint) in enumerate(fleet):
        made.add(str(number), role, load, fingerprint)
        roles[str(number)] = (role, fingerprint)
    decision = made.decide(policy(name), facts("x" * characters))
    role, fingerprint = roles[decision.destination]
    assert role != "prefill" or all(each == "prefill" for each, _ in roles.values())
    if decision.source is not None:
        assert decision.source != decision.destination
        assert roles[decision.source][1] == fingerprint
        assert decision.uncached_tokens >= 256
    assert all(tokens >= 0 for tokens in decision.prefill_tokens.values())


def test_round_robin_goes_round() -> None:
    assert site("a", "b", "c").shares(policy("round_robin"), 9) == {"a": 3, "b": 3, "c": 3}


def test_chance_gives_everyone_a_share() -> None:
    shares = site("a", "b", "c", a=Load(running=100)).shares(policy("random"), 300)
    assert min(shares.values()) > 50


def test_the_least_requests_are_looked_for_among_all() -> None:
    busy = site("a", "b", "c", a=Load(running=3), b=Load(waiting=1), c=Load(running=2, waiting=2))
    assert busy.shares(policy("least_requests"), 10) == {"b": 10}


def test_of_two_drawn_the_one_with_fewer_requests_is_taken() -> None:
    busy = site("a", "b", "c", a=Load(running=3), b=Load(running=2), c=Load(running=1))
    shares = busy.shares(policy("power_of_two"), 300)
    assert shares["a"] == 0 and shares["c"] > shares["b"] > 0


def test_a_text_goes_where_its_beginning_has_gone_before() -> None:
    alike, chooser = site("a", "b", "c", "d"), policy("approximate_prefix")
    first = alike.decide(chooser, facts("one " * 300)).destination
    assert {alike.decide(chooser, facts("one " * 300 + str(n))).destination for n in range(20)} == {first}
    assert {alike.decide(chooser, facts(f"{n} " * 300)).destination for n in range(20)} == {"a", "b", "c", "d"}


def test_a_text_that_was_asked_about_counts_only_where_it_was_placed() -> None:
    alike, chooser, asked = site("a", "b", "c", "d"), policy("approximate_prefix"), facts("one " * 300)
    candidates = alike.candidates(asked)
    chosen = {decide(asked, candidates, chooser).destination for _ in range(40)}  # type: ignore[union-attr]
    assert chosen == {"a", "b", "c", "d"}
    note_placed(chooser, asked, candidates, Choice(candidates.roster.place_of[EngineId("c")]))
    assert {alike.decide(chooser, asked).destination for _ in range(10)} == {"c"}


def test_a_text_is_cut_once_whoever_looks_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = []
    monkeypatch.setattr(approximate_prefix, "chunk_names", lambda asked: cut.append(asked) or [1, 2, 3])
    apart, chooser, asked = site(), policy("approximate_prefix"), facts()
    apart.add("d", role="decode")
    apart.add("p", role="prefill")
    assert apart.decide(chooser, asked).source == "p", "two are picked, and remember it"
    assert cut == [asked]
    apart.decide(chooser, other := facts("y" * 4000))
    assert cut == [asked, other]


def test_it_is_the_next_ones_turn_once_a_request_was_placed() -> None:
    three, chooser = site("a", "b", "c"), policy("round_robin")
    candidates = three.candidates(facts())
    assert {decide(facts(), candidates, chooser).destination for _ in range(5)} == {"a"}  # type: ignore[union-attr]
    assert [three.decide(chooser).destination for _ in range(4)] == ["a", "b", "c", "a"]


def test_a_known_text_goes_elsewhere_where_loads_are_far_apart() -> None:
    uneven, chooser = site("a", "b"), policy("approximate_prefix")
    first = uneven.decide(chooser, facts("one " * 300)).destination
    uneven.fleet.on_message(first.encode(), Heartbeat(first, Epoch(1), 0, 0, 0, Load(running=40)))
    assert uneven.decide(chooser, facts("one " * 300)).destination != first


def test_weights_are_for_prefix_queue_and_kv_use() -> None:
    queued = site("a", "b", a=Load(waiting=3, free_blocks=100), b=Load(free_blocks=10))
    assert queued.shares(policy("weighted"), 10) == {"b": 10}  # 2 * 1 against 2 * 1 + 2 * 0.1
    used = site("a", "b", a=Load(free_blocks=100), b=Load(free_blocks=99))
    assert used.shares(policy("weighted"), 10) == {"a": 10}


class FirstAlways:
    def __init__(self, _: PolicySettings) -> None:
        pass

    def choose(self, _: Facts, candidates: Candidates) -> Choice | None:
        return Choice(0) if len(candidates) else None


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two policies of another package, as if it were installed."""
    here = "tests.unit.test_policies"
    entries = [EntryPoint(name, f"{here}:{value}", policies.GROUP) for name, value in PLUGINS.items()]
    monkeypatch.setattr(policies, "entry_points", lambda group: [each for each in entries if each.group == group])
    monkeypatch.setattr(EntryPoint, "load", lambda self: globals()[self.value.partition(":")[2]])


def no_policy(_: PolicySettings) -> object:
    return object()


PLUGINS = {"first": "FirstAlways", "broken": "no_such_thing", "useless": "no_policy"}


@pytest.mark.usefixtures("elsewhere")
def test_a_policy_of_another_package_is_made_by_its_name() -> None:
    assert "first" in policies.names()
    assert site("a", "b").shares(policy("first"), 5) == {"a": 5}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("name", "said"), [("broken", "no_such_thing"), ("useless", "choose"), ("x", "one of .*first")]
)
def test_a_policy_that_cannot_be_had_is_named(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^policy .*{said}"):
        policy(name)
