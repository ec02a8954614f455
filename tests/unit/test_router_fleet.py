"""The two pure ends of the link, engine's and router's, over a network that loses, doubles and reorders."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd import wire
from vllm_llmd.errors import MalformedMessageError
from vllm_llmd.kernels.hash_chain import ROOT, block_name, chain_names, salt_of
from vllm_llmd.kv_connector import mirror
from vllm_llmd.kv_connector.link import Dialogue, Say
from vllm_llmd.kv_connector.mirror import Change, Mirror
from vllm_llmd.names import TIERS, BlockName, EngineId, Epoch
from vllm_llmd.router import policies
from vllm_llmd.router.candidates import Candidates
from vllm_llmd.router.decide import decide
from vllm_llmd.router.fleet import Fleet, Reply, Verdict
from vllm_llmd.router.index.prefixes import Difference
from vllm_llmd.router.members.membership import State
from vllm_llmd.router.members.rates import PRIOR, packed
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.request import read_facts
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.upstream.seen import Measured
from vllm_llmd.router.upstream.usage import Usage
from vllm_llmd.testing.clock import FakeClock

A = EngineId("a")
SENDER = b"a"
NAMES = {BlockName(name) for name in range(1, 17)}
SETTINGS = RouterSettings()


def info(epoch: int = 1, engine: EngineId = A, **fields: object) -> wire.EngineInfo:
    plain = wire.EngineInfo(engine, Epoch(epoch), "both", "http://h", ["m"], 2, 99, 9999, "f", [])
    return msgspec.structs.replace(plain, **fields)


def sender(message: wire.Message) -> bytes:
    """As the link does it: an identity for each life."""
    return b"a#%d" % (message.engine.epoch if isinstance(message, wire.Hello) else message.epoch)


@dataclass
class Wire:
    """One engine and one router; what each has sent and the other has not received yet."""

    clock: FakeClock = field(default_factory=FakeClock)
    lives: int = 1
    up: list[wire.Message] = field(default_factory=list)
    down: list[Reply] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start_router()
        self.start_engine()

    def start_router(self) -> None:
        self.fleet = Fleet(SETTINGS, self.clock, f"router {self.lives}")
        self.lives += 1

    def start_engine(self) -> None:
        self.info = info(self.lives)
        self.lives += 1
        self.mirror, self.dialogue = Mirror(self.info), Dialogue(self.info, hello_due_ms=self.clock.now_ms())

    def change(self, change: Change) -> None:
        message = self.mirror.change(change)
        if self.dialogue.welcomed:
            self.up.append(message)

    def pass_time(self, ms: float) -> None:
        self.clock.advance(ms)
        self.down += self.fleet.tick()
        self.pay(self.dialogue.due(self.clock.now_ms()))

    def deliver_up(self, at: int) -> None:
        message = self.up.pop(at)
        self.down += self.fleet.on_message(sender(message), wire.decode_link(wire.encode(message)))

    def deliver_down(self, at: int) -> None:
        reply = self.down.pop(at)
        if reply.to != sender(wire.Hello(self.info)):
            return  # for a life that has ended
        message = wire.decode_link(wire.encode(reply.message))
        self.pay(self.dialogue.on(message, self.clock.now_ms()))

    def pay(self, owed: set[Say]) -> None:
        if Say.HELLO in owed:
            self.up.append(wire.Hello(self.info))
        if Say.SNAPSHOT in owed:
            self.up.extend(self.mirror.snapshot())
        if Say.HEARTBEAT in owed:
            self.up.append(self.mirror.heartbeat(wire.Load()))

    def flow(self) -> None:
        """Delivers everything, in order, until nobody has anything to say."""
        while self.up or self.down:
            if self.up:
                self.deliver_up(0)
            if self.down:
                self.deliver_down(0)

    def settle(self) -> None:
        """A while without loss."""
        for _ in range(60):
            self.flow()
            self.pass_time(500)
        self.flow()


STEPS = [
    *(["change"] * 8),
    *(["up"] * 8),
    *(["down"] * 8),
    *(["time"] * 3),
    *(["lose up", "lose down", "double up", "late up"] * 2),
    *("flow", "router dies", "engine dies", "connection breaks"),
]


@settings(max_examples=500)
@given(st.integers(0, 2**64).map(random.Random), st.sampled_from([0, 1, 2, 4]))
def test_whatever_the_network_did_the_index_ends_up_exact(rng: random.Random, names_per_change: int) -> None:
    net, parts = Wire(), mirror.NAMES_PER_PART
    mirror.NAMES_PER_PART = 3  # so that snapshots have several parts
    try:
        for _ in range(100):
            play(net, rng.choice(STEPS), rng, names_per_change)
        net.settle()
    finally:
        mirror.NAMES_PER_PART = parts
    engine = net.fleet.membership.get(A)
    assert engine is not None and engine.state is State.READY
    assert engine.info.epoch == net.info.epoch
    for tier, mirrored in net.mirror.tiers.items():
        assert set(net.fleet.index.held(A, tier).tolist()) == mirrored.held


def play(net: Wire, step: str, rng: random.Random, names_per_change: int) -> None:
    up, down = rng.randrange(len(net.up) or 1), rng.randrange(len(net.down) or 1)
    match step:
        case "change":  # as many stored as removed: the count of blocks alone must not be what heals
            tier = rng.choice(TIERS)
            mirrored = net.mirror.tiers[tier].held
            held, free = sorted(mirrored), sorted(NAMES - mirrored)
            removed = rng.sample(held, min(names_per_change, len(held)))
            stored = rng.sample(free, min(max(len(removed), 8 - len(held)), len(free)))
            net.change(Change(rng.random() < 0.05, removed, stored, tier))
        case "up" if net.up:
            net.deliver_up(0)
        case "down" if net.down:
            net.deliver_down(0)
        case "lose up" if net.up:
            del net.up[up]
        case "lose down" if net.down:
            del net.down[down]
        case "double up" if net.up:
            net.up.insert(up, net.up[up])
        case "late up" if net.up:
            net.up.append(net.up.pop(up))
        case "time":
            net.pass_time(rng.choice([100, 500, 2500]))
        case "flow":
            net.flow()
        case "router dies":
            net.down.clear()
            net.start_router()
        case "engine dies":
            net.down.clear()
            net.start_engine()
        case "connection breaks":
            net.up.clear()
            net.down.clear()


@pytest.fixture
def net() -> Wire:
    net = Wire()
    net.change(Change(False, [], [BlockName(1), BlockName(2)]))
    net.settle()
    return net


def reasons(replies: Sequence[Reply]) -> list[str]:
    return [reply.message.reason for reply in replies if isinstance(reply.message, wire.SnapshotWanted)]


def beat(net: Wire, seq: int, blocks: int, digest: int = 1 ^ 2) -> list[str]:
    return reasons(net.fleet.on_message(SENDER, wire.Heartbeat(A, net.info.epoch, seq, blocks, digest, wire.Load())))


def test_a_heartbeat_that_agrees_asks_for_nothing(net: Wire) -> None:
    assert beat(net, 1, 2) == []


def test_a_heartbeat_ahead_of_the_changes_shows_a_lost_tail(net: Wire) -> None:
    assert beat(net, 2, 2) == ["lost tail"]


def test_a_heartbeat_with_another_count_or_other_names_shows_drift(net: Wire) -> None:
    assert beat(net, 1, 3) == ["drift"]
    net.settle()
    assert beat(net, 1, 2) == []
    assert beat(net, 1, 2, digest=1 ^ 3) == ["drift"]


def test_what_was_wrong_in_the_index_is_found_healed_and_counted(net: Wire) -> None:
    net.fleet.index.apply(A, np.array([1], np.uint64), np.array([9], np.uint64))
    net.settle()
    assert set(net.fleet.index.held(A).tolist()) == net.mirror.tiers["gpu"].held == {1, 2}
    assert net.fleet.repaired == {A: 2}
    net.start_engine()
    net.settle()
    assert net.fleet.repaired == {A: 2}, "what a new life tells is no repair"


def test_verifying_compares_the_index_with_the_engine_and_changes_nothing(net: Wire) -> None:
    net.fleet.verify(A)
    net.settle()
    assert net.fleet.verdict(A) == Verdict(seq=1, blocks=2, wrong=Difference(0, 0))
    net.fleet.index.apply(A, np.array([1], np.uint64), np.array([8, 9], np.uint64))
    net.fleet.verify(A)
    assert net.fleet.verdict(A) is None
    net.down += net.fleet.tick()
    net.flow()
    assert net.fleet.verdict(A) == Verdict(seq=1, blocks=2, wrong=Difference(missing=1, extra=2))
    assert net.fleet.repaired == {}


def test_a_change_on_its_way_is_no_difference(net: Wire) -> None:
    net.fleet.verify(A)
    net.down += net.fleet.tick()
    net.change(Change(False, [BlockName(1)], [BlockName(3)]))
    net.flow()
    assert net.fleet.verdict(A) == Verdict(seq=2, blocks=2, wrong=Difference(0, 0))


def test_an_index_that_is_being_healed_is_not_verified(net: Wire) -> None:
    assert beat(net, 2, 2) == ["lost tail"]
    net.fleet.verify(A)
    net.settle()
    assert net.fleet.verdict(A) is None


def test_a_snapshot_that_does_not_come_is_asked_for_again_but_not_at_once(net: Wire) -> None:
    assert beat(net, 2, 2) == ["lost tail"]
    assert beat(net, 2, 2) == []
    net.clock.advance(SETTINGS.snapshot_retry_ms)
    assert beat(net, 2, 2) == ["no snapshot yet"]


def test_a_change_that_comes_twice_counts_once_and_asks_for_nothing(net: Wire) -> None:
    change = wire.BlocksChanged(A, net.info.epoch, 2, False, b"", wire.pack_names([BlockName(3)]))
    assert reasons([*net.fleet.on_message(SENDER, change), *net.fleet.on_message(SENDER, change)]) == []
    assert beat(net, 2, 3, digest=1 ^ 2 ^ 3) == []


def test_changes_that_overtake_the_snapshot_are_kept_for_after_it(net: Wire) -> None:
    """Snapshot as of 3; changes 2 and 4 came before it: 2 is part of it, 4 comes on top."""
    for seq in (4, 2):
        stored = wire.pack_names([BlockName(seq)])
        net.fleet.on_message(SENDER, wire.BlocksChanged(A, net.info.epoch, seq, False, b"", stored))
    snapshot = wire.Snapshot(A, net.info.epoch, 3, 0, 1, wire.pack_names([BlockName(7)]))
    assert reasons(net.fleet.on_message(SENDER, snapshot)) == []
    assert set(net.fleet.index.held(A).tolist()) == {4, 7}
    assert beat(net, 4, 2, digest=4 ^ 7) == []


def test_parts_of_different_snapshots_are_never_mixed(net: Wire) -> None:
    beat(net, 9, 0)
    for seq, part, name in ((9, 0, 1), (10, 1, 2), (9, 1, 3), (10, 0, 4)):
        names = wire.pack_names([BlockName(name)])
        net.fleet.on_message(SENDER, wire.Snapshot(A, net.info.epoch, seq, part, 2, names))
    assert set(net.fleet.index.held(A).tolist()) == {2, 4}


def test_an_engine_stays_ready_while_a_gap_is_healed(net: Wire) -> None:
    beat(net, 2, 2)
    assert [engine.info.id for engine in net.fleet.membership.ready()] == [A]


def test_an_unknown_engine_is_asked_for_a_hello_and_a_former_life_is_refused(net: Wire) -> None:
    stranger = wire.Heartbeat(EngineId("b"), Epoch(1), 0, 0, 0, wire.Load())
    assert isinstance(net.fleet.on_message(b"b", stranger)[0].message, wire.HelloWanted)
    former = net.info.epoch
    net.start_engine()
    net.settle()
    for message in (wire.Hello(info(former)), wire.BlocksChanged(A, former, 9, True, b"", b"")):
        [reply] = net.fleet.on_message(b"old", message)
        assert isinstance(reply.message, wire.Refused) and "later life" in reply.message.reason


def test_a_message_for_engines_is_malformed_for_a_router(net: Wire) -> None:
    with pytest.raises(MalformedMessageError, match="Welcome"):
        net.fleet.on_message(SENDER, wire.Welcome("r", 1))


def test_names_that_are_not_whole_change_nothing(net: Wire) -> None:
    with pytest.raises(MalformedMessageError):
        net.fleet.on_message(SENDER, wire.BlocksChanged(A, net.info.epoch, 2, True, b"", b"123"))
    assert len(net.fleet.index.held(A)) == 2


def test_a_hello_with_no_block_size_is_refused(net: Wire) -> None:
    [reply] = net.fleet.on_message(b"b", wire.Hello(info(engine=EngineId("b"), block_size=0)))
    assert isinstance(reply.message, wire.Refused)


def test_members_are_published_once_per_change_to_everyone(net: Wire) -> None:
    net.fleet.members_to_publish()
    assert net.fleet.members_to_publish() == []
    net.fleet.on_message(b"b", wire.Hello(info(engine=EngineId("b"))))
    assert {reply.to for reply in net.fleet.members_to_publish()} == {sender(wire.Hello(net.info)), b"b"}
    assert net.fleet.members_to_publish() == []


def test_goodbye_takes_everything_of_the_engine_away(net: Wire) -> None:
    assert net.fleet.on_message(SENDER, wire.Goodbye(A, net.info.epoch)) == []
    assert not len(net.fleet.index.held(A)) and not net.fleet.membership.all()
    assert net.fleet.members_to_publish() == []


@pytest.mark.parametrize(
    ("model", "salt", "blocks"),
    [
        ("m", None, 2),
        ("alias", None, 2),
        ("poet", None, 1),
        ("m", "tenant", 3),
        ("poet", "tenant", 2),
        ("other", None, 0),
        ("m", "s", 0),
        ("m", 7, 2),
    ],
)
def test_token_prompts_are_matched_by_tokens_adapter_and_salt(model: str, salt: object, blocks: int) -> None:
    """Blocks of two tokens, cached without a salt up to the fourth token, under `tenant` up to the sixth.

    For the adapter `poet` up to the second, and up to the fourth under `tenant`.
    """
    fleet = Fleet(SETTINGS, FakeClock(), "r")
    mine = info(models=["m", "alias"], adapters=["poet", "other"])
    fleet.on_message(SENDER, wire.Hello(mine))
    first = block_name(ROOT, [1, 2], salt_of(["tenant"]))
    second = block_name(first, [3, 4])
    names = [*chain_names([1, 2, 3, 4], 2), first, second, block_name(second, [5, 6])]
    poets = block_name(ROOT, [1, 2], salt_of(["poet", "tenant"]))
    names += [*chain_names([1, 2], 2, salt_of(["poet"])), poets, block_name(poets, [3, 4], salt_of(["poet"]))]
    fleet.on_message(SENDER, wire.Snapshot(A, mine.epoch, 0, 0, 1, wire.pack_names(names)))
    facts = read_facts("completion", {"model": model, "prompt": [1, 2, 3, 4, 5, 6, 7], "cache_salt": salt})
    assert fleet.candidates(facts, fleet.cut(facts)).prefix_blocks.tolist() == [blocks]


def test_candidates_follow_the_fleet_as_it_changes() -> None:
    fleet = Fleet(SETTINGS, FakeClock(), "r")
    facts = read_facts("completion", {"model": "m", "prompt": [1, 2, 3, 4]})
    chunks = fleet.cut(facts)
    assert len(fleet.candidates(facts, chunks)) == 0
    for name in ("a", "b"):
        mine = info(engine=EngineId(name))
        fleet.on_message(name.encode(), wire.Hello(mine))
        assert name not in ids(fleet.candidates(facts, chunks))
        fleet.on_message(name.encode(), wire.Snapshot(mine.id, mine.epoch, 0, 0, 1, b""))
        assert name in ids(fleet.candidates(facts, chunks))
    fleet.on_message(
        b"b", wire.BlocksChanged(mine.id, mine.epoch, 1, False, b"", wire.pack_names(chain_names([1, 2], 2)))
    )
    assert fleet.candidates(facts, chunks).prefix_blocks.tolist() == [0, 1]
    assert ids(fleet.candidates(facts, chunks, tried=[mine.id])) == ["a"]
    fleet.on_message(b"b", wire.Goodbye(mine.id, mine.epoch))
    assert ids(fleet.candidates(facts, chunks)) == ["a"]


def ids(candidates: Candidates) -> list[str]:
    return [engine.info.id for engine in candidates.roster.engines]


def test_a_candidates_prefix_counts_offloaded_blocks_and_says_how_many(net: Wire) -> None:
    chain = [BlockName(name) for name in chain_names([1, 2, 3, 4, 5, 6], 2)]
    net.change(Change(False, [], [chain[0], chain[2]]))
    net.change(Change(False, [], [chain[1]], "cpu"))
    net.flow()
    facts = read_facts("completion", {"prompt": [1, 2, 3, 4, 5, 6, 7]})
    candidates = net.fleet.candidates(facts, net.fleet.cut(facts))
    assert (candidates.prefix_blocks.tolist(), candidates.offloaded_blocks.tolist()) == ([3], [2])
    net.change(Change(True, [], [], "cpu"))
    net.flow()
    candidates = net.fleet.candidates(facts, net.fleet.cut(facts))
    assert (candidates.prefix_blocks.tolist(), candidates.offloaded_blocks.tolist()) == ([1], [0])


def test_the_claims_of_an_engine_that_lacks_what_is_predicted_are_cut_down_after_a_resync(net: Wire) -> None:
    chain = [BlockName(name) for name in chain_names([1, 2, 3, 4, 5, 6, 7, 8], 2)]
    net.change(Change(False, [], chain[:2]))
    net.change(Change(False, [], chain[2:], "cpu"))
    net.flow()
    facts = read_facts("completion", {"prompt": [1, 2, 3, 4, 5, 6, 7, 8, 9]})

    def candidates() -> Candidates:
        return net.fleet.candidates(facts, net.fleet.cut(facts))

    def answer(cached_tokens: int) -> None:
        decision = decide(facts, candidates(), policies.make("prefix_first", PolicySettings(1000, random.Random())))
        assert decision is not None
        prediction = net.fleet.foretold(facts, decision)
        assert prediction is not None and prediction.blocks == 4
        error = net.fleet.observed(prediction, "completion", Usage(9, cached_tokens))
        assert error is not None and error.tokens == 8 - cached_tokens

    for _ in range(18):
        answer(2)
    net.down += net.fleet.tick()
    [asked] = net.down
    assert isinstance(asked.message, wire.SnapshotWanted) and asked.message.reason == "predictions wrong"
    decision = decide(facts, candidates(), policies.make("prefix_first", PolicySettings(1000, random.Random())))
    assert decision is not None and net.fleet.foretold(facts, decision) is None  # while the index is not exact
    net.flow()
    for _ in range(8):
        answer(2)
    found = candidates()
    assert (found.prefix_blocks.tolist(), found.offloaded_blocks.tolist()) == ([1], [0])
    assert found.claimed_blocks.tolist() == [4]
    for _ in range(30):
        answer(8)
    assert candidates().prefix_blocks.tolist() == [4]


def test_what_answers_take_changes_the_rates_of_candidates_and_a_new_life_forgets_its_own(net: Wire) -> None:
    facts = read_facts("completion", {"prompt": list(range(1, 3000))})

    def candidates() -> Candidates:
        return net.fleet.candidates(facts, net.fleet.cut(facts))

    before = candidates().rates.token_ms[0]
    for _ in range(20):
        decision = decide(facts, candidates(), policies.make("cost", PolicySettings(1000, random.Random())))
        assert decision is not None
        net.fleet.answered("r", decision, Measured(3000.0, 4000.0, True, Usage(2999, 0, 11)))
    assert candidates().rates.token_ms[0] > 5 * before
    assert candidates().output_tokens < 110 and candidates().reuse < 0.1
    assert candidates().rates.step_ms[0] == pytest.approx(100, rel=0.1)
    assert net.fleet.models.of(A).answers == 20
    net.start_engine()
    net.settle()
    assert net.fleet.models.of(A).answers == 0


def test_what_an_answer_teaches_of_destination_and_source_counts_at_once() -> None:
    fleet, facts = Fleet(SETTINGS, FakeClock(), "r"), read_facts("completion", {"prompt": list(range(1, 3000))})
    for name in ("d", "s"):
        mine = info(engine=EngineId(name), role="prefill" if name == "s" else "decode")
        fleet.on_message(name.encode(), wire.Hello(mine))
        fleet.on_message(name.encode(), wire.Snapshot(mine.id, mine.epoch, 0, 0, 1, b""))
    for _ in range(20):
        decision = decide(
            facts, fleet.candidates(facts, fleet.cut(facts)), policies.make("cost", PolicySettings(1, random.Random()))
        )
        assert decision is not None and (decision.destination, decision.source) == ("d", "s")
        fleet.answered("r", decision, Measured(3000.0, 4000.0, True, Usage(2999, 2998, 11)))
    found = fleet.candidates(facts, fleet.cut(facts))
    for name in ("d", "s"):
        row, rates = found.rates.rows[[found.roster.place_of[EngineId(name)]]], fleet.models.rates(EngineId(name))
        assert row.tobytes() == packed(rates)
    assert fleet.models.rates(EngineId("s")).token_ms > 2 * PRIOR.token_ms
