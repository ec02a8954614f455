"""Who of the waiting requests is sent next, and who is sent away. Pure: time is an argument, nothing is sent.

Bands of priority are strict. Within a band, tenants share by weight what is sent, in tokens; of one tenant the
request goes first that must leave first, which is the first to come unless their deadlines differ.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

from vllm_llmd.names import EngineId
from vllm_llmd.router.placement.rosters import Wanted
from vllm_llmd.router.slo import Wish

Reason = Literal["queue-full", "displaced", "expired", "shutting-down"]


class Pool(NamedTuple):
    """Which engines may take it, whether the prompt is long enough to be computed by another than decodes it; and for
    whom it waits, if others have room and it does better to wait.
    """

    wanted: Wanted
    needs_source: bool
    engine: EngineId | None = None


IsOpen = Callable[[Pool], bool]
"""Whether some engine can take a request of the pool."""

EXPECTED_ANSWER_TOKENS: Final = 256
"""What an answer counts for its tenant where the client sets no lower bound to it."""
DEBTS_KEPT: Final = 10_000
"""Tenants without a waiting request whose share in a band is remembered."""
SMOOTHING: Final = 0.1
POOLS: Final = 128
"""Different things that may be waited for: clients choose selectors, and each has to be looked at."""
LONGEST_RETRY_S: Final = 60

_Rank = tuple[float, int, str]
"""By what a request is sorted: a time, its number in the order of arrival, its id."""


@dataclass(frozen=True)
class QueueLimits:
    """At most `requests` wait, with `size_bytes` of bodies. Who is not named in `weights` weighs 1."""

    requests: int
    size_bytes: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Item:
    """A request that may wait until `expires_ms`, and wants to leave by `deadline_ms`. `tokens` is what it counts."""

    id: str
    pool: Pool
    tenant: str
    priority: int
    tokens: int
    size_bytes: int
    arrived_ms: float
    deadline_ms: float
    expires_ms: float


@dataclass(frozen=True)
class Arrival:
    """What of a request decides how it waits. `max_tokens` bounds its answer, if the client does."""

    id: str
    pool: Pool
    prompt_tokens: int
    max_tokens: int | None
    size_bytes: int
    arrived_ms: float


@dataclass(frozen=True)
class Shed:
    item: Item
    reason: Reason


def to_wait(arrival: Arrival, wish: Wish, longest_ms: float) -> Item:
    """The request as it waits. A client may shorten its wait, not lengthen it."""
    ttl_ms = min(wish.ttl_ms or longest_ms, longest_ms)
    answer = min(arrival.max_tokens or EXPECTED_ANSWER_TOKENS, EXPECTED_ANSWER_TOKENS)
    return Item(
        id=arrival.id,
        pool=arrival.pool,
        tenant=wish.tenant,
        priority=wish.priority,
        tokens=max(arrival.prompt_tokens, 0) + max(answer, 1),
        size_bytes=arrival.size_bytes,
        arrived_ms=arrival.arrived_ms,
        deadline_ms=arrival.arrived_ms + min(wish.ttft_ms or ttl_ms, ttl_ms),
        expires_ms=arrival.arrived_ms + ttl_ms,
    )


class Flow:
    """The waiting requests."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._bands: dict[int, _Band] = {}
        self._priorities: list[int] = []
        self._items: dict[str, tuple[Item, int]] = {}
        self._expiries: list[_Rank] = []
        self._pools: Counter[Pool] = Counter()
        self._number = 0
        self._sent_ms: float | None = None
        self._gap_ms = 0.0
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._items)

    def waiting(self, pool: Pool) -> int:
        """How many of the pool wait."""
        return self._pools[pool]

    def by_priority(self) -> dict[int, int]:
        """How many wait in each band."""
        return dict(Counter(item.priority for item, _ in self._items.values()))

    def enter(self, item: Item) -> list[Shed]:
        """The request waits, or is sent away, or others are for it: those who would have left last."""
        assert item.id not in self._items, "a request waits once"
        if item.size_bytes > self._limits.size_bytes or not self._limits.requests or self._too_many_pools(item.pool):
            return [Shed(item, "queue-full")]
        self._number += 1
        self._put(item, self._number)
        excess = self._excess()
        if any(each.id == item.id for each in excess):
            self._take(item)
            return [Shed(item, "queue-full")]
        for each in excess:
            self._take(each)
        return [Shed(each, "displaced") for each in excess]

    def leave(self, request: str) -> bool:
        """The client is gone. Whether the request was still waiting."""
        if request not in self._items:
            return False
        self._take(self._items[request][0])
        return True

    def expire(self, now_ms: float) -> list[Shed]:
        """Sends away who has waited for too long."""
        late = [rank[2] for rank in self._expiries[: bisect_left(self._expiries, (now_ms, 0, ""))]]
        shed = [Shed(self._items[request][0], "expired") for request in late]
        for each in shed:
            self._take(each.item)
        return shed

    def close(self) -> list[Shed]:
        """Sends everyone away."""
        shed = [Shed(item, "shutting-down") for item, _ in self._items.values()]
        for each in shed:
            self._take(each.item)
        return shed

    def next(self, is_open: IsOpen, now_ms: float) -> Item | None:
        """Who leaves now, of those whose pool is open. None only if there is nobody."""
        item = self.first(is_open)
        if item is not None:
            self.send(item, now_ms)
        return item

    def first(self, is_open: IsOpen) -> Item | None:
        """Whose turn it is, of those whose pool is open. None only if there is nobody."""
        for priority in reversed(self._priorities):
            item = self._bands[priority].choose(is_open)
            if item is not None:
                return item
        return None

    def send(self, item: Item, now_ms: float) -> None:
        """The request, which waits, leaves for an engine, on its tenant's account."""
        self._bands[item.priority].charge(item)
        self._take(item)
        self._note_sent(now_ms)

    def move(self, request: str, pool: Pool) -> None:
        """It waits for something else from now on, in its place in the order."""
        item, number = self._items[request]
        moved = replace(item, pool=pool)
        self._bands[item.priority].move(item, moved, number)
        self._items[request] = moved, number
        self._count(item.pool, -1)
        self._count(pool, 1)

    def fits(self, item: Item) -> bool:
        """Whether it can wait without anybody having to go for it."""
        return self.has_room(1, item.size_bytes)

    def has_room(self, requests: int, size_bytes: int) -> bool:
        """Whether so many more can wait."""
        fits = len(self._items) + requests <= self._limits.requests
        return fits and self.size_bytes + size_bytes <= self._limits.size_bytes

    def retry_after_s(self) -> int:
        """How long the queue as it is will take, at the pace of late."""
        return min(max(math.ceil(len(self._items) * self._gap_ms / 1000), 1), LONGEST_RETRY_S)

    def _note_sent(self, now_ms: float) -> None:
        if self._sent_ms is not None:
            self._gap_ms += SMOOTHING * (now_ms - self._sent_ms - self._gap_ms)
        self._sent_ms = now_ms if self._items else None

    def _put(self, item: Item, number: int) -> None:
        if item.priority not in self._bands:
            self._bands[item.priority] = _Band(self._limits.weights)
            insort(self._priorities, item.priority)
        self._bands[item.priority].put(item, number)
        self._items[item.id] = item, number
        insort(self._expiries, (item.expires_ms, number, item.id))
        self._count(item.pool, 1)
        self.size_bytes += item.size_bytes

    def _take(self, item: Item) -> None:
        _, number = self._items.pop(item.id)
        band = self._bands[item.priority]
        band.take(item, number)
        if not band:
            del self._bands[item.priority]
            self._priorities.remove(item.priority)
        _drop(self._expiries, (item.expires_ms, number, item.id))
        self._count(item.pool, -1)
        self.size_bytes -= item.size_bytes

    def _count(self, pool: Pool, change: int) -> None:
        self._pools[pool] += change
        if not self._pools[pool]:
            del self._pools[pool]

    def _too_many_pools(self, pool: Pool) -> bool:
        return pool not in self._pools and sum(each.engine is None for each in self._pools) >= POOLS

    def _excess(self) -> list[Item]:
        """Who has to go so that the limits hold: of the lowest band, of the tenant that waits with most, the last."""
        requests, size_bytes = len(self._items) - self._limits.requests, self.size_bytes - self._limits.size_bytes
        going: list[Item] = []
        if requests <= 0 and size_bytes <= 0:
            return going
        for priority in self._priorities:
            for request in self._bands[priority].from_last():
                going.append(self._items[request][0])
                size_bytes -= going[-1].size_bytes
                if len(going) >= requests and size_bytes <= 0:
                    return going
        return going


