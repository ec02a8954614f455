"""Orders this engine places: which requests, with whom, and what became of them. Scheduler side, engine thread."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_llmd.kv_connector.exchange import SourceEndpoint
from vllm_llmd.kv_connector.lifecycle import CANCELLED, OrderSpec
from vllm_llmd.kv_connector.orders import HttpOrder, OrderClient
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.steps import Fail, Finish, PlannedLoad, StepPlan
from vllm_llmd.names import EngineId, Epoch, OrderId, RequestId
from vllm_llmd.wire import EngineInfo, Ticket

logger = logging.getLogger(__name__)

HINT_KEY = "llmd"
"""Where the router's hint stands in a request's `kv_transfer_params`: {"source": engine id, "request": its name}."""


@dataclass(frozen=True)
class OrderPolicy:
    """What decides about orders, beside the request."""

    me: EngineId
    epoch: Epoch
    fingerprint: str
    tp_size: int
    block_size: int
    min_order_tokens: int
    lease_ms: int
    seal: Seal


@dataclass(frozen=True)
class Hint:
    """What the router says of a request: who should supply its KV, and what the router calls it."""

    source: EngineId | None = None
    request: str | None = None


def hint_of(request: Any) -> Hint:
    """The router's hint. What has the wrong shape counts as unsaid."""
    raw = (request.kv_transfer_params or {}).get(HINT_KEY)
    if not isinstance(raw, dict):
        return Hint()
    source, name = raw.get("source"), raw.get("request")
    return Hint(
        EngineId(source) if isinstance(source, str) else None,
        name if isinstance(name, str) else None,
    )


def ticket_text(ticket: Ticket) -> str:
    """What a ticket's `mac` signs."""
    unsigned = msgspec.structs.replace(ticket, mac="")
    return "ticket " + msgspec.json.encode(unsigned).decode()


class Placing:
    """Every order placed and not ended, by request. A request is ordered at most once."""

    def __init__(
        self, policy: OrderPolicy, client: OrderClient, members: Callable[[], Mapping[EngineId, EngineInfo]]
    ) -> None:
        self._policy = policy
        self._client = client
        self._members = members
        self._placed: dict[RequestId, OrderId] = {}
        self._tried: set[RequestId] = set()
        self._chosen: dict[RequestId, EngineInfo] = {}
        self._new: list[PlannedLoad] = []
        self._cancelled: list[OrderId] = []
        self._objections: set[str] = set()
        self._count = 0
        self._fallbacks: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._placed)

    @property
    def count(self) -> int:
        """Orders placed since start."""
        return self._count

    def tokens_to_load(self, request: Any, computed: int) -> int:
        """How many prompt tokens after the first `computed` another engine shall supply; 0 if none.

        The last prompt token is always left to this engine, which has to compute it to sample.
        """
        source = hint_of(request).source
        if source is None or request.request_id in self._tried:
            return 0
        wanted = request.num_prompt_tokens - 1 - computed
        if wanted < self._policy.min_order_tokens:
            return 0
        peer = self._members().get(source)
        reason = self._objection(request, peer)
        if peer is not None and reason is None:
            self._chosen[request.request_id] = peer
            return int(wanted)
        self._tried.add(request.request_id)
        assert reason is not None
        self._fall_back(reason, f"source {source}: {reason}")
        return 0

    def allocated(self, request: Any, tokens: int, block_ids: list[int]) -> None:
        """vLLM has given the request blocks for `tokens` tokens: place the order for them."""
        policy = self._policy
        source = self._chosen.pop(request.request_id)
        end = request.num_prompt_tokens - 1
        first_block = (end - tokens) // policy.block_size
        last_block = -(-end // policy.block_size)
        self._count += 1
        order = OrderId(f"{policy.me}-{policy.epoch:x}-{self._count}")
        spec = OrderSpec(
            order, request.request_id, first_block, tuple(block_ids[first_block:last_block]), policy.lease_ms
        )
        endpoints = tuple(SourceEndpoint(endpoint) for endpoint in source.workers)
        self._new.append(PlannedLoad(endpoints, source.epoch, spec))
        self._placed[request.request_id] = order
        self._tried.add(request.request_id)
        body = {
            "model": source.models[0],
            "prompt": list(request.prompt_token_ids[:end]),
            "max_tokens": 1,
            "temperature": 0.0,
        }
        if request.cache_salt is not None:
            body["cache_salt"] = request.cache_salt
        self._client.place(HttpOrder(source.http, self._ticket(order, source, first_block), body))

    def finished(self, request: Any) -> None:
        """The request is over in this engine; if it still waits for KV, hang up."""
        self._tried.discard(request.request_id)
        self._chosen.pop(request.request_id, None)
        order = self._placed.get(request.request_id)
        if order is not None:
            self._client.cancel(order)
            self._cancelled.append(order)

    def fill(self, plan: StepPlan) -> None:
        """Put what the workers must know into the next step."""
        plan.loads, self._new = self._new, []
        plan.failures = [Fail(order, CANCELLED) for order in self._cancelled]
        self._cancelled = []
        for result in self._client.results():
            if result.error is None:
                plan.finishes.append(Finish(result.order))
            else:
                plan.failures.append(Fail(result.order, result.error))

    def ended(self, request: RequestId, reason: str | None) -> None:
        """Every rank has reported the end of the request's order."""
        order = self._placed.pop(request, None)
        if order is None:
            return
        if reason is not None:
            self._client.cancel(order)
            if reason != CANCELLED:
                self._fall_back(reason, f"order {order}: {reason}")

    def take_fallbacks(self) -> dict[str, int]:
        """Hinted requests that were prefilled here after all, by reason, since the last call."""
        taken, self._fallbacks = self._fallbacks, Counter()
        return dict(taken)

    def _ticket(self, order: OrderId, source: EngineInfo, first_block: int) -> Ticket:
        ticket = Ticket(
            order=order,
            source=source.id,
            source_epoch=source.epoch,
            destination=self._policy.me,
            destination_epoch=self._policy.epoch,
            fingerprint=self._policy.fingerprint,
            first_block=first_block,
            lease_ms=self._policy.lease_ms,
        )
        return msgspec.structs.replace(ticket, mac=self._policy.seal.sign(ticket_text(ticket)))

    def _objection(self, request: Any, peer: EngineInfo | None) -> str | None:
        """Why the request is not ordered from `peer`, or None."""
        if peer is None:
            return "unknown engine"
        if request.mm_features or request.prompt_embeds is not None or request.prompt_token_ids is None:
            return "prompt is not text alone"
        if request.lora_request is not None:
            return "adapter"
        if peer.id == self._policy.me:
            return "engine itself"
        if not peer.models:
            return "serves no model"
        if peer.fingerprint != self._policy.fingerprint or len(peer.workers) != self._policy.tp_size:
            return "fingerprint differs: model, dtype, block size, TP, layout, device and versions must be equal"
        return None

    def _fall_back(self, reason: str, text: str) -> None:
        self._fallbacks[reason.partition(":")[0]] += 1
        if text not in self._objections:
            if len(self._objections) < 1000:
                self._objections.add(text)
            logger.warning("llmd prefills here: %s", text)
