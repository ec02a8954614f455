"""The OpenAI front door: checks a request, has it placed, and passes the engine's answer through byte for byte.

Owns no state of the fleet. What fails before its first byte is tried elsewhere, within a budget.
"""

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler

from vllm_llmd.clock import Clock
from vllm_llmd.names import EngineId
from vllm_llmd.router import policies, replies, rewrite, upstream, usage
from vllm_llmd.router.begun import Begun, begin
from vllm_llmd.router.decide import Decision, decide
from vllm_llmd.router.exact import Exact
from vllm_llmd.router.failover import Way, way_to_continue
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.flow import Arrival
from vllm_llmd.router.membership import Engine
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.outliers import Shape
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.request import Facts, Kind, RequestError, read_facts, skim
from vllm_llmd.router.retries import RetryBudget, pause_ms
from vllm_llmd.router.seen import Measured
from vllm_llmd.router.sessions import Last, read_session
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.slo import Wish, read_wish
from vllm_llmd.router.text_index import Chunks
from vllm_llmd.router.told import Told
from vllm_llmd.router.truth import Prediction
from vllm_llmd.router.upstream import Answer, Attempt, Failure
from vllm_llmd.router.usage import Meter, Unasked
from vllm_llmd.router.waiting_room import WaitingRoom

log = logging.getLogger(__name__)

PATHS: Final[dict[str, Kind]] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}


@dataclass
class Call:
    """One client request on its way through. `asking` is the request with the usage of its stream asked for.

    `way` is how its stream is continued if it breaks, None where it cannot be. Once its answer has begun, `begun` is
    what the client gets.
    """

    id: str
    http: web.Request
    raw: bytes
    body: dict[str, Any]
    facts: Facts
    chunks: Chunks
    began_ms: float
    asking: tuple[bytes, Mapping[str, Any]] | None
    wish: Wish
    way: Way | None
    session: str | None = None
    begun: Begun | None = None
    tried: list[EngineId] = field(default_factory=list)

    @property
    def breaks(self) -> int:
        """How many engines have failed midway and left it to others to go on."""
        return self.begun.told.breaks if self.begun is not None and self.begun.told is not None else 0


