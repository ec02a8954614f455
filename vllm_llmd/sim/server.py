"""The OpenAI API of one simulated engine, its `/metrics`, and the switches of its failures."""

import asyncio
import itertools
import json
import time

import msgspec
from aiohttp import web

from vllm_llmd.errors import ConfigError
from vllm_llmd.sim import replies
from vllm_llmd.sim.asks import AskError, Kind, read_ask
from vllm_llmd.sim.engine import SimEngine, Stream
from vllm_llmd.sim.exposition import exposition
from vllm_llmd.sim.failures import AnswerFailure, read_failures
from vllm_llmd.sim.misbehaviour import fail_before, fail_midway
from vllm_llmd.sim.replies import Heading
from vllm_llmd.sim.text import detokenize

MAX_BODY_BYTES = 1 << 30

PATHS: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}


class SimServer:
    """Handlers around an engine."""

    def __init__(self, engine: SimEngine) -> None:
        self._engine = engine
        self._numbers = itertools.count(1)
        self.requests = 0
        self.cancelled = 0

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        for path in PATHS:
            app.router.add_post(path, self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/reset_prefix_cache", self._reset)
        app.router.add_get("/sim/cache", self._cache)
        app.router.add_get("/sim/failures", self._failures)
        app.router.add_post("/sim/failures", self._failures)
        return app

    async def _models(self, _: web.Request) -> web.Response:
        room = self._engine.room
        return web.json_response(replies.models(room.models, room.max_model_len))

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, _: web.Request) -> web.Response:
        if self._engine.failures.hang_metrics:
            await asyncio.Event().wait()
        text = exposition(self._engine.model, self._engine.orders, self._engine.room.models[0])
        return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _reset(self, _: web.Request) -> web.Response:
        self._engine.forget_cache()
        return web.Response()

    async def _cache(self, _: web.Request) -> web.Response:
        """What the cache really holds, whatever routers have been told."""
        model = self._engine.model
        tiers = {"gpu": model.pool.names, "cpu": () if model.offload is None else model.offload.names}
        return web.json_response({tier: [str(name) for name in names] for tier, names in tiers.items()})

    async def _failures(self, http: web.Request) -> web.Response:
        """What goes wrong now, and how often a fault of the wire has happened; a POST changes what it names."""
        engine = self._engine
        if http.method == "POST":
            try:
                raw = json.loads(await http.read())
                engine.fail(read_failures(raw, engine.failures))
            except (ConfigError, ValueError, TypeError) as error:
                return web.json_response(replies.error(str(error), 400), status=400)
        said = msgspec.to_builtins(engine.failures) | {"happened": dict(engine.wire.happened or {})}
        return web.json_response(said)

    # --- completions --------------------------------------------------------------------------------------------

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        raw = await http.read()
        self.requests += 1
        try:
            failure = self._engine.failures.answers
            failed = await fail_before(http, failure)
            return failed or await self._serve(http, raw, failure)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _serve(self, http: web.Request, raw: bytes, failure: AnswerFailure) -> web.StreamResponse:
        engine = self._engine
        try:
            if engine.draining:
                raise AskError("the engine is draining", None, 503, "ServiceUnavailableError")
            ask = read_ask(PATHS[http.path], json.loads(raw), engine.room)
            objection = engine.orders.admit(ask.kv_transfer_params)
            if objection is not None:
                raise AskError(objection, "kv_transfer_params", 409, "ConflictError")
            streams = engine.submit(ask)
        except AskError as error:
            return web.json_response(
                replies.error(str(error), error.status, error.code, error.param), status=error.status
            )
        except (ValueError, RecursionError) as error:
            return web.json_response(replies.error(f"the request body is not valid JSON: {error}", 400), status=400)
        name = ("chatcmpl-" if ask.kind == "chat" else "cmpl-") + f"{engine.id}-{next(self._numbers)}"
        heading = Heading(name, int(time.time()), ask)
        try:
            if ask.stream:
                return await self._answer_by_pieces(http, heading, streams, failure)
            return await self._answer_whole(http, heading, streams, failure)
        except ConnectionResetError:  # found out by writing to the client rather than by being cancelled
            self.cancelled += 1
            return web.Response(status=499)
        finally:
            engine.leave(streams)

    async def _answer_whole(
        self, http: web.Request, heading: Heading, streams: list[Stream], failure: AnswerFailure
    ) -> web.StreamResponse:
        for stream, answer in zip(streams, heading.ask.answers, strict=True):
            left = len(answer)
            while left:
                left -= await stream.more()
        body = heading.whole([detokenize(answer) for answer in heading.ask.answers], _cached_tokens(streams))
        response = self._response("application/json")
        response.content_length = len(body)
        await response.prepare(http)
        await response.write(body[:10])
        await fail_midway(http, failure)
        await response.write(body[10:])
        await response.write_eof()
        return response

    async def _answer_by_pieces(
        self, http: web.Request, heading: Heading, streams: list[Stream], failure: AnswerFailure
    ) -> web.StreamResponse:
        """The prompts of a batch are answered one after the other; an engine would mix their pieces."""
        response = self._response("text/event-stream")
        for index, stream in enumerate(streams):
            answer, at = heading.ask.answers[index], 0
            while at < len(answer):
                more = await stream.more()
                end = heading.ask.ends[index] if at + more == len(answer) else None
                piece = heading.piece(index, answer[at : at + more], end)
                if not at:
                    piece = b"".join((*heading.opening(index), piece))
                if not response.prepared:
                    await response.prepare(http)
                await response.write(piece)
                if not at:
                    await fail_midway(http, failure)
                at += more
        await response.write(heading.closing(_cached_tokens(streams)))
        await response.write_eof()
        return response

    def _response(self, content_type: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"X-Sim-Engine": self._engine.id})
        response.content_type = content_type
        return response


def _cached_tokens(streams: list[Stream]) -> int:
    return sum(stream.request.cached_tokens or 0 for stream in streams)
