import random

from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.names import EngineId, Role
from vllm_llmd.router.costs import queue_ms
from vllm_llmd.router.decide import Decision, Policy, decide
from vllm_llmd.router.picker import Candidate
from vllm_llmd.router.request import Facts
from vllm_llmd.wire import Load


def engine(name: str, role: Role = "both", prefix: int = 0, queue: float = 0.0, fingerprint: str = "f") -> Candidate:
    return Candidate(EngineId(name), role, fingerprint, block_size=16, prefix_blocks=prefix, queue_ms=queue)


def facts(tokens: int) -> Facts:
    return Facts("m", None, b"", b"", tokens, salt=None)


def choose(tokens: int, *candidates: Candidate, seed: int = 0) -> Decision:
    decision = decide(facts(tokens), candidates, Policy(256, random.Random(seed)))
    assert decision is not None
    return decision


def test_no_candidate_no_decision() -> None:
    assert decide(facts(10), [], Policy(256, random.Random())) is None


def test_the_longest_prefix_wins_over_load() -> None:
    decision = choose(100, engine("busy", prefix=3, queue=1000), engine("idle", prefix=2))
    assert (decision.destination, decision.predicted_blocks) == ("busy", 3)
    assert decision.uncached_tokens == 100 - 48


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


def test_load_counts_what_the_engine_has_and_what_it_does_not_know_of_yet() -> None:
    idle = queue_ms(Load(), 0, 0)
    loads = [Load(running=1), Load(waiting=1), Load(waiting_for_kv=1), Load(prefill_tokens=1)]
    assert all(queue_ms(load, 0, 0) > idle for load in loads)
    assert queue_ms(Load(), 1, 0) > idle and queue_ms(Load(), 0, 1) > idle


roles = st.sampled_from(["prefill", "decode", "both"])
fleets = st.lists(
    st.builds(engine, st.uuids().map(str), roles, st.integers(0, 9), st.floats(0, 100), st.sampled_from("fg")),
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