class Front:
    """Handlers for the OpenAI endpoints."""

    def __init__(self, settings: RouterSettings, fleet: Fleet, metrics: Metrics, clock: Clock, life: str) -> None:
        self._settings = settings
        self._fleet = fleet
        self._metrics = metrics
        self._clock = clock
        self._life = life
        self._numbers = itertools.count(1)
        self._started_s = int(time.time())
        self._policy = policies.make(settings.policy, PolicySettings(settings.min_remote_tokens, random.Random()))
        self._attempts = settings.attempts
        self._continuations = settings.continuations
        self._retries = RetryBudget(settings.retry_percent)
        self._rng = random.Random()
        self._exact = Exact(settings, fleet.agreement, metrics)
        self._room = WaitingRoom(settings, fleet, metrics, clock)
        self._session: aiohttp.ClientSession | None = None

    def add_routes(self, app: web.Application) -> None:
        for path in PATHS:
            app.router.add_post(path, self._completions)
        app.router.add_get("/v1/models", self._models)
        app.cleanup_ctx.append(self._keep_session)
        app.on_shutdown.append(self._close_room)

    async def _keep_session(self, _: web.Application) -> Any:
        self._session = upstream.open_session(self._settings.connect_timeout_ms)
        yield
        await self._session.close()

    async def _close_room(self, _: web.Application) -> None:
        await self._room.close()

    async def _models(self, _: web.Request) -> web.Response:
        longest: dict[str, int] = {}
        for engine in self._fleet.membership.accepting():
            for model in (*engine.info.models, *engine.info.adapters):
                longest[model] = max(engine.info.max_model_len, longest.get(model, 0))
        data = [
            {
                "id": model,
                "object": "model",
                "created": self._started_s,
                "owned_by": "vllm-llmd",
                "max_model_len": length,
            }
            for model, length in sorted(longest.items())
        ]
        return web.json_response({"object": "list", "data": data})

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        began_ms = self._clock.now_ms()
        raw = await http.read()
        try:
            wish = read_wish(http.headers.items(), self._settings.objective or {})
            body, long = skim(raw)
            facts = await self._exact.facts(read_facts(PATHS[http.path], body, long), PATHS[http.path], raw)
        except RequestError as error:
            return replies.error(400, str(error), "invalid_request", error.param)
        if facts.model is not None and self._fleet.membership.ready() and not self._fleet.serves(facts.model):
            return replies.error(404, f"The model `{facts.model}` does not exist.", "model_not_found", "model")
        request = f"{self._life}-{next(self._numbers)}"
        asking = rewrite.asking_for_usage(raw, body)
        way = way_to_continue(PATHS[http.path], body, facts) if self._continuations else None
        call = Call(request, http, raw, body, facts, self._fleet.cut(facts), began_ms, asking, wish, way)
        call.session = read_session(http.headers.items())
        self._retries.began()
        with self._metrics.inflight.track_inprogress():
            try:
                refusal = await self._refused(call)
                return await self._serve(call) if refusal is None else refusal
            except asyncio.CancelledError:
                self._metrics.cancelled.inc()
                raise
            except ConnectionResetError:  # found out by writing to the client rather than by being cancelled
                self._metrics.cancelled.inc()
                return web.Response(status=499)
            finally:
                self._retries.ended(self._clock.now_ms())

    async def _refused(self, call: Call) -> web.StreamResponse | None:
        """Waits until an engine may have room. The answer, if the request cannot be served."""
        facts, longest = call.facts, call.body.get("max_completion_tokens") or call.body.get("max_tokens")
        pool = facts.model, facts.prompt_tokens >= self._settings.min_remote_tokens
        arrival = Arrival(
            id=call.id,
            pool=pool,
            prompt_tokens=facts.prompt_tokens,
            max_tokens=longest if isinstance(longest, int) and longest > 0 else None,
            size_bytes=len(call.raw),
            arrived_ms=self._clock.now_ms(),
        )
        shed = await self._room.admit(arrival, call.wish)
        if shed is None:
            return None
        response = replies.shed(shed.reason, self._room.retry_after_s())
        self._metrics.requests.labels("", response.status).inc()
        return response

    async def _serve(self, call: Call) -> web.StreamResponse:
        failure: Failure | None = None
        while len(call.tried) < self._attempts + call.breaks:
            if failure is not None:
                await asyncio.sleep(pause_ms(len(call.tried), self._rng) / 1000)
            candidates = self._fleet.candidates(call.facts, call.chunks, self._spared(call), call.session)
            decision = decide(call.facts, candidates, self._policy)
            if decision is None or (failure is not None and not self._may_retry()):
                break
            outcome = await self._attempt(call, decision)
            if not isinstance(outcome, Failure):
                return outcome
            failure = outcome
            call.tried.append(decision.destination)
            self._fleet.health.failed(decision.destination, self._clock.now_ms())
            if not failure.midway:
                self._metrics.retries.labels(decision.destination).inc()
            log.warning("request %s: engine %s failed (%s)", call.id, decision.destination, failure.reason)
        return self._give_up(failure) if call.begun is None else await self._break_off(call, call.begun)

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

    async def _attempt(self, call: Call, decision: Decision) -> web.StreamResponse | Failure:
        engine = self._fleet.membership.get(decision.destination)
        assert engine is not None and self._session is not None
        self._fleet.place(call.id, decision, call.chunks)
        self._count(decision, engine.info.block_size)
        shape = Shape.of(decision.uncached_tokens, engine.requests_ahead, decision.source is not None)
        sent_ms = self._clock.now_ms()
        tells = usage.tells_of_its_prompt(call.body) and call.begun is None
        prediction = self._fleet.foretold(call.facts, decision) if tells else None
        asking = call.asking if engine.takes_stream_options else None
        try:
            async with upstream.ask(self._session, _attempt_at(engine, call, decision, asking)) as answer:
                if isinstance(answer, Failure):
                    return answer
                if asking is None or not answer.refuses(rewrite.STREAM_OPTIONS):
                    self._fleet.answering(call.id, decision)
                    self._room.look(decision.destination, decision.source)
                    first_byte_ms = self._clock.now_ms() - sent_ms
                    self._answered(engine, answer, shape, sent_ms)
                    if call.begun is not None:
                        return await self._go_on(call, call.begun, engine, answer)
                    call.begun = begun = await self._begin(call, engine, answer, asking is not None)
                    outcome = await self._relay(call, begun, engine.info.id, answer)
                    self._remember(call, engine, answer, begun.meter)
                    self._compare(engine, prediction, f"{call.http.path} {answer.is_stream}", begun.meter)
                    if answer.status == 200 and not isinstance(outcome, Failure):
                        took_ms = first_byte_ms, self._clock.now_ms() - sent_ms
                        self._fleet.answered(decision, Measured(*took_ms, answer.is_stream, begun.meter.usage))
                    return outcome
                engine.takes_stream_options = False
        finally:
            self._fleet.done(call.id, decision)
            self._room.look(decision.destination, decision.source)
        return await self._attempt(call, decision)

    def _answered(self, engine: Engine, answer: Answer, shape: Shape, sent_ms: float) -> None:
        now_ms = self._clock.now_ms()
        self._fleet.health.answered(engine.info.id, now_ms)
        if answer.is_stream and answer.status == 200:
            self._fleet.health.took(engine.info.id, shape, now_ms - sent_ms)

    async def _begin(self, call: Call, engine: Engine, answer: Answer, asked_for_usage: bool) -> Begun:
        self._metrics.ttft_seconds.observe((self._clock.now_ms() - call.began_ms) / 1000)
        self._metrics.requests.labels(engine.info.id, answer.status).inc()
        meter = usage.meter_for(asked_for_usage, answer.is_stream, engine.stamp)
        traced = call.way if engine.stock is None and answer.is_stream and answer.status == 200 else None
        told = None if traced is None else Told(traced, call.body.get(rewrite.TOKEN_IDS) is True)
        begun = begin(answer, meter, told, engine.info.fingerprint)
        await begun.response.prepare(call.http)
        return begun

    async def _relay(self, call: Call, begun: Begun, engine: EngineId, answer: Answer) -> web.StreamResponse | Failure:
        chunk, told = answer.first, begun.told
        while chunk:
            if passed := begun.feed(chunk):
                await begun.response.write(passed)
            if told is not None and told.failure is not None:
                return await self._broke(call, begun, engine, told.failure)
            try:
                chunk = await answer.content.readany()
            except upstream.BROKEN as error:
                return await self._broke(call, begun, engine, upstream.said(error))
        if told is not None and not told.is_whole:
            return await self._broke(call, begun, engine, "it ended too soon")
        if told is not None and told.breaks:
            self._metrics.continued_streams.labels("whole").inc()
        await begun.response.write_eof(begun.end())
        return begun.response

    async def _go_on(self, call: Call, begun: Begun, engine: Engine, answer: Answer) -> web.StreamResponse | Failure:
        """Continues what another engine has begun."""
        if not answer.is_stream or answer.status != 200:
            return Failure(f"status {answer.status}")
        return await self._relay(call, begun, engine.info.id, answer)

    async def _broke(self, call: Call, begun: Begun, engine: EngineId, reason: str) -> web.StreamResponse | Failure:
        """The engine has failed midway: a failure if another can go on, else the end of the answer."""
        self._metrics.broken_streams.labels(engine).inc()
        told = begun.told
        if told is not None and told.can_go_on and told.breaks < self._continuations:
            told.broke()
            call.facts = told.rest_facts(call.facts)
            call.chunks = self._fleet.cut(call.facts)
            return Failure(f"midway: {reason}", midway=True)
        self._fleet.health.failed(engine, self._clock.now_ms())
        log.warning("request %s: engine %s broke off (%s)", call.id, engine, reason)
        return await self._break_off(call, begun)

    async def _break_off(self, call: Call, begun: Begun) -> web.StreamResponse:
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

    def _compare(self, engine: Engine, prediction: Prediction | None, kind: str, meter: Meter) -> None:
        """What the answer says of the engine's cache against what was predicted."""
        if isinstance(meter, Unasked):
            engine.stamp = meter.stamp
        if prediction is None or meter.usage is None:
            return
        error = self._fleet.observed(prediction, kind, meter.usage)
        if error is not None:
            self._metrics.prediction_error_tokens.labels(error.engine, error.by).observe(error.tokens)

    def _remember(self, call: Call, engine: Engine, answer: Answer, meter: Meter) -> None:
        """Where the session's KV is now."""
        if call.session is not None and answer.status == 200:
            tokens = call.facts.prompt_tokens if meter.usage is None else meter.usage.prompt_tokens
            self._fleet.sessions.went(call.session, Last(engine.info.id, engine.info.epoch, tokens))

    def _count(self, decision: Decision, block_size: int) -> None:
        self._metrics.predicted_cached_tokens.inc(decision.predicted_blocks * block_size)
        if decision.source is not None:
            self._metrics.source_hints.labels(decision.source).inc()

    def _give_up(self, failure: Failure | None) -> web.StreamResponse:
        if failure is not None and failure.status is not None and failure.headers is not None:
            self._metrics.requests.labels("", failure.status).inc()
            response = web.Response(status=failure.status, body=failure.body)
            response.headers.clear()
            response.headers.extend(failure.headers)
            return response
        self._metrics.requests.labels("", 503).inc()
        if failure is not None:
            return replies.error(503, f"The engines failed before they answered: {failure.reason}", "engine_failed")
        return replies.error(503, "No engine is ready to serve this model.", "no_engine_ready")


