"""Orders this engine serves: checks tickets, pins what each step makes ready, announces it. Scheduler side."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from vllm_llmd.kv_connector.exchange import Caller
from vllm_llmd.kv_connector.orders import ORDER_KEY
from vllm_llmd.kv_connector.placing import OrderPolicy, ticket_text
from vllm_llmd.kv_connector.steps import PlannedRange, StepPlan, Withdraw
from vllm_llmd.names import OrderId, RequestId
from vllm_llmd.settings import LEASE_MS_RANGE
from vllm_llmd.wire import MAJOR, Announce, Ticket

logger = logging.getLogger(__name__)


class Pool(Protocol):
    """The block pool, as far as serving needs it."""

    def blocks_of(self, request_id: str) -> list[Any]: ...
    def pin(self, blocks: Sequence[Any]) -> None: ...
    def unpin(self, blocks: Sequence[Any]) -> None: ...


class PinBook:
    """Pinned blocks by (order, range): unpinned once every rank has let go of the range."""

    def __init__(self, pool: Pool, ranks: int) -> None:
        self._pool = pool
        self._ranks = ranks
        self._pinned: dict[tuple[OrderId, int], list[Any]] = {}
        self._released: Counter[tuple[OrderId, int]] = Counter()
        self.blocks = 0

    def __len__(self) -> int:
        return len(self._pinned)

    def pin(self, order: OrderId, seq: int, blocks: list[Any]) -> None:
        self._pool.pin(blocks)
        self._pinned[order, seq] = blocks
        self.blocks += len(blocks)

    def release(self, ranges: Mapping[tuple[OrderId, int], int]) -> None:
        """So many more ranks have let go of these ranges."""
        for key, ranks in ranges.items():
            self._released[key] += ranks
            if self._released[key] >= self._ranks:
                del self._released[key]
                blocks = self._pinned.pop(key)
                self.blocks -= len(blocks)
                self._pool.unpin(blocks)


@dataclass
class _Serving:
    ticket: Ticket
    request: Any
    caller: Caller
    next_block: int
    next_seq: int = 0
    complete: bool = False


class Serving:
    """Every order that is being computed here, by the request that computes it."""

    def __init__(self, policy: OrderPolicy, pool: Pool, pins: PinBook) -> None:
        self._policy = policy
        self._pool = pool
        self._pins = pins
        self._orders: dict[RequestId, _Serving] = {}
        self._withdrawn: list[Withdraw] = []
        self.count = 0

    @property
    def has_news(self) -> bool:
        """Whether the next step has something to tell even if it computes nothing."""
        return bool(self._withdrawn)

    def arrived(self, request: Any) -> None:
        """A request is new; if it carries a ticket that holds, it is an order."""
        raw = (request.kv_transfer_params or {}).get(ORDER_KEY)
        if raw is None:
            return
        try:
            ticket = msgspec.convert(raw, Ticket)
        except msgspec.ValidationError as error:
            logger.error("llmd request %s carries an unusable order: %s", request.request_id, error)
            return
        caller = Caller(ticket.destination, ticket.destination_epoch, rank=0)
        reason = self._objection(ticket)
        if reason is not None:
            logger.error("llmd order %s refused: %s", ticket.order, reason)
            self._withdrawn.append(Withdraw(caller, ticket.order, f"refused: {reason}"))
            return
        self._orders[request.request_id] = _Serving(ticket, request, caller, ticket.first_block)
        self.count += 1

    def fill(self, plan: StepPlan, scheduled: Mapping[str, int]) -> None:
        """Pin and announce what the step at hand, which computes `scheduled` tokens per request, makes ready."""
        plan.withdrawals, self._withdrawn = self._withdrawn, []
        for request_id, serving in self._orders.items():
            if request_id in scheduled and not serving.complete:
                self._announce(plan, serving, serving.request.num_computed_tokens + scheduled[request_id])

    def finished(self, request: Any) -> dict[str, Any] | None:
        """The request is over; returns what its response shall say about the order."""
        serving = self._orders.pop(request.request_id, None)
        if serving is None:
            return None
        if not serving.complete:
            reason = "source request ended early"
            self._withdrawn.append(Withdraw(serving.caller, serving.ticket.order, reason))
        return {ORDER_KEY: {"order": serving.ticket.order, "ranges": serving.next_seq}}

    def _announce(self, plan: StepPlan, serving: _Serving, computed: int) -> None:
        size = self._policy.block_size
        last = computed >= serving.request.num_prompt_tokens
        until = -(-serving.request.num_prompt_tokens // size) if last else computed // size
        if until <= serving.next_block:
            return
        order = serving.ticket.order
        blocks = self._pool.blocks_of(serving.request.request_id)[serving.next_block : until]
        self._pins.pin(order, serving.next_seq, blocks)
        message = Announce(
            order=order,
            seq=serving.next_seq,
            first_block=serving.next_block,
            blocks=[block.block_id for block in blocks],
            last=last,
        )
        plan.ranges.append(PlannedRange(serving.caller, message, serving.ticket.lease_ms))
        serving.next_block = until
        serving.next_seq += 1
        serving.complete = last

    def _objection(self, ticket: Ticket) -> str | None:
        if ticket.version != MAJOR:
            return f"ticket of protocol {ticket.version}; this engine speaks {MAJOR}"
        if ticket.source != self._policy.me or ticket.source_epoch != self._policy.epoch:
            return f"meant for {ticket.source} in life {ticket.source_epoch:x}, which has ended"
        if ticket.fingerprint != self._policy.fingerprint:
            return "fingerprint differs: model, dtype, block size, TP, layout, device and versions must be equal"
        if ticket.first_block < 0:
            return f"first_block must be 0 or more; got {ticket.first_block}"
        if not LEASE_MS_RANGE[0] <= ticket.lease_ms <= LEASE_MS_RANGE[1]:
            return f"lease_ms must be within {LEASE_MS_RANGE}; got {ticket.lease_ms}"
        if not self._policy.seal.verifies(ticket.mac, ticket_text(ticket)):
            return "not signed with this fleet's secret"
        return None
