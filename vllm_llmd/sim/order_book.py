"""Orders of a simulated engine: placed with other engines over HTTP as the connector places them, and served.

What a source computes travels in no time but the simulated one: the last chunk after it is done, all of it no faster
than the wire. An order that fails brings nothing. Event loop only; the HTTP client has a thread of its own.
"""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_llmd.kv_connector.hints import read_hint
from vllm_llmd.kv_connector.orders import ORDER_KEY, HttpOrder, OrderClient
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.ticket import Ticket, ticket_text
from vllm_llmd.names import EngineId, OrderId
from vllm_llmd.sim.text import Tokens
from vllm_llmd.sim.transfer import order_tokens
from vllm_llmd.wire import EngineInfo

log = logging.getLogger(__name__)

ORDERS_REMEMBERED = 10_000
LEASE_MS = 5000


@dataclass(frozen=True)
class Placed:
    """An order on its way: for which request, and up to which token."""

    request: str
    first_token: int
    end_token: int


@dataclass(frozen=True)
class Wish:
    """What a request lacks: the KV of its tokens from `first_token` on. `priority` is its own."""

    request: str
    prompt: Tokens
    first_token: int
    kv_transfer_params: Mapping[str, Any] | None
    body: Mapping[str, Any]
    priority: int = 0


class OrderBook:
    """`members` are whom orders may be placed with; `on_ended` hears of each order, with the reason if it failed."""

    def __init__(
        self,
        info: EngineInfo,
        seal: Seal,
        members: Callable[[], Mapping[EngineId, EngineInfo]],
        on_ended: Callable[[Placed, str | None], None],
    ) -> None:
        self._info = info
        self._seal = seal
        self._members = members
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()
        self._client: OrderClient | None = None
        self._placed: dict[OrderId, Placed] = {}
        self._served: OrderedDict[OrderId, None] = OrderedDict()
        self.placed = 0
        self.served = 0
        self.failed = 0
        self.fallbacks: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    # --- as destination -----------------------------------------------------------------------------------------

    def place(self, wish: Wish) -> str | None:
        """Orders what is wished for from the first source hinted; or says why not."""
        hinted = read_hint(wish.kv_transfer_params).sources[0]
        source = self._members().get(hinted.engine)
        objection = self._objection_to(source)
        if source is None or objection is not None:
            self.fallbacks[objection or "unknown engine"] += 1
            return objection
        end_token = min(hinted.until or len(wish.prompt), len(wish.prompt) - 1)
        self.placed += 1
        order = OrderId(f"{self._info.id}-{self._info.epoch:x}-{self.placed}")
        self._placed[order] = Placed(wish.request, wish.first_token, end_token)
        tokens = wish.prompt[: order_tokens(end_token, source.block_size)].tolist()
        body = {**wish.body, "prompt": tokens, "max_tokens": 1, "temperature": 0.0}
        priority = wish.priority if hinted.priority is None else hinted.priority
        if source.priorities and priority:
            body["priority"] = priority
        if self._client is None:
            self._client = OrderClient(None, self._on_result)
        self._client.place(HttpOrder(source.http, self._ticket(order, source, wish, end_token), body))
        return None

    def cancel(self, request: str) -> None:
        """Hangs up on what was ordered for the request."""
        for order in [order for order, placed in self._placed.items() if placed.request == request]:
            del self._placed[order]
            assert self._client is not None
            self._client.cancel(order)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def _objection_to(self, source: EngineInfo | None) -> str | None:
        if source is None:
            return "unknown engine"
        if source.id == self._info.id:
            return "engine itself"
        if source.fingerprint != self._info.fingerprint:
            return "fingerprint differs"
        return None

    def _ticket(self, order: OrderId, source: EngineInfo, wish: Wish, end_token: int) -> Ticket:
        ticket = Ticket(
            order=order,
            source=source.id,
            source_epoch=source.epoch,
            destination=self._info.id,
            destination_epoch=self._info.epoch,
            destination_tp=self._info.geometry.tp,
            fingerprint=self._info.fingerprint,
            first_token=wish.first_token,
            end_token=end_token,
            lease_ms=LEASE_MS,
            request=read_hint(wish.kv_transfer_params).request or wish.request,
        )
        return msgspec.structs.replace(ticket, mac=self._seal.sign(ticket_text(ticket)))

    def _on_result(self) -> None:
        """Called in the client's thread."""
        self._loop.call_soon_threadsafe(self._take_results)

    def _take_results(self) -> None:
        assert self._client is not None
        for result in self._client.results():
            placed = self._placed.pop(result.order, None)
            if placed is None:
                continue
            if result.error is not None:
                self.failed += 1
                self.fallbacks[result.error.partition(":")[0]] += 1
                log.warning("engine %s: order %s: %s", self._info.id, result.order, result.error)
            self._on_ended(placed, result.error)

    # --- as source ----------------------------------------------------------------------------------------------

    def admit(self, kv_transfer_params: Mapping[str, Any] | None) -> str | None:
        """Why a request that carries a ticket cannot be served; None if it can, or carries none that holds."""
        raw = (kv_transfer_params or {}).get(ORDER_KEY)
        if raw is None:
            return None
        try:
            ticket = msgspec.convert(raw, Ticket)
        except (msgspec.ValidationError, UnicodeEncodeError):
            self.refused["unusable ticket"] += 1
            return None
        if not self._seal.verifies(ticket.mac, ticket_text(ticket)) or ticket.order in self._served:
            self.refused["not signed, or seen before"] += 1
            return None
        self._served[ticket.order] = None
        if len(self._served) > ORDERS_REMEMBERED:
            self._served.popitem(last=False)
        objection = self._objection(ticket)
        if objection is None:
            self.served += 1
        else:
            self.refused[objection] += 1
        return objection

    def _objection(self, ticket: Ticket) -> str | None:
        if (ticket.source, ticket.source_epoch) != (self._info.id, self._info.epoch):
            return "meant for another life of an engine"
        if ticket.fingerprint != self._info.fingerprint:
            return "fingerprint differs"
        return None
