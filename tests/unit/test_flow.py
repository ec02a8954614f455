"""The queue against what it promises, for any order of arrivals, departures and free engines."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.router.placement.rosters import Wanted
from vllm_llmd.router.slo import Wish
from vllm_llmd.router.waiting.flow import (
    DEBTS_KEPT,
    EXPECTED_ANSWER_TOKENS,
    LONGEST_RETRY_S,
    Arrival,
    Flow,
    Item,
    Pool,
    QueueLimits,
    Shed,
    to_wait,
)
from vllm_llmd.router.waiting.flow import POOLS as POOLS_MOST

POOL = Pool(Wanted("m"), False)
LONG = Pool(Wanted("m"), True)
OTHER = Pool(Wanted("other"), False)
POOLS = (POOL, LONG, OTHER)
ITEM = Item("0", POOL, "", 0, 10, 100, 0.0, 1000.0, 1000.0)


def flow(requests: int = 1000, size_bytes: int = 1 << 20, weights: Mapping[str, float] | None = None) -> Flow:
    return Flow(QueueLimits(requests, size_bytes, weights or {}))


def always(_: Pool) -> bool:
    return True


def fill(queue: Flow, *items: Item) -> list[Shed]:
    return [shed for item in items for shed in queue.enter(item)]


def drain(queue: Flow) -> list[str]:
    sent = []
    while (item := queue.next(always, 0.0)) is not None:
        sent.append(item.id)
    return sent


def row(tenant: str, count: int, **changes: object) -> list[Item]:
    return [replace(ITEM, id=f"{tenant}{number}", tenant=tenant, **changes) for number in range(count)]


@dataclass(frozen=True)
class Move:
    """Whoever waits at this place waits for something else from now on."""

    place: int
    pool: Pool


# --- any order of events ------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """A queue beside a plain list of who waits, in order of arrival, and where everyone has ended."""

    queue: Flow
    limits: QueueLimits
    waiting: list[Item] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    entered: int = 0
    now_ms: float = 0.0

    def enter(self, item: Item) -> None:
        item = replace(
            item,
            id=str(self.entered),
            deadline_ms=self.now_ms + item.deadline_ms,
            expires_ms=self.now_ms + item.expires_ms,
        )
        self.entered += 1
        sheds = self.queue.enter(item)
        self.waiting.append(item)
        if any(shed.item == item for shed in sheds):
            assert sheds == [Shed(item, "queue-full")], "nobody makes room for one that is refused"
            too_large = item.size_bytes > self.limits.size_bytes
            assert too_large or all(item.priority <= each.priority for each in self.waiting)
        for shed in sheds:
            assert shed.item == item or shed.reason == "displaced"
            assert shed.item.priority <= item.priority
            self.end(shed.item)

    def end(self, item: Item) -> None:
        self.waiting.remove(item)
        self.ended[item.id] += 1

    def next(self, pools: Sequence[Pool]) -> None:
        item = self.queue.next(lambda pool: pool in pools, self.now_ms)
        could = [each for each in self.waiting if each.pool in pools]
        if item is None:
            assert not could, "somebody could have been sent"
            return
        assert item.priority == max(each.priority for each in could)
        of_tenant = [each for each in could if (each.priority, each.tenant) == (item.priority, item.tenant)]
        assert item == min(of_tenant, key=lambda each: (each.deadline_ms, int(each.id)))
        self.end(item)

    def pass_time(self, ms: float) -> None:
        self.now_ms += ms
        for shed in self.queue.expire(self.now_ms):
            assert shed.reason == "expired" and shed.item.expires_ms < self.now_ms
            self.end(shed.item)
        assert all(item.expires_ms >= self.now_ms for item in self.waiting)

    def leave(self, place: int) -> None:
        if self.waiting:
            item = self.waiting[place % len(self.waiting)]
            assert self.queue.leave(item.id) and not self.queue.leave(item.id)
            self.end(item)

    def move(self, event: Move) -> None:
        """Its place in the order stays, and nobody pays for it."""
        if self.waiting:
            at = event.place % len(self.waiting)
            self.queue.move(self.waiting[at].id, event.pool)
            self.waiting[at] = replace(self.waiting[at], pool=event.pool)

    def check(self) -> None:
        assert len(self.queue) == len(self.waiting) <= self.limits.requests
        assert self.queue.size_bytes == sum(item.size_bytes for item in self.waiting) <= self.limits.size_bytes
        assert self.queue.by_priority() == Counter(item.priority for item in self.waiting)
        for pool in POOLS:
            assert self.queue.waiting(pool) == sum(item.pool == pool for item in self.waiting)
        assert set(self.ended.values()) <= {1}
        assert len(self.ended) + len(self.waiting) == self.entered
        assert 1 <= self.queue.retry_after_s() <= LONGEST_RETRY_S


items = st.builds(
    Item,
    id=st.just(""),
    pool=st.sampled_from(POOLS),
    tenant=st.sampled_from("abc"),
    priority=st.integers(-1, 1),
    tokens=st.integers(1, 1000),
    size_bytes=st.integers(0, 60),
    arrived_ms=st.just(0.0),
    deadline_ms=st.sampled_from([1.0, 50.0]),
    expires_ms=st.sampled_from([20.0, 50.0]),
)
events = st.lists(
    items
    | st.lists(st.sampled_from(POOLS)).map(tuple)
    | st.floats(0, 30)
    | st.builds(Move, st.integers(0, 9), st.sampled_from(POOLS))
    | st.integers(0, 9),
    max_size=60,
)  # fmt: skip


@given(events, st.integers(0, 6), st.integers(0, 100))
def test_nobody_is_lost_or_doubled_and_order_and_bounds_hold(
    happens: list[Item | tuple[Pool, ...] | Move | float | int], requests: int, size_bytes: int
) -> None:
    limits = QueueLimits(requests, size_bytes, {"a": 3.0, "b": 0.5})
    watched = Watched(Flow(limits), limits)
    for event in happens:
        match event:
            case Item():
                watched.enter(event)
            case tuple():
                watched.next(event)
            case Move():
                watched.move(event)
            case int():
                watched.leave(event)
            case float():
                watched.pass_time(event)
        watched.check()
    for shed in watched.queue.close():
        assert shed.reason == "shutting-down"
        watched.end(shed.item)
    watched.check()
    assert not watched.waiting


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5000)), min_size=40, max_size=120),
    st.tuples(*[st.sampled_from([0.25, 1.0, 4.0])] * 4),
)
def test_tenants_that_always_wait_get_their_shares_to_within_a_request_each(
    costs: list[tuple[int, int]], weights: tuple[float, float, float, float]
) -> None:
    by_tenant = dict(zip("abcd", weights, strict=True))
    queue = flow(weights=by_tenant)
    for number, (tenant, tokens) in enumerate(costs):
        queue.enter(replace(ITEM, id=str(number), tenant="abcd"[tenant], tokens=tokens))
    left = Counter("abcd"[tenant] for tenant, _ in costs)
    most = {name: max(tokens for each, tokens in costs if "abcd"[each] == name) / by_tenant[name] for name in left}
    got = dict.fromkeys(left, 0.0)
    while all(left.values()):
        for one, other in combinations(left, 2):
            assert abs(got[one] - got[other]) <= max(most[one], most[other]) + 1e-6
        item = queue.next(always, 0.0)
        assert item is not None
        left[item.tenant] -= 1
        got[item.tenant] += item.tokens / by_tenant[item.tenant]


def test_newcomers_without_end_do_not_starve_a_tenant_that_has_had_much() -> None:
    queue = flow()
    fill(queue, replace(ITEM, id="big", tenant="t", tokens=10_000), replace(ITEM, id="next", tenant="t"))
    queue.enter(replace(ITEM, id="new", tenant="new"))
    sent = [queue.next(always, 0.0)]
    for number in range(3000):
        queue.enter(replace(ITEM, id=str(number), tenant=str(number)))
        sent.append(queue.next(always, 0.0))
        if sent[-1] is not None and sent[-1].id == "next":
            break
    assert sent[-1] is not None and sent[-1].id == "next"
    assert sum(item.tokens for item in sent if item is not None and item.tenant != "t") <= 3 * 10_000


# --- one by one ---------------------------------------------------------------------------------------------------


def test_who_comes_first_goes_first() -> None:
    queue = flow()
    fill(queue, *row("a", 5))
    assert drain(queue) == ["a0", "a1", "a2", "a3", "a4"]


def test_the_earlier_deadline_of_a_tenant_goes_first() -> None:
    queue = flow()
    fill(queue, *row("a", 2), replace(ITEM, id="urgent", tenant="a", deadline_ms=500))
    assert drain(queue) == ["urgent", "a0", "a1"]


def test_a_higher_band_goes_before_everything_below() -> None:
    queue = flow()
    fill(queue, *row("a", 2, priority=-1), *row("b", 2), *row("c", 1, priority=2))
    assert drain(queue) == ["c0", "b0", "b1", "a0", "a1"]


def test_a_tenant_with_many_requests_waits_behind_one_with_few() -> None:
    queue = flow()
    fill(queue, *row("greedy", 50), *row("b", 2))
    assert [each[0] for each in drain(queue)[:4]] == ["g", "b", "g", "b"]


def test_tokens_are_shared_not_requests() -> None:
    queue = flow()
    fill(queue, *row("long", 10, tokens=1000), *row("short", 100, tokens=100))
    assert Counter(each.rstrip("0123456789") for each in drain(queue)[:55]) == {"long": 5, "short": 50}


def test_nobody_saves_up_a_share_by_not_waiting() -> None:
    queue = flow()
    fill(queue, *row("a", 30))
    for _ in range(20):
        queue.next(always, 0.0)
    fill(queue, *row("b", 20))
    assert Counter(each[0] for each in drain(queue)[:10]) == {"a": 5, "b": 5}


def test_a_debt_survives_a_moment_without_waiting() -> None:
    queue = flow()
    fill(queue, replace(ITEM, id="a0", tenant="a", tokens=1000), *row("b", 30))
    assert queue.next(always, 0.0) == replace(ITEM, id="a0", tenant="a", tokens=1000)
    queue.enter(replace(ITEM, id="a1", tenant="a"))
    assert drain(queue).index("a1") > 20


def test_debts_are_bounded() -> None:
    queue = flow(requests=10)
    fill(queue, replace(ITEM, id="heavy", tokens=10**9, tenant="x"), replace(ITEM, id="stays", tenant="x"))
    queue.next(always, 0.0)
    for number in range(DEBTS_KEPT + 100):
        queue.enter(replace(ITEM, id=str(number), tenant=str(number), tokens=10**6))
        queue.next(lambda pool: True, 0.0)
    [band] = queue._bands.values()
    assert len(band._debts) <= DEBTS_KEPT


def test_a_pool_without_room_blocks_nobody_else() -> None:
    queue = flow()
    fill(queue, *row("a", 3, pool=LONG, priority=5), replace(ITEM, id="b", tenant="a", pool=OTHER))
    item = queue.next(lambda pool: pool == OTHER, 0.0)
    assert item is not None and item.id == "b"


def test_whoever_waits_for_something_else_keeps_its_tenants_share() -> None:
    """A tenant that has been sent less than others stays ahead of them, though all that it has moves."""
    queue = flow()
    fill(queue, *row("a", 3, tokens=1000), replace(ITEM, id="b", tenant="b", tokens=10))
    assert [queue.next(always, 0.0).id for _ in range(1)] == ["a0"]  # type: ignore[union-attr]
    queue.move("b", LONG)
    queue.move("b", POOL)
    assert drain(queue) == ["b", "a1", "a2"]


def test_no_more_is_waited_for_than_can_be_looked_at() -> None:
    queue = flow()
    pools = [Pool(Wanted(f"m{number}"), False) for number in range(POOLS_MOST + 1)]
    assert not fill(queue, *(replace(ITEM, id=str(at), pool=pool) for at, pool in enumerate(pools[:-1])))
    [shed] = queue.enter(replace(ITEM, id="last", pool=pools[-1], priority=9))
    assert (shed.item.id, shed.reason) == ("last", "queue-full")
    assert not queue.enter(replace(ITEM, id="known", pool=pools[0]))


def test_a_full_queue_makes_room_at_its_end() -> None:
    queue = flow(requests=4)
    fill(queue, *row("a", 3, priority=-1), *row("b", 1))
    assert [shed.item.id for shed in queue.enter(replace(ITEM, id="c", tenant="c"))] == ["a2"]
    assert drain(queue) == ["b0", "c", "a0", "a1"]


def test_a_full_queue_of_one_tenant_makes_room_for_another() -> None:
    queue = flow(requests=3)
    fill(queue, *row("greedy", 3))
    assert queue.enter(replace(ITEM, id="b", tenant="b")) == [
        Shed(replace(ITEM, id="greedy2", tenant="greedy"), "displaced")
    ]
    late = replace(ITEM, id="greedy3", tenant="greedy")
    assert queue.enter(late) == [Shed(late, "queue-full")]


def test_a_body_larger_than_the_queue_displaces_nobody() -> None:
    queue = flow(size_bytes=250)
    fill(queue, *row("a", 2, priority=-5))
    large = replace(ITEM, id="large", size_bytes=251, priority=9)
    assert queue.enter(large) == [Shed(large, "queue-full")]
    assert len(queue) == 2


def test_a_large_body_displaces_as_many_as_it_needs() -> None:
    queue = flow(size_bytes=300)
    fill(queue, *row("a", 3, priority=-5))
    assert [shed.item.id for shed in queue.enter(replace(ITEM, id="large", size_bytes=150))] == ["a2", "a1"]


def test_a_queue_for_nobody_refuses() -> None:
    assert flow(requests=0).enter(ITEM) == [Shed(ITEM, "queue-full")]


def test_the_time_to_ask_again_follows_the_pace() -> None:
    queue = flow()
    fill(queue, *row("a", 200))
    assert queue.retry_after_s() == 1
    for number in range(100):
        queue.next(always, 200.0 * number)
    assert queue.retry_after_s() == 20
    fill(queue, *row("b", 700))
    assert queue.retry_after_s() == LONGEST_RETRY_S


ARRIVAL = Arrival("r", POOL, 100, None, 7, 5.0)


@pytest.mark.parametrize(
    ("wish", "deadline_ms", "expires_ms"),
    [
        (Wish(), 1005, 1005),
        (Wish(ttft_ms=200), 205, 1005),
        (Wish(ttft_ms=2000), 1005, 1005),
        (Wish(ttl_ms=300), 305, 305),
        (Wish(ttl_ms=5000), 1005, 1005),
    ],
)
def test_a_request_wants_to_leave_by_its_objective_and_must_by_its_time_to_live(
    wish: Wish, deadline_ms: float, expires_ms: float
) -> None:
    item = to_wait(ARRIVAL, wish, 1000)
    assert (item.deadline_ms, item.expires_ms) == (deadline_ms, expires_ms)


@pytest.mark.parametrize(("max_tokens", "answer"), [(None, EXPECTED_ANSWER_TOKENS), (10, 10), (10**30, 256)])
def test_an_answer_counts_for_what_it_may_become(max_tokens: int | None, answer: int) -> None:
    assert to_wait(replace(ARRIVAL, max_tokens=max_tokens), Wish(), 1000).tokens == 100 + answer