class _Line:
    """What of one tenant waits in one band, by pool, each in the order in which it leaves."""

    def __init__(self, start: float, number: int) -> None:
        self.start = start
        self.number = number
        self.queues: dict[Pool, list[_Rank]] = {}
        self.tokens = 0

    def last_first(self) -> Iterator[_Rank]:
        return heapq.merge(*map(reversed, self.queues.values()), reverse=True)


class _Band:
    """One priority. A tenant's start is what it has been sent, in tokens by weight; who has the least goes first.

    `_now` is what a tenant that has always waited would have been sent. Who begins to wait starts there, so that
    nobody saves up a share; and it never stands still, so that newcomers, however many, do not overtake for long.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._lines: dict[str, _Line] = {}
        self._order: list[_Rank] = []
        self._debts: OrderedDict[str, float] = OrderedDict()
        self._items: dict[str, Item] = {}
        self._weight = 0.0
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._lines)

    def put(self, item: Item, number: int) -> None:
        line = self._lines.get(item.tenant)
        if line is None:
            start = max(self._now, self._debts.pop(item.tenant, 0.0))
            line = self._lines[item.tenant] = _Line(start, number)
            insort(self._order, (start, number, item.tenant))
            self._weight += self._weight_of(item.tenant)
        insort(line.queues.setdefault(item.pool, []), (item.deadline_ms, number, item.id))
        line.tokens += item.tokens
        self._items[item.id] = item

    def take(self, item: Item, number: int) -> None:
        line = self._lines[item.tenant]
        queue = line.queues[item.pool]
        _drop(queue, (item.deadline_ms, number, item.id))
        line.tokens -= item.tokens
        del self._items[item.id]
        if not queue:
            del line.queues[item.pool]
        if not line.queues:
            self._end(item.tenant, line)

    def move(self, item: Item, moved: Item, number: int) -> None:
        """It stays where it is in the order of its line, under another pool."""
        queues, rank = self._lines[item.tenant].queues, (item.deadline_ms, number, item.id)
        _drop(queues[item.pool], rank)
        if not queues[item.pool]:
            del queues[item.pool]
        insort(queues.setdefault(moved.pool, []), rank)
        self._items[item.id] = moved

    def choose(self, is_open: IsOpen) -> Item | None:
        """Of the first tenant that has any whose pool is open, the first."""
        for _, _, tenant in self._order:
            heads = [queue[0] for pool, queue in self._lines[tenant].queues.items() if is_open(pool)]
            if heads:
                return self._items[min(heads)[2]]
        return None

    def charge(self, item: Item) -> None:
        """The request, which still waits, is sent."""
        line = self._lines[item.tenant]
        _drop(self._order, (line.start, line.number, item.tenant))
        line.start = line.start + item.tokens / self._weight_of(item.tenant)
        insort(self._order, (line.start, line.number, item.tenant))
        self._now = max(self._now + item.tokens / self._weight, self._order[0][0])

    def from_last(self) -> Iterator[str]:
        """Ids in the order in which they are to make room: each time, the last of the tenant with most that waits."""
        tokens = {tenant: line.tokens / self._weight_of(tenant) for tenant, line in self._lines.items()}
        ranks = {tenant: line.last_first() for tenant, line in self._lines.items()}
        while tokens:
            tenant = max(tokens, key=lambda each: (tokens[each], self._lines[each].number))
            rank = next(ranks[tenant], None)
            if rank is None:
                del tokens[tenant]
                continue
            tokens[tenant] -= self._items[rank[2]].tokens / self._weight_of(tenant)
            yield rank[2]

    def _end(self, tenant: str, line: _Line) -> None:
        del self._lines[tenant]
        _drop(self._order, (line.start, line.number, tenant))
        self._weight = self._weight - self._weight_of(tenant) if self._lines else 0.0
        if line.start > self._now:
            self._debts[tenant] = line.start
            if len(self._debts) > DEBTS_KEPT:
                self._debts.popitem(last=False)

    def _weight_of(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)


def _drop(ranks: list[_Rank], rank: _Rank) -> None:
    """Takes a rank out of a sorted list that has it."""
    at = bisect_left(ranks, rank)
    assert ranks[at] == rank, "what is taken out was put in"
    del ranks[at]
