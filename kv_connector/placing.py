"""Orders this engine places: which requests, with whom, and what became of them. Scheduler side, engine thread."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vllm_llmd.clock import Clock
from vllm_llmd.kv_connector import adapters
from vllm_llmd.kv_connector.delivery import SourceEndpoint
from vllm_llmd.kv_connector.hints import Hint, Need, Part, read_hint, split
from vllm_llmd.kv_connector.inflight import InFlight
from vllm_llmd.kv_connector.lifecycle import CANCELLED, OrderSpec, Outcome, Wanted
from vllm_llmd.kv_connector.orders import HttpOrder, OrderClient
from vllm_llmd.kv_connector.room import Room
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.spans import OrderSpans
from vllm_llmd.kv_connector.steps import Fail, Finish, PlannedOrder, StepPlan
from vllm_llmd.kv_connector.ticket import Ticket, ticket_text
from vllm_llmd.kv_connector.topology import objection
from vllm_llmd.names import EngineId, Epoch, OrderId, RequestId
from vllm_llmd.wire import EngineInfo, Geometry

logger = logging.getLogger(__name__)

GAVE_WAY = "gave way"
"""Why an order is given up whose blocks other requests need."""

MAX_REASONS = 100
"""Fallbacks are counted apart by so many reasons: other engines word some of them, and each is a label of a metric."""


@dataclass(frozen=True)
class OrderPolicy:
    """What decides about orders, beside the request.

    `layer_masks` are the layers of each group, as bits; `hash_tokens` is how many tokens vLLM hashes at a time.
    """

    me: EngineId
    epoch: Epoch
    fingerprint: str
    geometry: Geometry
    layer_masks: tuple[int, ...]
    hash_tokens: int
    prefix_caching: bool
    min_order_tokens: int
    lease_ms: int
    seal: Seal

    @property
    def block_size(self) -> int:
        """That of the first group; where sizes may differ from another engine's, it is the only one."""
        return self.geometry.groups[0].block_size

    def blocks(self, tokens: int) -> int:
        """Blocks that a prompt of so many tokens takes, of all groups together."""
        return sum(-(-min(tokens, group.window or tokens) // group.block_size) for group in self.geometry.groups)


@dataclass
class Outside:
    """What placing works with, outside itself."""

    client: OrderClient
    members: Callable[[], Mapping[EngineId, EngineInfo]]
    room: Room
    waits_for_kv: Callable[[Any], bool]
    clock: Clock
    spans: OrderSpans = field(default_factory=OrderSpans)


class Placing:
    """Every order placed and not ended, by request. A request is ordered at most once."""

    def __init__(self, policy: OrderPolicy, outside: Outside) -> None:
        self._policy = policy
        self._outside = outside
        self._in_flight = InFlight(policy.hash_tokens, policy.min_order_tokens, outside.waits_for_kv)
        self._placed: dict[RequestId, list[OrderId]] = {}
        self._tried: set[RequestId] = set()
        self._told: set[RequestId] = set()
        self._deferred: set[RequestId] = set()
        self._chosen: dict[RequestId, list[Part]] = {}
        self._deadlines_ms: dict[RequestId, float] = {}
        self._new: list[tuple[PlannedOrder, ...]] = []
        self._failing: list[Fail] = []
        self._objections: set[str] = set()
        self._reasons: set[str] = set()
        self._count = 0
        self._fallbacks: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._placed)

    @property
    def count(self) -> int:
        """Orders placed since start."""
        return self._count

    @property
    def deferred(self) -> Set[RequestId]:
        """Requests that wait for a prefix that another request has on its way."""
        return self._deferred

    def awaits_another(self, request: Any) -> bool:
        """Whether the start of its prompt is on its way for another request: it is not to be begun before."""
        return self._in_flight.covers(request, 0)

    def arrived(self, request: Any) -> None:
        """A request is new here."""
        hint = read_hint(request.kv_transfer_params)
        if hint.deadline_ms is not None:
            self._deadlines_ms[request.request_id] = self._outside.clock.now_ms() + hint.deadline_ms

    def tokens_to_load(self, request: Any, computed: int) -> int | None:
        """How many prompt tokens after the first `computed` other engines shall supply; 0 if none, None to ask later.

        The last prompt token is always left to this engine, which has to compute it to sample.
        """
        if self._in_flight.covers(request, computed):
            self._deferred.add(request.request_id)
            return None
        self._deferred.discard(request.request_id)
        hint = read_hint(request.kv_transfer_params)
        if not hint.sources or request.request_id in self._tried:
            return 0
        need = Need(computed, request.num_prompt_tokens - 1, self._policy.min_order_tokens, self._policy.block_size)
        if need.end_token - need.first_token < need.min_tokens:
            return 0
        parts = self._parts(request, hint, need)
        if not parts:
            self._tried.add(request.request_id)
            return 0
        self._chosen[request.request_id] = parts
        return parts[-1].end_token - computed

    def allocated(self, request: Any, tokens: int, blocks: Sequence[Sequence[Any]]) -> None:
        """vLLM has given the request blocks of each group, so that `tokens` tokens can be loaded: place the orders."""
        parts = self._chosen.pop(request.request_id, [])
        if not parts or tokens <= 0:
            return
        self._tried.add(request.request_id)
        loads = tuple(self._order(request, part, blocks) for part in parts)
        self._new.append(loads)
        self._placed[request.request_id] = [load.spec.order for load in loads]
        self._outside.room.waits(request.request_id, self._policy.blocks(request.num_prompt_tokens))
        self._in_flight.add(request, parts[0].first_token, parts[-1].end_token)

    def finished(self, request: Any) -> None:
        """The request is over in this engine; if it still waits for KV, hang up."""
        for forgotten in (self._tried, self._deferred, self._told):
            forgotten.discard(request.request_id)
        self._chosen.pop(request.request_id, None)
        self._deadlines_ms.pop(request.request_id, None)
        self._in_flight.forget(request.request_id)
        self._give_up(request.request_id, CANCELLED)

    def give_way(self) -> None:
        """Requests that could run lack blocks: let the youngest that waits for KV compute what has not arrived."""
        youngest = next(reversed(self._placed), None)
        if youngest is not None:
            self._give_up(youngest, GAVE_WAY)

    def fill(self, plan: StepPlan) -> None:
        """Put what the workers must know into the next step."""
        if not (self._placed or self._failing):
            return
        now_ms = self._outside.clock.now_ms()
        for request_id in [r for r in self._placed if self._deadlines_ms.get(r, now_ms) < now_ms]:
            self._deadlines_ms.pop(request_id)
            self._give_up(request_id, "deadline passed")
        plan.loads, self._new = self._new, []
        plan.failures, self._failing = self._failing, []
        for result in self._outside.client.results():
            if result.error is None:
                plan.finishes.append(Finish(result.order))
            else:
                plan.failures.append(Fail(result.order, result.error))

    def ended(self, request_id: RequestId, outcomes: list[Outcome]) -> None:
        """Every rank has reported the end of the request's orders."""
        self._outside.room.leaves(request_id)
        reason = next((outcome.reason for outcome in outcomes if outcome.reason is not None), None)
        for order in self._placed.pop(request_id, ()):
            self._outside.spans.end(order, outcomes, reason)
            if reason is not None:
                self._outside.client.cancel(order)
                if reason != CANCELLED:
                    self._fall_back(reason, f"order {order}: {reason}")

    def take_fallbacks(self) -> dict[str, int]:
        """Hinted requests that were prefilled here after all, by reason, since the last call."""
        taken, self._fallbacks = self._fallbacks, Counter()
        return dict(taken)

    # --- whom to order from -----------------------------------------------------------------------------------

    def _parts(self, request: Any, hint: Hint, need: Need) -> list[Part]:
        reason = self._objection_to_request(request)
        told = request.request_id in self._told
        self._told.add(request.request_id)
        if reason is not None:
            self._fall_back(reason, reason)
            return []
        sources = []
        for hinted in hint.sources:
            peer = self._outside.members().get(hinted.engine)
            reason = self._objection(peer)
            if peer is not None and reason is None:
                sources.append((peer, hinted))
            else:
                assert reason is not None
                if not told:
                    self._fall_back(reason, f"source {hinted.engine}: {reason}")
        return split(need, sources)

    def _objection_to_request(self, request: Any) -> str | None:
        """Why no part of the request is ordered from anybody, or None."""
        if request.mm_features or request.prompt_embeds is not None or request.prompt_token_ids is None:
            return "prompt is not text alone"
        if request.lora_request is not None and not _adapter(request):
            return "adapter cannot be read"
        if not self._outside.room.may_wait(self._policy.blocks(request.num_prompt_tokens)):
            return "no room to wait"
        return None

    def _objection(self, peer: EngineInfo | None) -> str | None:
        """Why nothing is ordered from `peer`, or None."""
        if peer is None:
            return "unknown engine"
        if peer.id == self._policy.me:
            return "engine itself"
        if not peer.models:
            return "serves no model"
        if peer.fingerprint != self._policy.fingerprint:
            return "fingerprint differs: model, dtype, device and versions must be equal"
        if len(peer.workers) != peer.geometry.tp:
            return f"ranks are missing: engine of {peer.geometry.tp} tells of {len(peer.workers)}"
        return objection(self._policy.geometry, peer.geometry)

    # --- the order --------------------------------------------------------------------------------------------

    def _order(self, request: Any, part: Part, blocks: Sequence[Sequence[Any]]) -> PlannedOrder:
        policy = self._policy
        self._count += 1
        order = OrderId(f"{policy.me}-{policy.epoch:x}-{self._count}")
        wanted = [self._wanted(group, part, blocks[group]) for group in range(len(policy.geometry.groups))]
        spec = OrderSpec(order, request.request_id, tuple(w for w in wanted if w is not None), policy.lease_ms)
        facts = {"source": part.source.id, "destination": policy.me, "request": request.request_id}
        tokens = {"first_token": part.first_token, "end_token": part.end_token}
        headers = self._outside.spans.begin(order, _trace_headers(request), {**facts, **tokens})
        ticket = self._ticket(order, request, part)
        body = self._body(request, part)
        self._outside.client.place(HttpOrder(part.source.http, ticket, body, headers))
        return PlannedOrder(tuple(SourceEndpoint(each) for each in part.source.workers), part.source.epoch, spec)

    def _wanted(self, group: int, part: Part, blocks: Sequence[Any]) -> Wanted | None:
        """What of a part is wanted of one group: not the blocks that its window has passed by."""
        size = self._policy.geometry.groups[group].block_size
        end_block = -(-part.end_token // size)
        first_block = part.first_token // size
        first_kept = next((i for i in range(first_block, end_block) if not blocks[i].is_null), None)
        if first_kept is None:
            return None
        return Wanted(
            group=group,
            layers=self._policy.layer_masks[group],
            block_size=size,
            source_block_size=part.source.geometry.groups[group].block_size,
            first_token=max(part.first_token, first_kept * size),
            end_token=part.end_token,
            first_block=first_kept,
            blocks=tuple(block.block_id for block in blocks[first_kept:end_block]),
        )

    def _ticket(self, order: OrderId, request: Any, part: Part) -> Ticket:
        policy = self._policy
        deadline_ms = self._deadlines_ms.get(request.request_id)
        left_ms = 0 if deadline_ms is None else max(int(deadline_ms - self._outside.clock.now_ms()), 1)
        ticket = Ticket(
            order=order,
            source=part.source.id,
            source_epoch=part.source.epoch,
            destination=policy.me,
            destination_epoch=policy.epoch,
            destination_tp=policy.geometry.tp,
            fingerprint=policy.fingerprint,
            first_token=part.first_token,
            end_token=part.end_token,
            lease_ms=policy.lease_ms,
            request=read_hint(request.kv_transfer_params).request or request.request_id,
            adapter=_adapter(request),
            deadline_ms=left_ms,
        )
        return msgspec.structs.replace(ticket, mac=policy.seal.sign(ticket_text(ticket)))

    def _body(self, request: Any, part: Part) -> dict[str, Any]:
        """The one-token completion that computes the part.

        Where the part ends with a block, one more token of the prompt goes along: a source that has the part cached
        can then use all of it, as it must compute at least one token.
        """
        size = part.source.geometry.groups[0].block_size
        one_more = self._policy.prefix_caching and part.end_token % size == 0
        body = {
            "model": part.source.models[0] if request.lora_request is None else request.lora_request.lora_name,
            "prompt": list(request.prompt_token_ids[: part.end_token + one_more]),
            "max_tokens": 1,
            "temperature": 0.0,
        }
        if request.cache_salt is not None:
            body["cache_salt"] = request.cache_salt
        priority = request.priority if part.priority is None else part.priority
        if part.source.priorities and priority:
            body["priority"] = priority
        return body

    def _give_up(self, request_id: RequestId, reason: str) -> None:
        for order in self._placed.get(request_id, ()):
            self._outside.client.cancel(order)
            self._failing.append(Fail(order, reason))

    def _fall_back(self, reason: str, text: str) -> None:
        kind = reason.partition(":")[0]
        if len(self._reasons) < MAX_REASONS:
            self._reasons.add(kind)
        self._fallbacks[kind if kind in self._reasons else "other"] += 1
        if text not in self._objections:
            if len(self._objections) < 1000:
                self._objections.add(text)
            logger.warning("llmd prefills here: %s", text)


def _adapter(request: Any) -> str:
    """A digest of the weights of the request's adapter; empty without one."""
    return "" if request.lora_request is None else adapters.digest(request.lora_request.lora_path)


def _trace_headers(request: Any) -> dict[str, str]:
    if request.trace_headers:
        return dict(request.trace_headers)
    trace = read_hint(request.kv_transfer_params).trace
    return {} if trace is None else {"traceparent": trace}
