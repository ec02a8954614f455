"""The OpenAI front door: checks a request, has it placed, and passes the engine's answer through byte for byte.

Owns no state of the fleet; an engine that fails before its first byte is retried once elsewhere.
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
from vllm_llmd.router.decide import Decision, decide
from vllm_llmd.router.exact import Exact
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.membership import Engine
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.request import Facts, Kind, RequestError, read_facts, skim
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.text_index import Chunks
from vllm_llmd.router.truth import Prediction
from vllm_llmd.router.upstream import Answer, Attempt, Failure
from vllm_llmd.router.usage import Meter, Unasked

log = logging.getLogger(__name__)

ATTEMPTS: Final = 2
PATHS: Final[dict[str, Kind]] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}


@dataclass
class Call:
    """One client request on its way through. `asking` is the request with the usage of its stream asked for."""

    id: str
    http: web.Request
    raw: bytes
    body: dict[str, Any]
    facts: Facts
    chunks: Chunks
    began_ms: float
    asking: tuple[bytes, Mapping[str, Any]] | None
    tried: list[EngineId] = field(default_factory=list)


class Front:
    """Handlers for the OpenAI endpoints."""

    def __init__(self, settings: RouterSettings, fleet: Fleet, metrics: Metrics, clock: Clock, life: str) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._clock = clock
        self._life = life
        self._numbers = itertools.count(1)
        self._started_s = int(time.time())
        self._policy = policies.make(settings.policy, PolicySettings(settings.min_remote_tokens, random.Random()))
        self._exact = Exact(settings, fleet.agreement, metrics)
        self._connect_timeout_ms = settings.connect_timeout_ms
        self._session: aiohttp.ClientSession | None = None

    def add_routes(self, app: web.Application) -> None:
        for path in PATHS:
            app.router.add_post(path, self._completions)
        app.router.add_get("/v1/models", self._models)
        app.cleanup_ctx.append(self._keep_session)

    async def _keep_session(self, _: web.Application) -> Any:
        self._session = upstream.open_session(self._connect_timeout_ms)
        yield
        await self._session.close()

    async def _models(self, _: web.Request) -> web.Response:
        longest: dict[str, int] = {}
        for engine in self._fleet.membership.ready():
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
            body, long = skim(raw)
            facts = await self._exact.facts(read_facts(PATHS[http.path], body, long), PATHS[http.path], raw)
        except RequestError as error:
            return replies.error(400, str(error), "invalid_request", error.param)
        if facts.model is not None and self._fleet.membership.ready() and not self._fleet.serves(facts.model):
            return replies.error(404, f"The model `{facts.model}` does not exist.", "model_not_found", "model")
        request = f"{self._life}-{next(self._numbers)}"
        asking = rewrite.asking_for_usage(raw, body)
        call = Call(request, http, raw, body, facts, self._fleet.cut(facts), began_ms, asking)
        with self._metrics.inflight.track_inprogress():
            try:
                return await self._serve(call)
            except asyncio.CancelledError:
                self._metrics.cancelled.inc()
                raise
            except ConnectionResetError:  # found out by writing to the client rather than by being cancelled
                self._metrics.cancelled.inc()
                return web.Response(status=499)

    async def _serve(self, call: Call) -> web.StreamResponse:
        failure: Failure | None = None
        for _ in range(ATTEMPTS):
            candidates = self._fleet.candidates(call.facts, call.chunks, call.tried)
            decision = decide(call.facts, candidates, self._policy)
            if decision is None:
                break
            outcome = await self._attempt(call, decision)
            if not isinstance(outcome, Failure):
                return outcome
            failure = outcome
            call.tried.append(decision.destination)
            self._metrics.retries.labels(decision.destination).inc()
            log.warning("request %s: engine %s failed (%s)", call.id, decision.destination, failure.reason)
        return self._give_up(failure)

    async def _attempt(self, call: Call, decision: Decision) -> web.StreamResponse | Failure:
        engine = self._fleet.membership.get(decision.destination)
        assert engine is not None and self._session is not None
        self._fleet.place(call.id, decision, call.chunks)
        self._count(decision, engine.info.block_size)
        prediction = self._fleet.foretold(call.facts, decision) if usage.tells_of_its_prompt(call.body) else None
        asking = call.asking if engine.takes_stream_options else None
        try:
            async with upstream.ask(self._session, _attempt_at(engine, call, decision, asking)) as answer:
                if isinstance(answer, Failure):
                    return answer
                if asking is None or not answer.refuses(rewrite.STREAM_OPTIONS):
                    self._metrics.ttft_seconds.observe((self._clock.now_ms() - call.began_ms) / 1000)
                    self._metrics.requests.labels(decision.destination, answer.status).inc()
                    meter = usage.meter_for(asking is not None, answer.is_stream, engine.stamp)
                    response = await self._relay(call, decision.destination, answer, meter)
                    self._compare(engine, prediction, f"{call.http.path} {answer.is_stream}", meter)
                    return response
                engine.takes_stream_options = False
        finally:
            self._fleet.done(call.id, decision)
        return await self._attempt(call, decision)

    async def _relay(self, call: Call, engine: EngineId, answer: Answer, meter: Meter) -> web.StreamResponse:
        response = _response(answer, meter)
        await response.prepare(call.http)
        chunk = answer.first
        while chunk:
            if passed := meter.feed(chunk):
                await response.write(passed)
            try:
                chunk = await answer.content.readany()
            except upstream.BROKEN as error:
                log.warning("request %s: engine %s broke off (%s)", call.id, engine, error)
                self._metrics.broken_streams.labels(engine).inc()
                if left := meter.end():
                    await response.write(left)
                await _break_off(call.http, response, answer)
                return response
        await response.write_eof(meter.end())
        return response

    def _compare(self, engine: Engine, prediction: Prediction | None, kind: str, meter: Meter) -> None:
        """What the answer says of the engine's cache against what was predicted."""
        if isinstance(meter, Unasked):
            engine.stamp = meter.stamp
        if prediction is None or meter.usage is None:
            return
        error = self._fleet.observed(prediction, kind, meter.usage)
        if error is not None:
            self._metrics.prediction_error_tokens.labels(error.engine, error.by).observe(error.tokens)

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


async def _break_off(http: web.Request, response: web.StreamResponse, answer: Answer) -> None:
    """Lets the client know that the answer is not whole: as an event where the stream has events, else by a reset."""
    if answer.is_stream:
        await response.write(replies.error_event("The engine failed midway.", "engine_failed"))
        await response.write_eof()
    elif http.transport is not None:
        http.transport.abort()


def _attempt_at(
    engine: Engine, call: Call, decision: Decision, asking: tuple[bytes, Mapping[str, Any]] | None
) -> Attempt:
    """What an engine is sent. One without our plugin gets no hint: it would not understand it."""
    raw, body = asking or (call.raw, call.body)
    if engine.stock is None:
        sent = rewrite.with_hint(raw, body, {"llmd": _hint(call.id, decision)})
    else:
        sent = rewrite.without_hint(raw, body)
    headers = rewrite.request_headers(call.http.headers.items(), call.id)
    if asking is not None:
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


def _response(answer: Answer, meter: Meter) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status)
    headers = rewrite.unsized(answer.headers) if isinstance(meter, Unasked) else answer.headers
    for name, value in headers:
        response.headers.add(name, value)
    return response


@web.middleware
async def in_openai_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns the errors of the HTTP library (no such path, body too large) into OpenAI's shape."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return replies.error(error.status, error.reason)
