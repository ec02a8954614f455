"""The OpenAI front door: reads a request and has it served, once there is room for it.

Owns no state of the fleet.
"""

import asyncio
import itertools
import time
from typing import Final, NamedTuple

from aiohttp import web
from aiohttp.typedefs import Handler

from vllm_llmd.clock import unix_ms
from vllm_llmd.router.audit import explain
from vllm_llmd.router.index.sessions import read_session
from vllm_llmd.router.request import Kind, RequestError, read_facts, skim, without_prompt
from vllm_llmd.router.serving import replies
from vllm_llmd.router.serving.call import Call
from vllm_llmd.router.serving.context import Context
from vllm_llmd.router.serving.dispatch import Dispatcher
from vllm_llmd.router.serving.exact import Exact
from vllm_llmd.router.slo import Wish, band, read_wish, with_wish
from vllm_llmd.router.upstream import rewrite
from vllm_llmd.router.upstream.failover import way_to_continue
from vllm_llmd.router.upstream.turns import band_of
from vllm_llmd.router.waiting import intake
from vllm_llmd.router.waiting.bodies import Bodies, BodyTooLarge, Hold, NoRoomForBody
from vllm_llmd.router.waiting.room import WaitingRoom

PATHS: Final[dict[str, Kind]] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}


class _Asked(NamedTuple):
    """A request whose body has been read: what is known of it besides."""

    http: web.Request
    began_ms: float
    wish: Wish
    hold: Hold


class Front:
    """Handlers for the OpenAI endpoints."""

    def __init__(self, context: Context) -> None:
        self._settings = settings = context.settings
        self._fleet = fleet = context.fleet
        self._metrics = metrics = context.metrics
        self._clock = context.clock
        self._life = context.life
        self._numbers = itertools.count(1)
        self._started_s = int(time.time())
        self._exact = Exact(settings, fleet.agreement, metrics)
        self._bodies = Bodies(settings.bodies_bytes, settings.max_body_bytes)
        metrics.watch_bodies(self._bodies)
        self._room = WaitingRoom(settings, fleet, metrics, context.clock)
        self._dispatcher = Dispatcher(context, self._room)

    def add_routes(self, app: web.Application) -> None:
        for path in PATHS:
            app.router.add_post(path, self._completions, expect_handler=intake.say_later)
        app.router.add_get("/v1/models", self._models)
        app.cleanup_ctx.append(self._dispatcher.keep_session)
        app.on_shutdown.append(self._close_room)

    async def _close_room(self, _: web.Application) -> None:
        await self._room.close()

    async def _models(self, _: web.Request) -> web.Response:
        longest: dict[str, int] = {}
        for engine in self._fleet.membership.accepting():
            for model in (*engine.info.models, *engine.info.adapters):
                longest[model] = max(engine.info.max_model_len, longest.get(model, 0))
        return web.json_response(replies.models(longest, self._started_s))

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        with self._bodies.hold() as hold:
            call = await self._call(http, hold)
            return await self._answer(call) if isinstance(call, Call) else call

    async def _call(self, http: web.Request, hold: Hold) -> Call | web.Response:
        """The request, or why it is none."""
        began_ms = self._clock.now_ms()
        try:
            wish = read_wish(http.headers.items(), self._settings.objective or {})
            raw = await self._body(http, wish, hold)
            return await self._read(_Asked(http, began_ms, wish, hold), raw) if isinstance(raw, bytes) else raw
        except RequestError as error:
            return replies.error(400, str(error), error.code, error.param)

    async def _body(self, http: web.Request, wish: Wish, hold: Hold) -> bytes | web.Response:
        """All of it, or why it is not read."""
        try:
            return await intake.read(http, hold)
        except BodyTooLarge:
            return replies.too_large(self._bodies.largest_bytes)
        except NoRoomForBody:
            self._metrics.shed.labels(band(wish.priority), "bodies-full").inc()
            return replies.shed("bodies-full", self._room.retry_after_s())
        except TimeoutError:
            return replies.error(408, "The rest of the request's body does not come.", "body_incomplete")

    async def _answer(self, call: Call) -> web.StreamResponse:
        """What the client gets: from an engine, or why from none."""
        model = call.facts.model
        if model is not None and self._fleet.membership.ready() and not self._fleet.serves(model):
            return replies.error(404, f"The model `{model}` does not exist.", "model_not_found", "model")
        self._dispatcher.began()
        with self._metrics.inflight.track_inprogress():
            try:
                return await self._dispatcher.serve(call)
            except asyncio.CancelledError:
                self._metrics.cancelled.inc()
                raise
            except ConnectionResetError:  # found out by writing to the client rather than by being cancelled
                self._metrics.cancelled.inc()
                return web.Response(status=499)
            finally:
                self._dispatcher.ended(call)

    async def _read(self, asked: _Asked, raw: bytes) -> Call:
        """Raises RequestError for what cannot be routed."""
        http, wish = asked.http, asked.wish
        kind = PATHS[http.path]
        body, long = skim(raw)
        facts = with_wish(await self._exact.facts(read_facts(kind, body, long), kind, raw), wish)
        facts = self._fleet.lengths.estimated(facts)
        self._fleet.rosters.check(facts)
        request = f"{self._life}-{next(self._numbers)}"
        return Call(
            id=request,
            http=http,
            raw=raw,
            body=without_prompt(body),
            facts=facts,
            chunks=self._fleet.cut(facts),
            began_ms=asked.began_ms,
            asks_usage=rewrite.may_ask_for_usage(body),
            wish=wish,
            came_unix_ms=unix_ms() - (self._clock.now_ms() - asked.began_ms),
            band=band_of(body, wish),
            arrival=self._room.arrival(request, facts, len(raw)),
            hold=asked.hold,
            way=way_to_continue(kind, body, facts) if self._settings.continuations else None,
            explain=explain.wanted(http.headers.get(explain.ASK_HEADER)),
            session=read_session(http.headers.items()),
        )


@web.middleware
async def in_openai_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns the errors of the HTTP library, such as for a path that there is not, into OpenAI's shape."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return replies.error(error.status, error.reason)
