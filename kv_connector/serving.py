"""Orders this engine serves: checks tickets, pins what each step makes ready, announces it. Scheduler side."""

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from vllm_llmd.clock import Clock
from vllm_llmd.errors import ConfigError
from vllm_llmd.kv_connector import adapters
from vllm_llmd.kv_connector.orders import ORDER_KEY
from vllm_llmd.kv_connector.placing import OrderPolicy
from vllm_llmd.kv_connector.room import Room
from vllm_llmd.kv_connector.steps import PlannedRange, Reader, StepPlan, Withdraw
from vllm_llmd.kv_connector.ticket import Ticket, ticket_text
from vllm_llmd.kv_connector.topology import MAX_RANKS, edges
from vllm_llmd.names import OrderId, RequestId
from vllm_llmd.settings import LEASE_MS_RANGE
from vllm_llmd.wire import MAJOR, Announce, Strip

logger = logging.getLogger(__name__)

LAYER_RANGE_BYTES = 1 << 18
"""Layers are announced together until they come to so much: less is not worth a message and a read of its own."""

REMEMBERED_ORDERS = 65_536
"""Orders that are known again if they come a second time."""


class Pool(Protocol):
    """The block pool, as far as serving needs it."""

    def blocks_of(self, request_id: str) -> Sequence[list[Any]]: ...
    def pin(self, blocks: Sequence[Any]) -> None: ...
    def unpin(self, blocks: Sequence[Any]) -> None: ...


class PinBook:
    """Pinned blocks by (order, range): unpinned once every rank has let go of the range for every rank that reads."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._pinned: dict[tuple[OrderId, int], list[Any]] = {}
        self._holders: Counter[tuple[OrderId, int]] = Counter()
        self.blocks = 0

    def __len__(self) -> int:
        return len(self._pinned)

    def holds(self, order: OrderId) -> bool:
        """Whether any range of the order is pinned."""
        return any(pinned == order for pinned, _ in self._pinned)

    def pin(self, order: OrderId, seq: int, blocks: list[Any], holders: int) -> None:
        """Keep a range's blocks until so many have let go of it: one for each pair of ranks that reads."""
        self._pool.pin(blocks)
        self._pinned[order, seq] = blocks
        self._holders[order, seq] = holders
        self.blocks += len(blocks)

    def release(self, ranges: Mapping[tuple[OrderId, int], int]) -> None:
        """So many more have let go of these ranges."""
        for key, holders in ranges.items():
            self._holders[key] -= holders
            if self._holders[key] <= 0:
                del self._holders[key]
                blocks = self._pinned.pop(key)
                self.blocks -= len(blocks)
                self._pool.unpin(blocks)


