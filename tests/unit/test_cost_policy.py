"""Which plan the policy `cost` takes, and that none is cheaper."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.names import EngineId, Epoch, Role
from vllm_llmd.router import policies
from vllm_llmd.router.candidates import Candidates, Loads, RateColumns, Roster
from vllm_llmd.router.decide import Decision, decide
from vllm_llmd.router.members.membership import Engine, State, Stock
from vllm_llmd.router.members.rates import PRIOR, Rates, packed
from vllm_llmd.router.placement.plans import Asked
from vllm_llmd.router.policies.cost import Cost
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.request import Facts
from vllm_llmd.wire import EngineInfo, Load

SETTINGS = PolicySettings(256, random.Random(0))
IDLE = Load(free_blocks=1000)


@dataclass(frozen=True)
class Row:
    """One engine, idle and empty unless told otherwise."""

    name: str
    role: Role = "both"
    prefix: int = 0
    offloaded: int = 0
    cached: int = 0
    load: Load = IDLE
    rates: Rates = PRIOR
    fingerprint: str = "f"
    stock: bool = False

    def engine(self) -> Engine:
        info = EngineInfo(EngineId(self.name), Epoch(1), self.role, "", ["m"], 16, 1000, 10_000, self.fingerprint, [])
        engine = Engine(info, State.READY, 0, stock=Stock(None) if self.stock else None, rates=packed(self.rates))
        engine.reported(self.load, 0, self.cached)
        return engine


def busy(running: int = 0, **more: int) -> Load:
    return Load(**{"running": running, "free_blocks": 1000, **more})


def columns(rows: Sequence[Row]) -> Candidates:
    engines = [row.engine() for row in rows]
    prefix, offloaded = np.array([(row.prefix, row.offloaded) for row in rows], int).reshape(-1, 2).T
    return Candidates(Roster.of(engines, "m"), prefix, offloaded, prefix, Loads.of(engines), RateColumns.of(engines))


def facts(tokens: int) -> Facts:
    return Facts("m", None, b"", b"", tokens, salt=None)


def choose(tokens: int, *rows: Row) -> Decision:
    decision = decide(facts(tokens), columns(rows), policies.make("cost", replace(SETTINGS, rng=random.Random(0))))
    assert decision is not None
    return decision


def pair(decision: Decision) -> tuple[str, str | None, int | None]:
    return decision.destination, decision.source, decision.source_until


# --- one engine -----------------------------------------------------------------------------------------------------


def test_a_cached_prefix_is_worth_what_it_saves() -> None:
    assert choose(4000, Row("cached", prefix=200), Row("empty")).destination == "cached"
    queued = Row("cached", prefix=200, load=busy(prefill_tokens=100_000), stock=True)
    assert choose(4000, queued, Row("empty")).destination == "empty"


def test_tokens_that_wait_cost_more_than_requests_that_decode() -> None:
    assert choose(100, Row("a", load=busy(prefill_tokens=8000)), Row("b", load=busy(2))).destination == "b"


def test_what_others_lose_counts() -> None:
    """The same wait on both, but on one of them forty others stand still while a prompt is computed."""
    crowded, queued = Row("crowded", load=busy(40)), Row("queued", load=busy(prefill_tokens=400))
    assert choose(4000, crowded, queued).destination == "queued"


def test_what_another_cache_holds_is_not_held_twice_for_little() -> None:
    """The more is wanted again, the longer a queue is worth joining."""
    holder = Row("holder", prefix=200, load=busy(prefill_tokens=4500), stock=True)
    for reuse, expected in (0.1, "empty"), (0.9, "holder"):
        at = replace(columns([holder, Row("empty")]), reuse=reuse)
        decision = decide(facts(4000), at, policies.make("cost", SETTINGS))
        assert decision is not None and decision.destination == expected


def test_an_engine_without_blocks_to_give_is_waited_for_only_if_need_be() -> None:
    packed_full = Row("full", load=Load(running=3, free_blocks=10), cached=1000)
    assert choose(4000, packed_full, Row("other", load=busy(3))).destination == "other"
    assert choose(4000, packed_full).terms["blocks_ms"] > 0


def test_requests_that_wait_for_blocks_are_before_those_that_come_later() -> None:
    """Two decode as many and have as many blocks left, which on one of them are already spoken for."""
    row = Row("d", "decode", load=Load(running=20, free_blocks=300, unplaced_tokens=0))
    queued = replace(row, name="queued", load=Load(running=20, free_blocks=300, unplaced_tokens=12_000))
    assert choose(4000, queued, row, Row("p", "prefill")).destination == "d"
    assert choose(4000, queued, Row("p", "prefill")).terms["blocks_ms"] > 0


def test_who_will_come_counts_so_that_a_prompt_goes_where_little_of_it_is_computed() -> None:
    """Though its own first token comes later there."""
    short = Row("short", load=busy(prefill_tokens=1000))
    long = Row("long", prefix=200, load=busy(prefill_tokens=4500), stock=True)
    decision = choose(4000, short, long)
    assert decision.destination == "long" and decision.choice is not None
    own_ms = decision.choice.prices["queue_ms"] + decision.choice.prices["prefill_ms"]
    assert own_ms[0] < own_ms[1]
    assert choose(4000, Row("idle")).terms["congestion_ms"] == 0


# --- objectives -----------------------------------------------------------------------------------------------------


QUEUE = Row("queue", load=busy(waiting=1, prefill_tokens=20_000))
CROWD = Row("crowd", load=busy(6))
"""Its first token comes sooner than in the queue, but six others stand still for it."""


def choose_for(ttft_ms: float | None, tpot_ms: float | None, *rows: Row, doubt: float = 1.5) -> Decision:
    at = replace(columns(rows), doubt=doubt, step_doubt=doubt)
    wanted = replace(facts(4000), ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    decision = decide(wanted, at, policies.make("cost", replace(SETTINGS, rng=random.Random(0))))
    assert decision is not None
    return decision


def test_a_tight_objective_for_the_first_token_goes_where_it_is_kept_and_a_loose_one_leaves_that_to_others() -> None:
    assert choose_for(None, None, QUEUE, CROWD).destination == "queue"
    assert choose_for(1000, None, QUEUE, CROWD).destination == "crowd"
    assert choose_for(100_000, None, QUEUE, CROWD).destination == "queue"


def test_an_objective_that_is_missed_wherever_it_goes_does_not_drive_it_to_others_cost() -> None:
    assert choose_for(1, None, QUEUE, CROWD).destination == "queue"


def test_an_objective_for_each_token_goes_where_steps_are_short() -> None:
    slow = Row("slow", load=busy(waiting=1, prefill_tokens=1000), rates=replace(PRIOR, step_ms=40.0))
    queued = Row("queued", load=busy(waiting=1, prefill_tokens=60_000))
    assert choose_for(None, None, slow, queued).destination == "slow"
    assert choose_for(None, 20, slow, queued).destination == "queued"
    assert choose_for(None, 1000, slow, queued).destination == "slow"


def test_what_a_miss_costs_is_shown_for_everybody() -> None:
    decision = choose_for(1000, 20, QUEUE, CROWD)
    assert decision.terms["slo_ms"] > 0 and decision.choice is not None
    queue_ms, crowd_ms = decision.choice.prices["slo_ms"]
    assert queue_ms > crowd_ms == pytest.approx(decision.terms["slo_ms"])


def test_of_a_miss_all_that_the_plan_costs_is_lost() -> None:
    for doubt in 1.0, 1.5, 100.0:
        terms = dict(choose_for(1, None, QUEUE, doubt=doubt).terms)
        slo_ms = terms.pop("slo_ms")
        assert sum(terms.values()) / 2 < slo_ms <= sum(terms.values())


def test_prompts_on_an_engine_that_only_prefills_do_not_stand_still() -> None:
    rows = [Row("d", "decode"), Row("p", "prefill", load=busy(30))]
    assert choose(4000, *rows).terms["prefill_interference_ms"] == 0
    assert choose(4000, Row("b", load=busy(30))).terms["prefill_interference_ms"] > 0


def test_what_is_offloaded_costs_more_than_what_is_on_the_gpu_and_less_than_what_is_not_cached() -> None:
    gpu, cpu, none = Row("gpu", prefix=200), Row("cpu", prefix=200, offloaded=200), Row("none")
    assert choose(4000, gpu, cpu).destination == "gpu"
    assert choose(4000, cpu, none).destination == "cpu"


def test_a_slow_engine_gets_what_a_fast_one_has_no_time_for() -> None:
    slow = Row("slow", rates=replace(PRIOR, token_ms=1.0))
    assert choose(1000, slow, Row("fast")).destination == "fast"
    assert choose(1000, slow, Row("fast", load=busy(prefill_tokens=20_000))).destination == "slow"


def test_of_equals_chance_decides() -> None:
    rows = [Row(name) for name in "abcd"]
    chooser = policies.make("cost", SETTINGS)
    picked = Counter(decide(facts(500), columns(rows), chooser).destination for _ in range(200))  # type: ignore[union-attr]
    assert min(picked.values()) > 20 and len(picked) == 4


def test_the_terms_add_up_to_what_made_the_choice() -> None:
    decision = choose(4000, Row("a", load=busy(3), prefix=10, offloaded=5, cached=990), Row("b", load=busy(900)))
    assert decision.choice is not None
    for name, column in decision.choice.prices.items():
        assert column[0] == decision.terms[name] >= 0


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_an_engine_that_only_decodes_has_long_prompts_computed_by_the_least_busy_of_those_that_prefill() -> None:
    rows = [Row("d", "decode"), Row("p", "prefill", load=busy(prefill_tokens=9000)), Row("q", "prefill")]
    assert pair(choose(4000, *rows)) == ("d", "q", None)
    assert pair(choose(200, *rows)) == ("d", None, None)


def test_a_source_that_has_the_prefix_beats_one_that_is_less_busy() -> None:
    rows = [Row("d", "decode"), Row("p", "prefill", prefix=200, load=busy(prefill_tokens=500)), Row("q", "prefill")]
    decision = choose(4000, *rows)
    assert pair(decision) == ("d", "p", None)
    assert decision.prefill_tokens == {"d": 0, "p": 800}


def test_a_prefix_is_fetched_from_an_engine_that_is_too_busy_to_decode() -> None:
    holder = Row("holder", prefix=200, load=busy(200))
    decision = choose(4000, holder, Row("idle"))
    assert pair(decision) == ("idle", "holder", 3200)
    assert decision.prefill_tokens == {"idle": 800, "holder": 0}


def test_a_prefix_is_fetched_for_more_than_predictions_are_off() -> None:
    """A second copy is made for an uncertain gain; but nobody computes that copy who could fetch it."""
    chooser, found = policies.make("cost", SETTINGS), []
    for running in 2, 6:
        at = columns([Row("holder", prefix=200, load=busy(running)), Row("idle")])
        decisions = [decide(facts(4000), replace(at, doubt=doubt), chooser) for doubt in (1.0, 3.0)]
        found.append([(each.destination, each.source) for each in decisions if each is not None])
    assert found == [[("idle", "holder"), ("holder", None)], [("idle", "holder"), ("idle", "holder")]]


def test_what_is_being_computed_for_others_is_fetched_when_the_queue_is_done() -> None:
    at = columns([Row("computes", prefix=200, load=busy(200)), Row("idle")])
    at = replace(at, coming_blocks=np.array([200, 0]))
    decision = decide(facts(4000), at, policies.make("cost", SETTINGS))
    assert decision is not None and pair(decision) == ("idle", "computes", 3200)
    assert decision.prefill_tokens == {"idle": 800, "computes": 0}


def test_a_decision_says_how_long_each_computes_and_counts_what_others_make_ready() -> None:
    token_ms = PRIOR.token_ms
    alone = choose(4000, Row("a", prefix=100))
    assert alone.work_ms == pytest.approx({"a": 2400 * (token_ms + PRIOR.context_ms * 2.8)})
    at = replace(columns([Row("a", prefix=100)]), coming_blocks=np.array([100]))
    waits = decide(facts(4000), at, policies.make("cost", SETTINGS))
    assert waits is not None and waits.work_ms == pytest.approx({"a": 4000 * (token_ms + PRIOR.context_ms * 2)})
    prefilled = choose(4000, Row("d", "decode"), Row("p", "prefill", prefix=100))
    assert prefilled.work_ms == pytest.approx({"d": 0.0, "p": alone.work_ms["a"]})
    fetched = choose(4000, Row("holder", prefix=200, load=busy(200)), Row("idle"))
    assert fetched.work_ms["holder"] < token_ms * 2 < fetched.work_ms["idle"]


def test_what_comes_after_offloaded_blocks_is_not_fetched() -> None:
    at = columns([Row("computes", prefix=200, offloaded=100, load=busy(200)), Row("idle")])
    at = replace(at, coming_blocks=np.array([60, 0]))
    decision = decide(facts(4000), at, policies.make("cost", SETTINGS))
    assert decision is not None and pair(decision) == ("idle", "computes", 40 * 16)


def test_what_is_being_computed_can_be_given_when_it_is_done_and_not_after_all_of_the_queue() -> None:
    computes = Row("computes", prefix=100, load=busy(2, prefill_tokens=9000, step_ms=20.0))
    at = replace(columns([computes, Row("idle")]), coming_blocks=np.array([60, 0]))
    found = Asked(facts(4000), at, {}, np.zeros(2), 256).parties
    computing_ms = 960 * (PRIOR.token_ms + PRIOR.context_ms * (640 + 960 / 2) / 1000)
    assert found.next_ms[0] == pytest.approx(found.join_ms[0] + 20)
    assert found.ready_ms[0] == pytest.approx(found.next_ms[0] + computing_ms)
    assert found.ready_ms[0] < found.queue_ms[0]
    assert found.next_ms[1] == found.ready_ms[1] == found.queue_ms[1]


def test_nothing_is_fetched_if_computing_it_is_faster() -> None:
    holder = Row("holder", prefix=200, load=busy(200))
    slow_wire = Row("idle", rates=replace(PRIOR, transfer_token_ms=1.0))
    assert pair(choose(4000, holder, slow_wire)) == ("idle", None, None)


@pytest.mark.parametrize("stranger", [{"stock": True}, {"fingerprint": "g"}, {"offloaded": 200}])
def test_a_prefix_is_fetched_only_from_who_can_give_it(stranger: dict[str, object]) -> None:
    holder = replace(Row("holder", prefix=200, load=busy(200)), **stranger)
    assert choose(4000, holder, Row("idle")).source is None


def test_without_others_to_prefill_an_engine_that_only_decodes_does_it_itself() -> None:
    assert pair(choose(4000, Row("d", "decode"), Row("p", "prefill", fingerprint="g"))) == ("d", None, None)


# --- whatever comes -------------------------------------------------------------------------------------------------

rates = st.builds(
    Rates,
    token_ms=st.floats(0.01, 1),
    context_ms=st.floats(0, 0.01),
    transfer_ms=st.floats(0, 20),
    transfer_token_ms=st.floats(0, 0.2),
    cold_ms=st.floats(0, 100),
)
rows = st.builds(
    Row,
    st.uuids().map(str),
    st.sampled_from(["prefill", "decode", "both"]),
    st.integers(0, 300),
    cached=st.integers(0, 1000),
    load=st.builds(
        Load,
        st.integers(0, 40),
        st.integers(0, 9),
        prefill_tokens=st.integers(0, 9999),
        free_blocks=st.integers(0, 1000),
        step_ms=st.floats(0, 100),
    ),
    rates=rates,
    fingerprint=st.sampled_from("ffg"),
    stock=st.booleans(),
)


def every_plan_ms(rows: Sequence[Row], tokens: int) -> float:
    """The cheapest plan, found by pricing each by itself, engine by engine."""
    best, at = np.inf, columns(rows)
    decoders = [i for i, row in enumerate(rows) if row.role != "prefill"] or list(range(len(rows)))
    for d in decoders:
        helped = rows[d].role == "decode" and not rows[d].stock
        helped &= any(p.role == "prefill" and p.fingerprint == rows[d].fingerprint and not p.stock for p in rows)
        own = tokens - min(rows[d].prefix * 16, tokens - 1)
        if not (helped and own >= 256):
            best = min(best, alone_ms(at, d, tokens))
        for s in range(len(rows)):
            same = rows[s].fingerprint == rows[d].fingerprint and not rows[s].stock and not rows[d].stock
            if s == d or not same:
                continue
            best = min(best, *pair_ms(rows, at, (d, s), tokens, helped))
    return best


def alone_ms(at: Candidates, place: int, tokens: int) -> float:
    found = one(at, place, tokens)
    computes = found["queue"] + found["prefill"] * found["stalls"] + found["reload"] + found["cold"]
    return computes + found["stays"]


def one(at: Candidates, d: int, tokens: int) -> dict[str, float]:
    """The terms of one engine, as the documentation has them."""
    load = {name: float(at.loads.rows[name][d]) for name in Loads.ROW.names or () if name != "batch"}
    r = Rates(*(float(at.rates.rows[name][d]) for name in RateColumns.ROW.names or ()))
    cached = min(int(at.prefix_tokens[d]), tokens - 1)
    own, batch, output = tokens - cached, max(load["requests"] - load["waiting"], 0), at.output_tokens
    join = r.base_ms + r.running_ms * batch
    decode = output * (r.step_ms + r.step_running_ms * batch)
    pushed_out = at.reuse / (1 - at.reuse) * r.token_ms
    used = max(1000 - load["free_blocks"], 1)
    missing = max((own + output + load["unplaced"]) / 16 - load["free_blocks"], 0)
    full = decode * missing / used if batch else 0
    computing = [place for place in range(len(at)) if not at.roster.helped[place]]
    unanswered = at.loads.requests - at.loads.decoding
    crowd = sum(float(unanswered[place]) for place in computing) / max(len(computing), 1)
    decoding = load["decoding"] if d in at.roster.decoders else 0
    queue = join + r.token_ms * load["tokens"] + r.waiting_ms * load["waiting"]
    next_step = min(queue, join + load["step_ms"])
    return {
        "join": join,
        "queue": queue,
        "next_step": next_step,
        "prefill": own * (r.token_ms + r.context_ms * (cached + own / 2) / 1000),
        "reload": float(at.offloaded_blocks[d]) * 16 * r.reload_token_ms,
        "stays": decode + output * r.step_running_ms * batch + (own + output) * pushed_out + full,
        "supplies_memory": own * pushed_out,
        "stalls": 1 + decoding + crowd * float(unanswered[d]),
        "own": own,
        "cached": cached,
        "cold": r.cold_ms,
    }


def pair_ms(
    rows: Sequence[Row], at: Candidates, places: tuple[int, int], tokens: int, helped: bool
) -> tuple[float, float]:
    d, s = places
    mine, theirs, r = one(at, d, tokens), one(at, s, tokens), rows[d].rates
    prefilled = fetched = np.inf
    if rows[s].role == "prefill" and mine["own"] >= 256:
        tail = min(mine["own"], 2048) * r.transfer_token_ms
        transfer = r.transfer_ms + max(tail, mine["own"] * r.transfer_token_ms - theirs["prefill"])
        supplies = theirs["queue"] + theirs["prefill"] * theirs["stalls"] + theirs["reload"] + theirs["cold"]
        prefilled = mine["stays"] + mine["join"] + transfer + supplies + theirs["supplies_memory"]
    held = min(rows[s].prefix - rows[s].offloaded, (tokens - 1) // 16) * 16
    if held - mine["cached"] >= 256 and not (helped and tokens - held >= 256):
        ordered = mine["next_step"] + theirs["next_step"]
        arrives = ordered + r.transfer_ms + (held - mine["cached"]) * r.transfer_token_ms
        rest = (tokens - held) * (r.token_ms + r.context_ms * (held + tokens) / 2000) * mine["stalls"]
        fetched = max(mine["queue"], arrives) + rest + mine["stays"] + mine["cold"]
    return prefilled, fetched


@given(st.lists(rows, min_size=1, max_size=20), st.integers(1, 6000))
def test_no_plan_is_cheaper_than_the_one_chosen(fleet: list[Row], tokens: int) -> None:
    decision = choose(tokens, *fleet)
    assert sum(decision.terms.values()) == pytest.approx(every_plan_ms(fleet, tokens), rel=1e-6, abs=1e-3)


def test_a_term_of_another_package_counts_and_its_nonsense_does_not() -> None:
    def far(_: Facts, candidates: Candidates) -> np.ndarray:
        return np.array([1e5, np.nan])

    chooser = Cost(SETTINGS, {"far": far})
    rows = [Row("a", prefix=200), Row("b")]
    decision = decide(facts(4000), columns(rows), chooser)
    assert decision is not None and decision.destination == "b" and decision.terms["far_ms"] == 0


def test_every_rate_has_a_column() -> None:
    engine = Row("a").engine()
    assert RateColumns.of([engine]).rows[0].tolist() == astuple(PRIOR)
    assert RateColumns.ROW.names == tuple(each.name for each in fields(Rates))
