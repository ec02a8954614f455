"""Finds an engine for a request and asks it; what fails before its first byte is tried elsewhere, within a budget."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from typing import Final

import aiohttp
from aiohttp import web

from vllm_llmd.names import EngineId
from vllm_llmd.router import explain, policies, replies, rewrite, slo, upstream
from vllm_llmd.router.barred import barred, filtered, saturated
from vllm_llmd.router.call import Call, Planned, asks_usage_of, attempt_at
from vllm_llmd.router.context import Context
from vllm_llmd.router.decide import Decision, decision_of, placed
from vllm_llmd.router.decisions import LONGEST_NAME, Made, Outcome, Record
from vllm_llmd.router.feedback import Feedback, Sent
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.prospects import Prospect, prospect
from vllm_llmd.router.relay import Relay
from vllm_llmd.router.retries import RetryBudget, pause_ms
from vllm_llmd.router.upstream import Answer, Failure
from vllm_llmd.router.waiting_room import WaitingRoom

log = logging.getLogger(__name__)

CLIENT_LEFT: Final = "the client left"


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
        self._session = upstream.open_session(self._connect_timeout_ms)
        yield
        await self._session.close()

    def began(self) -> None:
        """A request has come."""
        self._retries.began()

    def ended(self) -> None:
        """A request is over, whether it was served or not."""
        self._retries.ended(self._clock.now_ms())

    async def serve(self, call: Call) -> web.StreamResponse:
        """The answer that the client gets, sent to its end."""
        failure: Failure | None = None
        while len(call.tried) < self._attempts + call.breaks:
            if failure is not None:
                await asyncio.sleep(pause_ms(len(call.tried), self._rng) / 1000)
            taken = self._place(call, is_retry=failure is not None)
            if taken is None:
                break
            decision, record = taken
            outcome = await self._try(call, decision, record)
            if not isinstance(outcome, Failure):
                return outcome
            failure = outcome
            call.tried.append(decision.destination)
            self._fleet.health.failed(decision.destination, self._clock.now_ms())
            if not failure.midway:
                self._metrics.retries.labels(decision.destination).inc()
            log.warning("request %s: engine %s failed (%s)", call.id, decision.destination, failure.reason)
        if call.begun is not None:
            return await self._relay.break_off(call, call.begun)
        response = self._give_up(call, failure)
        response.headers.update(call.explained)
        return response

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
            async with upstream.ask(self._session, attempt_at(engine, call, decision)) as answer:
                if isinstance(answer, Failure):
                    return answer
                if not asked_for_usage or not answer.refuses(rewrite.STREAM_OPTIONS):
                    return await self._answer(sent, answer, asked_for_usage)
                engine.takes_stream_options = False
        finally:
            self._fleet.done(call.id, decision)
            self._room.look(decision.destination, decision.source)
        return await self._attempt(call, decision, outcome)

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
