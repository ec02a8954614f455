"""Single stories of orders, told event by event; test_order_life.py tells all of them at random."""

from vllm_llmd.kv_connector.delivery import SourceEndpoint, Strand
from vllm_llmd.kv_connector.exchange import (
    LINGER_MS,
    Act,
    Caller,
    Exchange,
    Expect,
    ReadFrom,
    ToDestination,
    ToSource,
)
from vllm_llmd.kv_connector.lifecycle import Drained, OrderSpec, Outcome, Unpin, Wanted
from vllm_llmd.names import EngineId, Epoch, OrderId, RequestId
from vllm_llmd.wire import Ack, Announce, Done, Dropped, Renew, Renewed, Strip

ORDER = OrderId("o")
SOURCE, STRANGER = SourceEndpoint("tcp://source"), SourceEndpoint("tcp://stranger")
CALLER = Caller(EngineId("d"), Epoch(1), 0)
LEASE_MS = 1000.0
STRAND = Strand(ORDER, SOURCE)
RANGE = Announce(ORDER, 0, [Strip(0, 0, [5, 6])], last=True)


def wanted(first_token: int = 0, end_token: int = 64, blocks: tuple[int, ...] = (1, 2), layers: int = 1) -> Wanted:
    return Wanted(0, layers, 32, 32, first_token, end_token, first_token // 32, blocks)


def expect(order: str = "o", part: int = 0, endpoint: SourceEndpoint = SOURCE, **changes: int) -> Expect:
    spec = OrderSpec(OrderId(order), RequestId("r"), (wanted(**changes),), LEASE_MS)  # type: ignore[arg-type]
    return Expect(endpoint, Epoch(1), part, spec)


def messages(acts: list[Act]) -> list[object]:
    return [act.message for act in acts if isinstance(act, ToSource | ToDestination)]


def destination() -> Exchange:
    exchange = Exchange()
    exchange.load([expect()], 0)
    return exchange


def source() -> Exchange:
    exchange = Exchange()
    exchange.greeted(CALLER)
    exchange.ready(CALLER, RANGE, LEASE_MS, 0)
    return exchange


def outcomes(acts: list[Act]) -> list[Outcome]:
    return [act for act in acts if isinstance(act, Outcome)]


def test_a_range_read_before_its_lease_is_known_waits_for_it() -> None:
    exchange = destination()
    exchange.from_source(SOURCE, RANGE, 10)
    assert exchange.read_finished(STRAND, 0, 64, True, 20) == []
    (outcome,) = outcomes(exchange.from_source(SOURCE, Renewed(ORDER, 1, held=True), 30))
    assert (outcome.reason, outcome.missing) == (None, ())


def test_a_late_range_is_recomputed() -> None:
    exchange = destination()
    exchange.from_source(SOURCE, RANGE, 10)
    exchange.from_source(SOURCE, Renewed(ORDER, 1, held=True), 20)
    exchange.read_finished(STRAND, 0, 64, True, 901)
    (outcome,) = outcomes(exchange.failed(ORDER, "source unreachable", 902))
    assert outcome.missing == (1, 2)


def test_what_a_stranger_says_of_an_order_is_ignored() -> None:
    exchange = destination()
    assert exchange.from_source(STRANGER, RANGE, 10) == []
    assert exchange.from_source(STRANGER, Dropped(ORDER, "lie"), 10) == []
    serving = source()
    other = Caller(EngineId("other"), Epoch(1), 0)
    assert serving.from_destination(other, Ack(ORDER, [0]), 10) == []
    assert serving.from_destination(other, Done(ORDER), 10) == []
    assert serving.being_read


def test_done_is_said_only_when_no_read_is_left() -> None:
    exchange = destination()
    exchange.from_source(SOURCE, RANGE, 10)
    assert exchange.failed(ORDER, "source stalled", 20) == []
    acts = exchange.tick(20 + LEASE_MS)
    assert [outcome.quarantined for outcome in outcomes(acts)] == [(1, 2)]
    assert messages(acts) == []
    acts = exchange.read_finished(STRAND, 0, 64, False, 5000)
    assert acts == [Drained(ORDER, (1, 2)), ToSource(SOURCE, Done(ORDER))]
    assert not exchange.busy


def test_a_range_that_arrives_while_an_order_closes_is_kept() -> None:
    exchange = destination()
    exchange.from_source(SOURCE, RANGE, 10)
    exchange.from_source(SOURCE, Renewed(ORDER, 1, held=True), 20)
    exchange.failed(ORDER, "source unreachable", 30)
    (outcome,) = outcomes(exchange.read_finished(STRAND, 0, 64, True, 40))
    assert (outcome.reason, outcome.missing) == (None, ())


def test_a_source_that_said_nothing_for_a_lease_has_stalled() -> None:
    exchange = destination()
    assert outcomes(exchange.tick(LEASE_MS)) == []
    assert [outcome.reason for outcome in outcomes(exchange.tick(LEASE_MS + 1))] == ["source stalled"]


def test_a_source_that_answers_is_waited_for() -> None:
    exchange = destination()
    for now in range(0, 10_000, 500):
        assert outcomes(exchange.tick(now)) == []
        exchange.from_source(SOURCE, Renewed(ORDER, 99, held=False), now)


def test_a_finished_source_has_a_lease_to_announce_the_rest() -> None:
    exchange = destination()
    exchange.source_finished(ORDER, 0)
    exchange.from_source(SOURCE, Renewed(ORDER, 1, held=False), 900)
    assert outcomes(exchange.tick(LEASE_MS)) == []
    (outcome,) = outcomes(exchange.tick(LEASE_MS + 1))
    assert outcome.reason == "source announced too little"


def test_a_lease_that_expired_is_not_revived() -> None:
    exchange = source()
    acts = exchange.from_destination(CALLER, Renew(ORDER, 1), LEASE_MS + 1)
    assert Unpin(ORDER, (0,)) in acts
    assert messages(acts) == [Dropped(ORDER, "lease expired")]
    assert messages(exchange.from_destination(CALLER, Renew(ORDER, 2), LEASE_MS + 2)) == [
        Dropped(ORDER, "lease expired")
    ]


def test_a_source_helps_reads_that_outlive_their_lease_until_the_destination_is_done() -> None:
    exchange = source()
    exchange.tick(LEASE_MS + 1)
    assert exchange.lingering
    exchange.from_destination(CALLER, Done(ORDER), LEASE_MS + 2)
    assert not exchange.lingering


def test_a_source_does_not_help_a_dead_destination_for_ever() -> None:
    exchange = source()
    exchange.tick(LEASE_MS + 1)
    exchange.tick(2 * LEASE_MS)
    exchange.tick(2 * LEASE_MS + LINGER_MS)
    assert not exchange.lingering
    again = source()
    again.tick(LEASE_MS + 1)
    again.greeted(Caller(CALLER.engine, Epoch(2), CALLER.rank))
    assert not again.lingering


def test_a_withdrawn_order_keeps_what_is_pinned_until_the_destination_lets_go() -> None:
    exchange = Exchange()
    exchange.greeted(CALLER)
    exchange.ready(CALLER, Announce(ORDER, 0, [Strip(0, 0, [5])], last=False), LEASE_MS, 0)
    acts = exchange.withdrawn(CALLER, ORDER, "aborted")
    assert acts == [ToDestination(CALLER, Dropped(ORDER, "aborted"))]
    assert exchange.being_read
    assert exchange.from_destination(CALLER, Done(ORDER), 10) == [Unpin(ORDER, (0,))]


def test_announcements_wait_for_their_destination_to_greet() -> None:
    exchange = Exchange()
    assert exchange.ready(CALLER, RANGE, LEASE_MS, 0) == []
    assert exchange.greeted(CALLER) == [ToDestination(CALLER, RANGE)]


# --- several orders, several ranks, layers ------------------------------------------------------------------------


OTHER = SourceEndpoint("tcp://other")


def reads(acts: list[Act]) -> list[ReadFrom]:
    return [act for act in acts if isinstance(act, ReadFrom)]


def two_parts() -> Exchange:
    """The front of a prompt from one source, the rest from another."""
    exchange = Exchange()
    front, rest = expect("front", 0), expect("rest", 1, OTHER, first_token=64, end_token=100, blocks=(3, 4))  # type: ignore[arg-type]
    exchange.load([front, rest], 0)
    for endpoint, order in ((SOURCE, "front"), (OTHER, "rest")):
        exchange.from_source(endpoint, Renewed(OrderId(order), 1, held=True), 5)
    return exchange


def test_a_request_that_is_served_by_two_sources_ends_when_both_have() -> None:
    exchange = two_parts()
    exchange.from_source(OTHER, Announce(OrderId("rest"), 0, [Strip(0, 2, [7, 8])], last=True), 10)
    assert outcomes(exchange.read_finished(Strand(OrderId("rest"), OTHER), 0, 1, True, 20)) == []
    exchange.from_source(SOURCE, Announce(OrderId("front"), 0, [Strip(0, 0, [5, 6])], last=True), 30)
    (outcome,) = outcomes(exchange.read_finished(Strand(OrderId("front"), SOURCE), 0, 1, True, 40))
    assert (outcome.reason, outcome.blocks, outcome.missing) == (None, (1, 2, 3, 4), ())
    assert not exchange.busy


def test_the_rest_of_a_prompt_is_given_up_with_its_front() -> None:
    exchange = two_parts()
    (outcome,) = outcomes(exchange.failed(OrderId("front"), "source unreachable", 10))
    assert (outcome.reason, outcome.missing) == ("source unreachable", (1, 2, 3, 4))


def test_the_front_of_a_prompt_is_kept_when_the_rest_fails() -> None:
    exchange = two_parts()
    assert outcomes(exchange.failed(OrderId("rest"), "source unreachable", 10)) == []
    exchange.from_source(SOURCE, Announce(OrderId("front"), 0, [Strip(0, 0, [5, 6])], last=True), 30)
    (outcome,) = outcomes(exchange.read_finished(Strand(OrderId("front"), SOURCE), 0, 1, True, 40))
    assert (outcome.reason, outcome.missing) == ("source unreachable", (3, 4))


def test_a_read_that_ends_before_the_outcome_is_told_is_not_told_of() -> None:
    """The front's read outlives the front, and ends while a read of the rest is still waited for."""
    exchange, front, rest = two_parts(), Strand(OrderId("front"), SOURCE), Strand(OrderId("rest"), OTHER)
    exchange.from_source(SOURCE, Announce(front.order, 0, [Strip(0, 0, [5])], last=True), 10)
    exchange.from_source(OTHER, Announce(rest.order, 0, [Strip(0, 2, [6])], last=True), 10)
    exchange.failed(front.order, "source died", 20)
    assert not outcomes(exchange.tick(20 + LEASE_MS / 2))
    assert not any(isinstance(act, Drained) for act in exchange.read_finished(front, 0, 0, False, 530))
    (outcome,) = outcomes(exchange.read_finished(rest, 0, 0, False, 540))
    assert (outcome.missing, outcome.quarantined) == ((1, 2, 3, 4), ())


def test_a_block_counts_once_both_source_ranks_have_brought_their_heads() -> None:
    exchange = Exchange()
    exchange.load([expect(), expect(endpoint=OTHER)], 0)
    for endpoint in (SOURCE, OTHER):
        exchange.from_source(endpoint, Renewed(ORDER, 1, held=True), 5)
        exchange.from_source(endpoint, RANGE, 10)
    assert outcomes(exchange.read_finished(STRAND, 0, 1, True, 20)) == []
    (outcome,) = outcomes(exchange.read_finished(Strand(ORDER, OTHER), 0, 1, True, 30))
    assert (outcome.reason, outcome.blocks) == (None, (1, 2))


def test_one_source_rank_that_fails_fails_the_order() -> None:
    exchange = Exchange()
    exchange.load([expect(), expect(endpoint=OTHER)], 0)
    (outcome,) = outcomes(exchange.source_lost(OTHER, "peer is gone", 10))
    assert (outcome.reason, outcome.missing) == ("peer is gone", (1, 2))


def test_a_block_counts_once_all_its_layers_have_come() -> None:
    exchange = Exchange()
    exchange.load([expect(layers=0b11)], 0)
    exchange.from_source(SOURCE, Renewed(ORDER, 1, held=True), 5)
    whole = [Strip(0, 0, [5, 6])]
    (first,) = reads(exchange.from_source(SOURCE, Announce(ORDER, 0, whole, False, 0, 1), 10))
    (second,) = reads(exchange.from_source(SOURCE, Announce(ORDER, 1, whole, True, 1, 2), 11))
    assert [(r.read.first_layer, r.read.end_layer) for r in (first, second)] == [(0, 1), (1, 2)]
    assert reads(exchange.from_source(SOURCE, Announce(ORDER, 2, whole, True), 12)) == []
    assert outcomes(exchange.read_finished(STRAND, 1, 1, True, 20)) == []
    (outcome,) = outcomes(exchange.read_finished(STRAND, 0, 1, True, 21))
    assert (outcome.reason, outcome.missing) == (None, ())


def test_what_arrived_before_the_prefill_ended_is_told_apart() -> None:
    exchange = Exchange()
    exchange.load([expect()], 0)
    exchange.from_source(SOURCE, Renewed(ORDER, 1, held=True), 5)
    exchange.from_source(SOURCE, Announce(ORDER, 0, [Strip(0, 0, [5])], last=False), 10)
    exchange.read_finished(STRAND, 0, 100, True, 20)
    exchange.from_source(SOURCE, Announce(ORDER, 1, [Strip(0, 1, [6])], last=True), 90)
    (outcome,) = outcomes(exchange.read_finished(STRAND, 1, 50, True, 95))
    assert [(a.bytes, a.read_ms, a.before_end) for a in outcome.arrivals] == [(100, 20, True), (50, 95, False)]
    assert outcome.prefill_ended_ms == 90


def test_two_ranks_that_read_from_one_hold_their_pins_apart() -> None:
    exchange, second = Exchange(), Caller(CALLER.engine, CALLER.epoch, 1)
    for caller in (CALLER, second):
        exchange.greeted(caller)
        exchange.ready(caller, RANGE, LEASE_MS, 0)
    assert exchange.from_destination(CALLER, Done(ORDER), 10) == [Unpin(ORDER, (0,))]
    assert exchange.being_read
    assert exchange.from_destination(second, Done(ORDER), 10) == [Unpin(ORDER, (0,))]
    assert not exchange.being_read


def test_a_destination_that_never_greeted_is_not_helped_after_its_lease() -> None:
    exchange = Exchange()
    exchange.ready(CALLER, RANGE, LEASE_MS, 0)
    exchange.tick(LEASE_MS + 1)
    assert exchange.expired == 1
    assert not exchange.lingering


def test_an_announcement_that_overtakes_its_load_is_read_once_the_load_comes() -> None:
    exchange = Exchange()
    assert exchange.from_source(SOURCE, RANGE, 0) == []
    (read,) = reads(exchange.load([expect()], 5))
    assert [cell.remote for cell in read.read.cells] == [5, 6]


def test_a_later_life_of_a_destination_ends_the_orders_of_the_earlier_one() -> None:
    exchange = source()
    assert Unpin(ORDER, (0,)) in exchange.greeted(Caller(CALLER.engine, Epoch(2), 0))
    assert not exchange.busy


def test_a_range_is_announced_once_whatever_is_said_of_its_number_later() -> None:
    exchange = destination()
    assert reads(exchange.from_source(SOURCE, Announce(ORDER, 0, [Strip(0, 0, [5])], last=False), 10))
    assert not reads(exchange.from_source(SOURCE, Announce(ORDER, 0, [Strip(0, 1, [6])], last=True), 20))
