"""Passes an engine's answer on to its client byte for byte; if it breaks off, another goes on or the client is told."""

import logging

from aiohttp import web

from vllm_llmd.clock import Clock
from vllm_llmd.names import EngineId
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.members.membership import Engine
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.serving import replies
from vllm_llmd.router.serving.call import Call
from vllm_llmd.router.upstream import attempt, rewrite, usage
from vllm_llmd.router.upstream.attempt import Answer, Failure
from vllm_llmd.router.upstream.begun import Begun, begin
from vllm_llmd.router.upstream.told import Told

log = logging.getLogger(__name__)


class Relay:
    """Answers on their way to clients. A stream is continued on other engines `continuations` times at most."""

    def __init__(self, continuations: int, fleet: Fleet, metrics: Metrics, clock: Clock) -> None:
        self._continuations = continuations
        self._fleet = fleet
        self._metrics = metrics
        self._clock = clock

    async def begin(self, call: Call, engine: Engine, answer: Answer, asked_for_usage: bool) -> Begun:
        """The client gets status and headers of an answer whose first bytes are here."""
        self._metrics.ttft_seconds.observe((self._clock.now_ms() - call.began_ms) / 1000)
        self._metrics.requests.labels(engine.info.id, answer.status).inc()
        meter = usage.meter_for(asked_for_usage, answer.is_stream, engine.stamp)
        traced = call.way if engine.stock is None and answer.is_stream and answer.status == 200 else None
        told = None if traced is None else Told(traced, call.body.get(rewrite.TOKEN_IDS) is True)
        begun = begin(answer, meter, told, engine.info.fingerprint)
        begun.response.headers.update(call.explained)
        await begun.response.prepare(call.http)
        return begun

    async def go_on(self, call: Call, begun: Begun, engine: Engine, answer: Answer) -> web.StreamResponse | Failure:
        """Continues what another engine has begun."""
        if not answer.is_stream or answer.status != 200:
            return Failure(f"status {answer.status}")
        return await self.pass_on(call, begun, engine.info.id, answer)

    async def pass_on(self, call: Call, begun: Begun, engine: EngineId, answer: Answer) -> web.StreamResponse | Failure:
        """The answer to its end. A failure if the engine has broken off and another can go on."""
        chunk, told = answer.first, begun.told
        while chunk:
            if passed := begun.feed(chunk):
                await begun.response.write(passed)
            if told is not None and told.failure is not None:
                return await self._broke(call, begun, engine, told.failure)
            try:
                chunk = await answer.content.readany()
            except attempt.BROKEN as error:
                return await self._broke(call, begun, engine, attempt.said(error))
        if told is not None and not told.is_whole:
            return await self._broke(call, begun, engine, "it ended too soon")
        if told is not None and told.breaks:
            self._metrics.continued_streams.labels("whole").inc()
        await begun.response.write_eof(begun.end())
        return begun.response

    async def _broke(self, call: Call, begun: Begun, engine: EngineId, reason: str) -> web.StreamResponse | Failure:
        """The engine has failed midway: a failure if another can go on, else the end of the answer."""
        reason = f"midway: {reason}"
        self._metrics.broken_streams.labels(engine).inc()
        told = begun.told
        if told is not None and told.can_go_on and told.breaks < self._continuations:
            told.broke()
            call.facts = told.rest_facts(call.facts)
            call.chunks = self._fleet.cut(call.facts)
            return Failure(reason, midway=True)
        self._fleet.health.failed(engine, self._clock.now_ms())
        log.warning("request %s: engine %s broke off (%s)", call.id, engine, reason)
        call.broken = reason
        return await self.break_off(call, begun)

    async def break_off(self, call: Call, begun: Begun) -> web.StreamResponse:
        """Lets the client know that the answer is not whole: by an event if it is a stream, else by a reset."""
        if call.breaks:
            self._metrics.continued_streams.labels("broken").inc()
        says_why = begun.says_why
        if left := begun.end():
            await begun.response.write(left)
        if begun.is_stream:
            said = b"" if says_why else replies.error_event("The engine failed midway.", "engine_failed")
            await begun.response.write_eof(said)
        elif call.http.transport is not None:
            call.http.transport.abort()
        return begun.response
