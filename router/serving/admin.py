"""What an operator asks a router: health, metrics, the state of the fleet, and which engines to spare."""

import asyncio
import hmac
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from vllm_llmd.names import TIERS, EngineId, Tier
from vllm_llmd.router import observe
from vllm_llmd.router.members.membership import Engine
from vllm_llmd.router.serving import replies
from vllm_llmd.router.serving.context import Context

log = logging.getLogger(__name__)

GUARDED = ("/v1/", "/admin/")

CANNOT_BE_VERIFIED: Final = "A stock engine publishes changes, but cannot be asked what it holds."

SHOWN: Final = 100
"""Decisions, unless more or fewer are asked for."""

VERIFY_POLLS: Final = 200
VERIFY_POLL_S: Final = 0.02


class Admin:
    """Handlers for `/health`, `/metrics` and `/admin`."""

    def __init__(self, context: Context) -> None:
        self._fleet = context.fleet
        self._metrics = context.metrics
        self._decisions = context.decisions

    def add_routes(self, app: web.Application) -> None:
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._exposition)
        app.router.add_get("/admin/engines", self._engines)
        app.router.add_get("/admin/scaling", self._scaling)
        app.router.add_post("/admin/engines/{engine}/drain", self._drain)
        app.router.add_post("/admin/engines/{engine}/undrain", self._undrain)
        app.router.add_get("/admin/decisions", self._latest)
        app.router.add_get("/admin/decisions/{decision}", self._decision)
        app.router.add_get("/admin/index/{engine}", self._index)
        app.router.add_post("/admin/index/{engine}/verify", self._verify)

    async def _health(self, _: web.Request) -> web.Response:
        ready = len(self._fleet.membership.accepting())
        if not ready:
            return replies.error(503, "No engine is ready.", "no_engine_ready")
        return web.json_response({"status": "ok", "ready": ready})

    async def _exposition(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.exposition(), headers={"Content-Type": observe.CONTENT_TYPE})

    async def _engines(self, _: web.Request) -> web.Response:
        return web.json_response({"engines": [self._shown(engine) for engine in self._fleet.membership.all()]})

    async def _scaling(self, _: web.Request) -> web.Response:
        return web.json_response({"pools": [plan.shown() for plan in self._fleet.plans()]})

    async def _drain(self, http: web.Request) -> web.Response:
        return self._changed(http, self._fleet.membership.drain)

    async def _undrain(self, http: web.Request) -> web.Response:
        return self._changed(http, self._fleet.membership.undrain)

    def _changed(self, http: web.Request, change: Callable[[EngineId], None]) -> web.Response:
        engine = EngineId(http.match_info["engine"])
        known = self._fleet.membership.get(engine)
        if known is None:
            return replies.error(404, f"There is no engine {engine}.", "engine_not_found")
        change(engine)
        log.info("engine %s: %s", engine, "draining" if known.draining else "gets requests")
        return web.json_response({"id": engine, "draining": known.draining, "requests": len(known.occupancy)})

    async def _latest(self, http: web.Request) -> web.Response:
        limit = http.query.get("limit", str(SHOWN))
        if not limit.isascii() or not limit.isdigit() or len(limit) > 9:
            text = f"limit must be a number of decisions; got {limit[:40]!r}"
            return replies.error(400, text, "invalid_request", "limit")
        named = http.query.get("engine")
        found = self._decisions.latest(int(limit), None if named is None else EngineId(named))
        return _json({"decisions": found, "kept": len(self._decisions)})

    async def _decision(self, http: web.Request) -> web.Response:
        decision = http.match_info["decision"]
        found = self._decisions.get(decision)
        if found is None:
            text = f"There is no decision {decision[:80]}, or it is none of the latest any more."
            return replies.error(404, text, "decision_not_found")
        record, why = found
        return _json({**msgspec.structs.asdict(record), **({} if why is None else why.shown())})

    async def _index(self, http: web.Request) -> web.Response:
        engine = EngineId(http.match_info["engine"])
        cursor, is_stock = self._fleet.cursor(engine), self._fleet.is_stock(engine)
        if cursor is None and not is_stock:
            return replies.error(404, f"There is no engine {engine}.", "engine_not_found")
        gpu, *lower = TIERS
        offloaded = {tier: self._names(engine, tier) for tier in lower}
        standing = {"stock": True} if cursor is None else {"seq": cursor.seq, "exact": cursor.exact}
        shown = standing | {"names": self._names(engine, gpu)}
        return web.json_response(shown | {"offloaded": {tier: names for tier, names in offloaded.items() if names}})

    async def _verify(self, http: web.Request) -> web.Response:
        engine = EngineId(http.match_info["engine"])
        if self._fleet.is_stock(engine):
            return replies.error(409, CANNOT_BE_VERIFIED, "cannot_be_verified")
        if self._fleet.cursor(engine) is None:
            return replies.error(404, f"There is no engine {engine}.", "engine_not_found")
        self._fleet.verify(engine)
        verdict = None
        for _ in range(VERIFY_POLLS):
            await asyncio.sleep(VERIFY_POLL_S)
            verdict = self._fleet.verdict(engine)
            if verdict is not None:
                break
        if verdict is None:
            text = f"Engine {engine} is silent, or its part of the index is just being healed: try again."
            return replies.error(503, text, "not_verified")
        return web.json_response(
            {
                "engine": engine,
                "seq": verdict.seq,
                "blocks": verdict.blocks,
                "missing": verdict.wrong.missing,
                "extra": verdict.wrong.extra,
            }
        )

    def _names(self, engine: EngineId, tier: Tier) -> list[str]:
        return [str(name) for name in sorted(self._fleet.index.held(engine, tier).tolist())]

    def _shown(self, engine: Engine) -> dict[str, object]:
        info, load = engine.info, engine.load
        return {
            "id": info.id,
            "role": info.role,
            "stock": engine.stock is not None,
            "state": engine.state.value,
            "draining": engine.draining,
            "requests": len(engine.occupancy),
            "circuit": self._fleet.health.standing(info.id).circuit.value,
            "epoch": info.epoch,
            "http": info.http,
            "models": info.models,
            "adapters": info.adapters,
            "labels": info.labels,
            "max_model_len": info.max_model_len,
            "load": {name: getattr(load, name) for name in load.__struct_fields__},
            "blocks_indexed": sum(self._fleet.index.contents(info.id, tier).blocks for tier in TIERS),
            "predictions": self._predictions(info.id),
            "rates": {name: round(value, 4) for name, value in asdict(self._fleet.models.rates(info.id)).items()},
        }

    def _predictions(self, engine: EngineId) -> dict[str, object] | None:
        standing = self._fleet.truth.standing(engine)
        if standing is None:
            return None
        return {
            "trust": standing.state.value,
            "kept": round(standing.kept, 3),
            "compared": standing.answers,
            "untold": standing.untold,
        }


def _json(value: object) -> web.Response:
    """What is no number becomes null."""
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def bearer_guard(api_key: str) -> Middleware:
    """A middleware that lets only clients with the key past, except to health and metrics."""
    expected = f"Bearer {api_key}".encode()

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode()
        if request.path.startswith(GUARDED) and not hmac.compare_digest(given, expected):
            return replies.error(401, "Send the router's API key as a bearer token.", "invalid_api_key")
        return await handler(request)

    return guard
