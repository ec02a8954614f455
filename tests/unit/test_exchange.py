"""Single stories of orders, told event by event; test_order_life.py tells all of them at random."""

from vllm_llmd.kv_connector.exchange import LINGER_MS, Act, Caller, Exchange, SourceEndpoint, ToDestination, ToSource
from vllm_llmd.kv_connector.lifecycle import Drained, OrderSpec, Outcome, Unpin
from vllm_llmd.names import EngineId, Epoch, OrderId, RequestId
from vllm_llmd.wire import Ack, Announce, Done, Dropped, Renew, Renewed

ORDER = OrderId("o")
SOURCE, STRANGER = SourceEndpoint("tcp://source"), SourceEndpoint("tcp://stranger")
CALLER = Caller(EngineId("d"), Epoch(1), 0)
LEASE_MS = 1000.0
RANGE = Announce(ORDER, 0, 0, [5, 6], last=True)


def messages(acts: list[Act]) -> list[object]:
    return [act.message for act in acts if isinstance(act, ToSource | ToDestination)]


def destination() -> Exchange:
    exchange = Exchange()
    exchange.load(SOURCE, OrderSpec(ORDER, RequestId("r"), 0, (1, 2), LEASE_MS), 0)
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
    assert exchange.read_finished(ORDER, 0, True, 20) == []
    (outcome,) = outcomes(exchange.from_source(SOURCE, Renewed(ORDER, 1, held=True), 30))
    assert (outcome.reason, outcome.missing) == (None, ())


def test_a_late_range_is_recomputed() -> None:
    exchange = destination()
    exchange.from_source(SOURCE, RANGE, 10)
    exchange.from_source(SOURCE, Renewed(ORDER, 1, held=True), 20)
    exchange.read_finished(ORDER, 0, True, 901)
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
    acts = exchange.read_finished(ORDER, 0, False, 5000)
    assert acts == [Drained(ORDER, (1, 2)), ToSource(SOURCE, Done(ORDER))]
    assert not exchange.busy


def test_a_range_that_arrives_while_an_order_closes_is_kept() -> None:
    exchange = destination()
    exchange.from_source(SOURCE, RANGE, 10)
    exchange.from_source(SOURCE, Renewed(ORDER, 1, held=True), 20)
    exchange.failed(ORDER, "source unreachable", 30)
    (outcome,) = outcomes(exchange.read_finished(ORDER, 0, True, 40))
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
    exchange.ready(CALLER, Announce(ORDER, 0, 0, [5], last=False), LEASE_MS, 0)
    acts = exchange.withdrawn(CALLER, ORDER, "aborted")
    assert acts == [ToDestination(CALLER, Dropped(ORDER, "aborted"))]
    assert exchange.being_read
    assert exchange.from_destination(CALLER, Done(ORDER), 10) == [Unpin(ORDER, (0,))]


def test_announcements_wait_for_their_destination_to_greet() -> None:
    exchange = Exchange()
    assert exchange.ready(CALLER, RANGE, LEASE_MS, 0) == []
    assert exchange.greeted(CALLER) == [ToDestination(CALLER, RANGE)]
