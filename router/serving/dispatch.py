"""Finds an engine for a request and asks it; what fails before its first byte is tried elsewhere, within a budget."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from functools import partial
from typing import Final

import aiohttp
from aiohttp import web

from vllm_llmd.names import EngineId
from vllm_llmd.router import policies, slo
from vllm_llmd.router.audit import explain
from vllm_llmd.router.audit.barred import barred, filtered, saturated
from vllm_llmd.router.audit.decisions import LONGEST_NAME, Made, Outcome, Record
from vllm_llmd.router.decide import Decision, decision_of, placed
from vllm_llmd.router.placement.prospects import Prospect, prospect
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.serving import replies
from vllm_llmd.router.serving.call import Call, Planned, asks_usage_of, attempt_at
from vllm_llmd.router.serving.context import Context
from vllm_llmd.router.serving.feedback import Feedback, Sent
from vllm_llmd.router.serving.relay import Relay
from vllm_llmd.router.slo import Wish
from vllm_llmd.router.upstream import attempt, rewrite
from vllm_llmd.router.upstream.attempt import Answer, Failure
from vllm_llmd.router.upstream.retries import RetryBudget, pause_ms
from vllm_llmd.router.waiting.admission import Plan
from vllm_llmd.router.waiting.flow import Arrival, Shed
from vllm_llmd.router.waiting.in_flight import GivenUp
from vllm_llmd.router.waiting.room import WaitingRoom

log = logging.getLogger(__name__)

CLIENT_LEFT: Final = "the client left"
GIVEN_UP: Final = "given up for a more urgent request"

Come = Callable[[Arrival, Wish, Plan], Awaitable[Shed | None]]
"""How a request comes to wait."""


class Dispatcher:
    """`serve` a request once `room` has let it in."""

    def __init__(self, context: Context, room: WaitingRoom) -> None:
        settings = context.settings
        self._fleet = context.fleet
        self._metrics = context.metrics
        self._clock = context.clock
        self._decisions = context.decisions
        self._room = room
        self._rng = random.Random()
        self._policy = policies.make(settings.policy, PolicySettings(settings.min_remote_tokens, random.Random()))
        self._attempts = settings.attempts
        self._connect_timeout_ms = settings.connect_timeout_ms
        self._retries = RetryBudget(settings.retry_percent)
        self._feedback = Feedback(context.fleet, context.metrics, context.clock)
        self._relay = Relay(settings.continuations, context.fleet, context.metrics, context.clock)
        self._session: aiohttp.ClientSession | None = None

    async def keep_session(self, _: web.Application) -> AsyncIterator[None]:
        """Connections to engines are open for as long as the application runs."""
        self._session = attempt.open_session(self._connect_timeout_ms)
        yield
        await self._session.close()

    def began(self) -> None:
        """A request has come."""
        self._retries.began()

    def ended(self, call: Call) -> None:
        """A request is over, whether it was served or not."""
        self._fleet.traffic.done(call.id)
        self._retries.ended(self._clock.now_ms())

    async def serve(self, call: Call) -> web.StreamResponse:
        """The answer that the client gets, sent to its end."""
        refusal = await self._wait(call, self._room.admit)
        failure: Failure | None = None
        is_retry = False
        while refusal is None and len(call.tried) < self._attempts + call.breaks:
            if is_retry:
                await asyncio.sleep(pause_ms(len(call.tried), self._rng) / 1000)
            taken = self._place(call, is_retry)
            if taken is None:
                break
            try:
                outcome = await self._try(call, *taken)
            except GivenUp:
                is_retry, refusal = False, await self._make_way(call, taken[0].destination)
                continue
            if not isinstance(outcome, Failure):
                return outcome
            is_retry, failure = True, outcome
            self._failed(call, taken[0].destination, outcome)
        if refusal is not None:
            return refusal
        if call.begun is not None:
            return await self._relay.break_off(call, call.begun)
        response = self._give_up(call, failure)
        response.headers.update(call.explained)
        return response

    async def _wait(self, call: Call, come: Come) -> web.Response | None:
        """Until an engine may have room. The answer, if it is in vain; else it is to be placed at once."""
        began_ms = self._clock.now_ms()
        shed = await come(call.arrival, call.wish, partial(self.plan, call))
        call.waited_ms += self._clock.now_ms() - began_ms
        if shed is None:
            return None
        response = replies.shed(shed.reason, self._room.retry_after_s())
        self._metrics.requests.labels("", response.status).inc()
        return response

    async def _make_way(self, call: Call, engine: EngineId) -> web.Response | None:
        """The engine does not have it any more, for the sake of another: no fault of anybody's. It waits again."""
        call.given_up += 1
        self._metrics.preempted.labels(engine).inc()
        log.info("request %s: engine %s was told to leave it for a more urgent one", call.id, engine)
        return await self._wait(call, self._room.readmit)

    def _failed(self, call: Call, engine: EngineId, failure: Failure) -> None:
        call.tried.append(engine)
        self._fleet.health.failed(engine, self._clock.now_ms())
        if not failure.midway:
            self._metrics.retries.labels(engine).inc()
        log.warning("request %s: engine %s failed (%s)", call.id, engine, failure.reason)

    def _place(self, call: Call, is_retry: bool) -> tuple[Decision, Record] | None:
        """None if nobody can take the request, or it may not be tried again."""
        made = self._decide(call)
        if made.decision is not None and is_retry and not self._may_retry():
            return None
        record = self._note(call, made)
        if made.decision is None:
            return None
        placed(made.decision, made.facts, made.candidates, self._policy)
        return made.decision.without_prices(), record

    def plan(self, call: Call) -> Prospect | None:
        """Where the request would go now, and whether it does better to wait. None if nobody can take it."""
        planned = self._plan(call)
        found = planned.prospect
        call.planned = planned if found is not None and found.wait is None else None
        return found

    def _plan(self, call: Call) -> Planned:
        began_ms = self._clock.now_ms()
        facts = slo.still_due(call.facts, began_ms - call.began_ms) if call.begun is None else slo.begun(call.facts)
        candidates = self._fleet.candidates(facts, call.chunks, self._spared(call), call.session)
        found = prospect(facts, candidates, self._policy, self._room.is_saturated)
        took_ms = self._clock.now_ms() - began_ms
        saturated = self._room.saturated(candidates.roster) if self._decisions.recorded else ()
        return Planned(self._fleet.version, facts, candidates, found, took_ms, saturated)

    def _decide(self, call: Call) -> Made:
        planned, call.planned = call.planned, None
        if planned is None or planned.version != self._fleet.version:
            planned = self._plan(call)
        found, facts, of = planned.prospect, planned.facts, planned.candidates
        decision = None if found is None else decision_of(found.choice, facts, of)
        call.decisions += 1
        return Made(
            call.id,
            call.decisions,
            facts,
            call.chunks,
            of,
            decision,
            call.waited_ms,
            planned.took_ms,
            planned.saturated,
        )

    def _note(self, call: Call, made: Made) -> Record:
        """The decision becomes one of the latest; a client that has asked why is told."""
        if not call.explain:
            return self._decisions.made(made)
        others = (
            *barred(self._fleet, made.facts, made.candidates, call.tried),
            *filtered(self._policy, made.facts, made.candidates),
            *saturated(made.candidates, self._room.is_saturated),
        )
        why = explain.explanation(made, others)
        record = self._decisions.made(made, why)
        call.explained = explain.headers(record, why)
        return record

    def _spared(self, call: Call) -> list[EngineId]:
        """Engines that the request may not go to: those that it was tried on, and that would go on in another way."""
        if call.begun is None:
            return call.tried
        alike = call.begun.fingerprint
        engines = self._fleet.membership.all()
        others = [each.info.id for each in engines if each.stock is not None or each.info.fingerprint != alike]
        return [*call.tried, *others]

    def _may_retry(self) -> bool:
        may = self._retries.take(self._clock.now_ms())
        if not may:
            self._metrics.retries_refused.inc()
        return may

    async def _try(self, call: Call, decision: Decision, record: Record) -> web.StreamResponse | Failure:
        """One attempt, whose outcome is noted whatever it is."""
        outcome = Outcome(failure=CLIENT_LEFT)
        try:
            result = await self._attempt(call, decision, outcome)
            outcome.failure = result.reason[:LONGEST_NAME] if isinstance(result, Failure) else call.broken
        except GivenUp:
            outcome.failure = GIVEN_UP
            raise
        finally:
            self._decisions.ended(record, outcome)
        return result

    async def _attempt(self, call: Call, decision: Decision, outcome: Outcome) -> web.StreamResponse | Failure:
        engine = self._fleet.membership.get(decision.destination)
        assert engine is not None and self._session is not None
        self._fleet.place(call.id, decision, call.facts, call.chunks)
        sent = self._feedback.sending(call, engine, decision, outcome)
        asked_for_usage = asks_usage_of(engine, call)
        try:
            async with AsyncExitStack() as asked:
                async with self._until_answered(call, decision):
                    answer = await asked.enter_async_context(
                        attempt.ask(self._session, attempt_at(engine, call, decision))
                    )
                if isinstance(answer, Failure):
                    return answer
                if not asked_for_usage or not answer.refuses(rewrite.STREAM_OPTIONS):
                    return await self._answer(sent, answer, asked_for_usage)
                engine.takes_stream_options = False
        finally:
            self._fleet.withdrawn(call.id, decision)
            self._room.look(decision.destination, decision.source)
        return await self._attempt(call, decision, outcome)

    def _until_answered(self, call: Call, decision: Decision) -> AbstractAsyncContextManager[None]:
        """In which best effort may be given up: not when the client has got some of the answer."""
        if call.wish.priority >= 0 or call.begun is not None:
            return nullcontext()
        return self._room.until_answered(call.arrival, call.wish, tuple(decision.prefill_tokens), call.given_up)

    async def _answer(self, sent: Sent, answer: Answer, asked_for_usage: bool) -> web.StreamResponse | Failure:
        """The answer has begun: it goes on to the client."""
        call, engine, decision = sent.call, sent.engine, sent.decision
        self._fleet.answering(call.id, decision)
        self._room.look(decision.destination, decision.source)
        self._feedback.answering(sent, answer)
        if call.begun is not None:
            return await self._relay.go_on(call, call.begun, engine, answer)
        call.begun = begun = await self._relay.begin(call, engine, answer, asked_for_usage)
        if begun.told is None:
            call.forget_body()
        result = await self._relay.pass_on(call, begun, engine.info.id, answer)
        self._feedback.ended(sent, answer, begun.meter, isinstance(result, Failure))
        return result

    def _give_up(self, call: Call, failure: Failure | None) -> web.StreamResponse:
        if failure is not None and failure.status is not None and failure.headers is not None:
            self._metrics.requests.labels("", failure.status).inc()
            response = web.Response(status=failure.status, body=failure.body)
            response.headers.clear()
            response.headers.extend(failure.headers)
            return response
        self._metrics.requests.labels("", 503).inc()
        if failure is not None:
            return replies.error(503, f"The engines failed before they answered: {failure.reason}", "engine_failed")
        return replies.nobody(self._fleet.rosters.bars(call.facts))