def _attempt_at(
    engine: Engine, call: Call, decision: Decision, asking: tuple[bytes, Mapping[str, Any]] | None
) -> Attempt:
    """What an engine is sent. One without our plugin gets no hint: it would not understand it."""
    raw, body = asking or (call.raw, call.body)
    if engine.info.priorities:
        raw, body = rewrite.with_priority(raw, body, call.wish.priority)
    traced = call.way is not None and engine.stock is None
    if traced:
        raw = rewrite.asking_for_token_ids(raw, body)
    if call.begun is not None and call.begun.told is not None:
        raw = call.begun.told.rest(raw)
    if engine.stock is None:
        sent = rewrite.with_hint(raw, body, {"llmd": _hint(call.id, decision)})
    else:
        sent = rewrite.without_hint(raw, body)
    headers = rewrite.request_headers(call.http.headers.items(), call.id)
    if asking is not None or traced:
        headers = rewrite.uncompressed(headers)
    if engine.stock is not None and engine.stock.rank is not None:
        headers = rewrite.for_rank(headers, engine.stock.rank)
    return Attempt(engine.info.http.rstrip("/") + call.http.path, headers, sent)


def _hint(request: str, decision: Decision) -> dict[str, Any]:
    if decision.source is None:
        return {"request": request}
    if decision.source_until is None:
        return {"request": request, "source": decision.source}
    return {"request": request, "sources": [{"engine": decision.source, "until": decision.source_until}]}


@web.middleware
async def in_openai_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns the errors of the HTTP library (no such path, body too large) into OpenAI's shape."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return replies.error(error.status, error.reason)