@dataclass(frozen=True)
class Streaming:
    """How the last range of an order is announced: layer by layer, if `by_layer`, as the step computes it.

    `layers` is how many the model has; a block of one layer takes up to `layer_bytes` bytes.
    """

    by_layer: bool
    layers: int
    layer_bytes: int

    def slices(self, blocks: int) -> list[tuple[int, int]]:
        """The layers that a range of so many blocks is announced in: one piece (0, 0), or successive slices."""
        if not self.by_layer:
            return [(0, 0)]
        each = max(-(-LAYER_RANGE_BYTES // max(blocks * self.layer_bytes, 1)), 1)
        return [(first, min(first + each, self.layers)) for first in range(0, self.layers, each)]


@dataclass
class _Serving:
    ticket: Ticket
    request: Any
    reader: Reader
    holders: int
    next_blocks: list[int]
    next_seq: int = 0
    complete: bool = False
    expires_ms: float | None = None


class Serving:
    """Every order that is being computed here, by the request that computes it."""

    def __init__(self, policy: OrderPolicy, pool: Pool, pins: PinBook, room: Room, clock: Clock) -> None:
        self._policy = policy
        self._pool = pool
        self._pins = pins
        self._room = room
        self._clock = clock
        self.streaming = Streaming(False, 0, 0)
        self._orders: dict[RequestId, _Serving] = {}
        self._withdrawn: list[Withdraw] = []
        self._known: OrderedDict[OrderId, None] = OrderedDict()
        self.count = 0
        self.refused: Counter[str] = Counter()
        """Orders that were refused, by reason."""

    @property
    def has_news(self) -> bool:
        """Whether the next step has something to tell even if it computes nothing."""
        return bool(self._withdrawn)

    def is_order(self, request: RequestId) -> bool:
        """Whether the request is computed for another engine."""
        return request in self._orders

    def arrived(self, request: Any) -> None:
        """A request is new; if it carries a ticket that holds, it is an order."""
        params = request.kv_transfer_params
        raw = params.get(ORDER_KEY) if isinstance(params, Mapping) else None
        if raw is None:
            return
        try:
            ticket = msgspec.convert(raw, Ticket)
        except (msgspec.ValidationError, UnicodeEncodeError) as error:
            self._ignore(request, f"unusable ticket: {error}")
            return
        reason = self._disbelief(ticket)
        if reason is not None:
            self._ignore(request, reason)
            return
        self._remember(ticket.order)
        reader = Reader(ticket.destination, ticket.destination_epoch, ticket.destination_tp)
        reason = self._objection(ticket, request)
        if reason is not None:
            self.refused[reason.partition(":")[0]] += 1
            logger.error("llmd order %s refused: %s", ticket.order, reason)
            self._withdrawn.append(Withdraw(reader, ticket.order, f"refused: {reason}"))
            return
        self._room.serves(request.request_id, self._policy.blocks(request.num_prompt_tokens))
        self._orders[request.request_id] = _Serving(
            ticket=ticket,
            request=request,
            reader=reader,
            holders=len(self._edges(ticket)),
            next_blocks=[ticket.first_token // group.block_size for group in self._policy.geometry.groups],
            expires_ms=self._clock.now_ms() + ticket.deadline_ms if ticket.deadline_ms else None,
        )
        self.count += 1

    def fill(self, plan: StepPlan, scheduled: Mapping[RequestId, int], requests: Mapping[RequestId, Any]) -> None:
        """Pin and announce what the step at hand makes ready, which computes `scheduled` tokens of `requests`."""
        for request_id, serving in self._orders.items():
            if request_id in scheduled and not serving.complete:
                there = self._there(serving, scheduled, requests)
                self._announce(plan, serving, scheduled[request_id], there)
        plan.withdrawals, self._withdrawn = self._withdrawn, []

    def finished(self, request: Any) -> dict[str, Any] | None:
        """The request is over; returns what its response shall say about the order."""
        serving = self._orders.pop(request.request_id, None)
        if serving is None:
            return None
        self._room.leaves(request.request_id)
        if not serving.complete:
            self._withdraw(serving, "source request ended early")
        return {ORDER_KEY: {"order": serving.ticket.order, "ranges": serving.next_seq}}

    # --- ranges -----------------------------------------------------------------------------------------------

    def _there(self, serving: _Serving, scheduled: Mapping[RequestId, int], requests: Mapping[RequestId, Any]) -> int:
        """How many tokens of an order are there before the step.

        vLLM finds blocks in its cache as soon as they are scheduled: it may have found some that this step computes for
        another request.
        """
        order = serving.request
        there: int = order.num_computed_tokens
        groups = self._policy.geometry.groups
        if all(there // each.block_size <= done for each, done in zip(groups, serving.next_blocks, strict=True)):
            return there
        blocks = self._pool.blocks_of(order.request_id)
        others = scheduled.keys() & requests.keys() - {order.request_id}
        for number, group in enumerate(groups):
            size, written = group.block_size, set[int]()
            for name in others:
                computed = requests[name].num_computed_tokens
                first, end = computed // size, -(-(computed + scheduled[name]) // size)
                written.update(block.block_id for block in self._pool.blocks_of(name)[number][first:end])
            found = (i for i, block in enumerate(blocks[number]) if block.block_id in written and not block.is_null)
            there = min(there, next(found, there) * size)
        return there

    def _announce(self, plan: StepPlan, serving: _Serving, tokens: int, there: int) -> None:
        """What was there before the step is announced before it runs, what it computes when it has run."""
        if serving.expires_ms is not None and self._clock.now_ms() > serving.expires_ms:
            self._withdraw(serving, "deadline passed")
            return
        before = serving.request.num_computed_tokens
        all_there = there >= serving.ticket.end_token
        cached = self._strips(serving, min(there, serving.ticket.end_token), partial=all_there)
        if cached:
            plan.cached.append(self._range(serving, cached, all_there, (0, 0)))
        if serving.complete:
            return
        until = before + tokens
        last = until >= serving.ticket.end_token
        strips = self._strips(serving, min(until, serving.ticket.end_token), partial=last)
        if not strips:
            return
        slices = self.streaming.slices(sum(len(strip.blocks) for strip in strips)) if last else [(0, 0)]
        for number, layers in enumerate(slices, start=1):
            plan.ranges.append(self._range(serving, strips, last and number == len(slices), layers))

    def _strips(self, serving: _Serving, until: int, partial: bool = False) -> list[Strip]:
        """The blocks of each group that are ready when tokens up to `until` are, and not announced yet.

        A block that is not full counts with `partial`. Of a window, only what its last token sees.
        """
        strips = []
        blocks = self._pool.blocks_of(serving.request.request_id)
        for number, group in enumerate(self._policy.geometry.groups):
            end_block = -(-until // group.block_size) if partial else until // group.block_size
            first_block = serving.next_blocks[number]
            if end_block <= first_block:
                continue
            serving.next_blocks[number] = end_block
            seen = max(serving.ticket.end_token - group.window, 0) // group.block_size if group.window else 0
            kept = [i for i in range(max(first_block, seen), end_block) if not blocks[number][i].is_null]
            if kept:
                ids = [block.block_id for block in blocks[number][kept[0] : end_block]]
                strips.append(Strip(number, kept[0], ids))
        return strips

    def _range(self, serving: _Serving, strips: list[Strip], last: bool, layers: tuple[int, int]) -> PlannedRange:
        order, seq = serving.ticket.order, serving.next_seq
        blocks = self._pool.blocks_of(serving.request.request_id)
        pinned = [block for strip in strips for block in blocks[strip.group][strip.first_block :][: len(strip.blocks)]]
        self._pins.pin(order, seq, pinned, serving.holders)
        serving.next_seq += 1
        serving.complete |= last
        message = Announce(order, seq, strips, last, *layers)
        return PlannedRange(serving.reader, message, serving.ticket.lease_ms)

    def _withdraw(self, serving: _Serving, reason: str) -> None:
        serving.complete = True
        self._withdrawn.append(Withdraw(serving.reader, serving.ticket.order, reason))

    # --- tickets ----------------------------------------------------------------------------------------------

    def _disbelief(self, ticket: Ticket) -> str | None:
        """Why the ticket proves nothing, so that not even its order may be told so; None if it holds."""
        if not self._policy.seal.verifies(ticket.mac, ticket_text(ticket)):
            return "not signed with this fleet's secret"
        if ticket.order in self._known or self._serves(ticket.order):
            return "order came before"
        try:
            self._edges(ticket)
        except (ConfigError, ZeroDivisionError) as error:
            return f"unusable ticket: {error}"
        return None

    def _objection(self, ticket: Ticket, request: Any) -> str | None:
        """Why the order is not served, or None. Up to a colon it is counted by, so nothing of the ticket is there."""
        if ticket.version != MAJOR:
            return f"another version: ticket of protocol {ticket.version}; this engine speaks {MAJOR}"
        if ticket.source != self._policy.me or ticket.source_epoch != self._policy.epoch:
            return f"another engine or life: meant for {ticket.source} in life {ticket.source_epoch:x}, which has ended"
        if ticket.fingerprint != self._policy.fingerprint:
            return "fingerprint differs: model, dtype, device and versions must be equal"
        if not 0 <= ticket.first_token < ticket.end_token <= request.num_prompt_tokens:
            return (
                f"impossible tokens: {ticket.first_token} to {ticket.end_token} are not within the order's prompt of "
                f"{request.num_prompt_tokens}"
            )
        if not LEASE_MS_RANGE[0] <= ticket.lease_ms <= LEASE_MS_RANGE[1]:
            return f"impossible lease: lease_ms must be within {LEASE_MS_RANGE}; got {ticket.lease_ms}"
        if ticket.deadline_ms < 0:
            return f"impossible deadline: deadline_ms must be 0 or more; got {ticket.deadline_ms}"
        if ticket.adapter != self._adapter(request):
            return "adapter differs: its name stands for other weights here"
        if not self._room.may_serve(self._policy.blocks(request.num_prompt_tokens)):
            return "no room: too many requests wait for KV here"
        return None

    def _serves(self, order: OrderId) -> bool:
        """Whether the order is not over, however many have come since."""
        return self._pins.holds(order) or any(each.ticket.order == order for each in self._orders.values())

    def _adapter(self, request: Any) -> str:
        return "" if request.lora_request is None else adapters.digest(request.lora_request.lora_path)

    def _edges(self, ticket: Ticket) -> Sequence[Any]:
        if not 0 < ticket.destination_tp <= MAX_RANKS:
            raise ConfigError(f"destination_tp must be 1 to {MAX_RANKS}; got {ticket.destination_tp}")
        return edges(self._policy.geometry.tp, ticket.destination_tp, self._policy.geometry.kv_heads)

    def _ignore(self, request: Any, reason: str) -> None:
        self.refused[reason.partition(":")[0]] += 1
        logger.error("llmd request %s carries a ticket that does not hold: %s", request.request_id, reason)

    def _remember(self, order: OrderId) -> None:
        self._known[order] = None
        while len(self._known) > REMEMBERED_ORDERS:
            self._known.popitem(last=False)
