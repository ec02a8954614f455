"""The connector inside the engine core: plans each step, follows the block pool, tells the router. Engine thread."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from vllm_llmd.clock import MonotonicClock
from vllm_llmd.due import once_answering, rank_of
from vllm_llmd.kernels import hash_chain_cpu
from vllm_llmd.kernels.block_names import BlockNamer, NetChange
from vllm_llmd.kernels.offloaded_blocks import OffloadedBlocks
from vllm_llmd.kv_connector.hints import read_hint
from vllm_llmd.kv_connector.lifecycle import Outcome
from vllm_llmd.kv_connector.link import EngineLink, LinkSettings
from vllm_llmd.kv_connector.load import LoadCounter
from vllm_llmd.kv_connector.orders import OrderClient
from vllm_llmd.kv_connector.own_ranks import OwnRanks, RankIntroduction
from vllm_llmd.kv_connector.placing import OrderPolicy, Outside, Placing
from vllm_llmd.kv_connector.quarantine import Quarantine
from vllm_llmd.kv_connector.report import WorkerReport
from vllm_llmd.kv_connector.room import Room
from vllm_llmd.kv_connector.seal import Seal
from vllm_llmd.kv_connector.serving import PinBook, Serving, Streaming
from vllm_llmd.kv_connector.stats import TransferCounts
from vllm_llmd.kv_connector.steps import StepPlan
from vllm_llmd.kv_connector.turns import LOOKED_AT, Prompt, Turns
from vllm_llmd.kv_connector.vllm_compat import (
    BlockPoolView,
    event_hashes,
    forget_arrivals,
    forget_connector_events,
    on_arrival,
    on_connector_events,
    on_told_to_stop,
    to_block_events,
    to_offloaded,
    waits_for_kv,
)
from vllm_llmd.kv_connector.vllm_facts import EngineFacts
from vllm_llmd.kv_connector.vllm_turns import StepView, forget_steps, on_step
from vllm_llmd.names import BlockName, EngineId, RequestId, Tier
from vllm_llmd.settings import EngineSettings
from vllm_llmd.wire import EngineInfo, Load

logger = logging.getLogger(__name__)

WAIT_MS = 100.0
"""How long a worker may block for I/O in a step that computes nothing. New requests and failed orders end the wait."""

DEAF_WAIT_MS = 10.0
"""The same where vLLM does not let us know of new requests: they may then wait for two such steps to pass."""

STARVED_MS = 1000.0
"""An engine that computes nothing for so long although requests could run has given too many blocks to waiting ones."""


class SchedulerSide:
    """Call order at start: construct, `bind`, `introduce`. Then, per step: `plan_step`, `take_report`."""

    def __init__(self, facts: EngineFacts, settings: EngineSettings, http: str) -> None:
        self._facts = facts
        self._settings = settings
        self._http = http
        self._clock = MonotonicClock()
        hash_chain_cpu.compile_ahead()
        self._namer = BlockNamer(facts.block_size)
        self._offloaded = OffloadedBlocks(self._namer.name_of)
        self._load = LoadCounter()
        self._turns = Turns()
        self._requests: dict[RequestId, Any] = {}
        self._prefilling: dict[RequestId, Any] = {}
        self._unseen: dict[RequestId, str] = {}
        self._outcomes: dict[RequestId, list[Outcome]] = {}
        self._handed_on: list[Any] = []
        self._counts = TransferCounts()
        self._told_outstanding = 0
        self._computed_ms = 0.0

    def bind(self, pool: BlockPoolView) -> None:
        """The block pool exists."""
        self._pool = pool
        self._quarantine = Quarantine(pool)

    def introduce(self, ranks: Sequence[RankIntroduction]) -> None:
        """The workers are up: join the fleet."""
        facts, settings = self._facts, self._settings
        epoch = ranks[0].epoch
        info = EngineInfo(
            id=EngineId(facts.id),
            epoch=epoch,
            role=facts.role,
            http=self._http,
            models=list(facts.models),
            block_size=facts.block_size,
            num_blocks=facts.num_blocks,
            max_model_len=facts.max_model_len,
            fingerprint=facts.fingerprint,
            workers=[rank.endpoint for rank in ranks],
            labels=settings.labels,
            geometry=facts.geometry,
            priorities=facts.priorities,
            adapters=list(facts.adapters),
            max_sequences=facts.max_sequences,
        )
        self._ranks = OwnRanks(ranks)
        link = LinkSettings(info, settings.routers, self.read_load, tuple(settings.peers), self._ranks.members_changed)
        self._link = EngineLink(link)
        policy = OrderPolicy(
            me=info.id,
            epoch=epoch,
            fingerprint=facts.fingerprint,
            geometry=facts.geometry,
            layer_masks=facts.layer_masks,
            hash_tokens=facts.hash_tokens,
            prefix_caching=facts.prefix_caching,
            min_order_tokens=settings.min_order_tokens,
            lease_ms=settings.lease_ms,
            seal=Seal(settings.secret),
        )
        self._client = OrderClient(settings.api_key, self._nudge)
        room = Room(self._pool.capacity)
        self._placing = Placing(policy, Outside(self._client, self._link.members, room, waits_for_kv, self._clock))
        self._pins = PinBook(self._pool)
        self._serving = Serving(policy, self._pool, self._pins, room, self._clock)
        self._serving.streaming = Streaming(settings.stream == "layers", len(facts.layers), facts.layer_bytes)
        if facts.priorities:
            on_step(self._take_turns)
        self._wait_ms = WAIT_MS if on_arrival(self._nudge) else DEAF_WAIT_MS
        on_connector_events(self._see_offloaded)
        on_told_to_stop(self._link.drain)
        self._link.start()
        logger.info("llmd engine %s (%s) at %s, workers %s", info.id, info.role, info.http, info.workers)

    # --- requests ---------------------------------------------------------------------------------------------

    def new_request(self, request: Any) -> None:
        self._requests[request.request_id] = self._prefilling[request.request_id] = request
        hint = read_hint(request.kv_transfer_params)
        self._load.arrived(request.request_id, request.num_prompt_tokens, hint.supplied(request.num_prompt_tokens))
        if hint.request is not None:
            self._unseen[request.request_id] = hint.request
        self._placing.arrived(request)
        self._serving.arrived(request)

    def tokens_to_load(self, request: Any, computed: int) -> int | None:
        if self._turns.must_wait(self._prompt(request, computed)):
            return None
        return self._placing.tokens_to_load(request, computed)

    def allocated(self, request: Any, tokens: int) -> None:
        """vLLM has allocated blocks, `tokens` of them to be loaded."""
        if tokens > 0:
            self._load.parked(request.request_id)
            self._placing.allocated(request, tokens, self._pool.blocks_of(request.request_id))

    def request_finished(self, request: Any) -> dict[str, Any] | None:
        """Returns `kv_transfer_params` for the response, or None."""
        self._requests.pop(request.request_id, None)
        self._prefilling.pop(request.request_id, None)
        self._unseen.pop(request.request_id, None)
        self._load.ended(request.request_id)
        self._placing.finished(request)
        return self._serving.finished(request)

    # --- turns ------------------------------------------------------------------------------------------------

    def _take_turns(self, step: StepView) -> None:
        """Before vLLM plans a step: prompts that it has begun stand still for those that are due earlier."""
        begun = step.begun()
        waiting = step.waiting(LOOKED_AT) if begun and step.seats > 0 else []
        waiting = [each for each in waiting if not self._placing.awaits_another(each)]
        size = self._facts.block_size
        free_tokens = self._pool.free_blocks() * size // max(len(self._facts.geometry.groups), 1)
        free_tokens -= sum(each.num_tokens - each.num_computed_tokens + size for each in begun)
        fit = takewhile(lambda each: each.num_computed_tokens or each.num_tokens <= free_tokens, waiting)
        held = self._turns.held(
            [self._prompt(each, each.num_computed_tokens) for each in begun], [self._prompt(each, 0) for each in fit]
        )
        try:
            for request in begun:
                if request.request_id in held:
                    step.hold(request)
        except AttributeError:  # turns are over, and nobody must go on waiting for what had been begun
            self._turns = Turns()
            raise
        self._counts.prompts_held += len(held)

    def _prompt(self, request: Any, computed: int) -> Prompt:
        hashes = request.block_hashes
        return Prompt(request.request_id, rank_of(request.priority), hashes, computed // self._facts.hash_tokens)

    # --- steps ------------------------------------------------------------------------------------------------

    def plan_step(self, scheduled: Mapping[RequestId, int]) -> StepPlan:
        """News for the workers, for the step that computes `scheduled` tokens per request."""
        now_ms = self._clock.now_ms()
        self._load.step_began(now_ms, bool(scheduled))
        self._follow_pool()
        plan = StepPlan()
        if scheduled:
            self._computed_ms = now_ms
        elif self._placing:
            self._give_way_if_starved(now_ms)
        self._placing.fill(plan)
        self._serving.fill(plan, scheduled, self._requests)
        for request_id in self._prefilling.keys() & scheduled.keys():
            self._note_progress(self._prefilling[request_id], scheduled[request_id])
        if not scheduled and self._waits_for_io:
            plan.wait_ms = self._wait_ms
        self._update_load()
        return plan

    def take_report(self, report: WorkerReport | None, received: Iterable[str]) -> None:
        """The step has run; `received` are the requests whose loads have ended at every rank."""
        self._load.step_ended(self._clock.now_ms())
        if report is not None:
            self._pins.release(report.unpinned)
            for outcome in report.outcomes:
                self._outcomes.setdefault(outcome.request, []).append(outcome)
                self._quarantine.hold(outcome.quarantined)
            for drained in report.drained:
                self._quarantine.let_go(drained.blocks)
            self._counts.read(report)
        for request_id in received:
            self._load_ended(RequestId(request_id))
        self._follow_pool()  # before vLLM takes the events of failed loads itself
        self._update_load()

    def _load_ended(self, request_id: RequestId) -> None:
        outcomes = self._outcomes.pop(request_id, [])
        request = self._requests.get(request_id)
        failed = any(outcome.failed for outcome in outcomes)
        if request is not None and failed and len(self._facts.geometry.groups) > 1:
            self._pool.forget_load(request)
        elif request is not None and any(outcome.quarantined for outcome in outcomes):
            self._pool.restart_load(request)
        self._placing.ended(request_id, outcomes)
        if outcomes:
            self._counts.ended(outcomes)

    def _give_way_if_starved(self, now_ms: float) -> None:
        """Requests that wait for KV may hold blocks that others need to go on, here and at engines that wait for us.

        Two engines may each wait for what the other one is being sent by it.
        """
        deferred = sum(not self._serving.is_order(each) for each in self._placing.deferred)
        if len(self._requests) - len(self._placing) - deferred <= 0:
            self._computed_ms = now_ms
        elif now_ms - self._computed_ms > STARVED_MS:
            self._computed_ms = now_ms
            self._placing.give_way()

    @property
    def _waits_for_io(self) -> bool:
        """Whether I/O has something in hand that a later step must hear of."""
        return bool(self._placing or self._pins or self._quarantine)

    def _nudge(self) -> None:
        """A request has arrived, or the end of an order; called from other threads."""
        if self._waits_for_io:
            self._ranks.nudge()

    @property
    def keep_stepping(self) -> bool:
        """Whether the engine loop must go on though no request does: pins are released by steps alone."""
        return bool(self._pins or self._quarantine or self._serving.has_news)

    # --- the router -------------------------------------------------------------------------------------------

    def _follow_pool(self) -> None:
        events = self._pool.take_events()
        if not events:
            return
        if self._pool.published:
            self._handed_on += events
        change = self._namer.apply(to_block_events(events, self._facts.naming_group))
        self._publish({"gpu": change})

    def _see_offloaded(self, events: list[Any]) -> None:
        """Block events of all connectors, after a step."""
        told = to_offloaded(events, self._facts.naming_group)
        if told:
            self._publish(self._offloaded.apply(told))

    def offloaded_cleared(self) -> None:
        """vLLM has had every connector forget what it keeps, and no event tells of it."""
        self._publish(self._offloaded.clear())

    def _publish(self, changes: Mapping[Tier, NetChange]) -> None:
        for tier, change in changes.items():
            self._link.publish(change.cleared, list(change.removed), list(change.stored), tier)

    def take_events(self) -> list[Any]:
        """Block events that vLLM's own publisher has not seen."""
        events, self._handed_on = self._handed_on, []
        return events

    def _note_progress(self, request: Any, tokens: int) -> None:
        left = request.num_prompt_tokens - request.num_computed_tokens - tokens
        self._load.scheduled(request.request_id, left)
        if left <= 0:
            del self._prefilling[request.request_id]
            if self._facts.priorities:
                request.priority = once_answering(request.priority)
        if left <= 0 and request.request_id in self._unseen:
            name = self._unseen.pop(request.request_id)
            self._link.seen(name, request.num_prompt_tokens, self._names_of(request))

    def _names_of(self, request: Any) -> list[BlockName]:
        """The names of the prompt's full blocks, as far as they are known."""
        if self._facts.hash_tokens != self._facts.block_size:
            return []
        hashes = event_hashes(request, request.num_prompt_tokens // self._facts.block_size)
        names = [self._namer.name_of(block_hash) for block_hash in hashes]
        return [name for name in takewhile(lambda name: name is not None, names) if name is not None]

    def _update_load(self) -> None:
        self._load.waiting_for_kv = len(self._placing)
        self._load.pinned_blocks = self._pins.blocks
        self._load.orders_placed = self._placing.count
        self._load.orders_served = self._serving.count

    def read_load(self) -> Load:
        """The load now; called from the link thread."""
        return self._load.read(self._pool.free_blocks())

    def take_counts(self) -> TransferCounts | None:
        """Counts since the last call, or None if nothing was counted."""
        counts, self._counts = self._counts, TransferCounts()
        counts.fallbacks = self._placing.take_fallbacks()
        counts.refused, self._serving.refused = dict(self._serving.refused), Counter()
        outstanding = len(self._placing)
        counts.outstanding = outstanding if outstanding != self._told_outstanding else None
        self._told_outstanding = outstanding
        return counts if counts else None

    def close(self) -> None:
        forget_arrivals(self._nudge)
        forget_steps(self._take_turns)
        forget_connector_events(self._see_offloaded)
        self._link.close()
        self._client.close()
        self._ranks.close()
