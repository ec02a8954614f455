"""Wires one router process: the link to engines, the HTTP front, and an end in good order.

`python -m vllm_llmd.router.main` is the same as `vllm-llmd router`. When both ends listen, one line of JSON on
stdout says where: {"http": "http://HOST:PORT", "router": "tcp://HOST:PORT"}.
"""

import argparse
import asyncio
import gc
import json
import logging
import secrets
import signal
import sys
import time
from collections.abc import Coroutine
from typing import Any

import uvloop
from aiohttp import web

import vllm_llmd
from vllm_llmd import program
from vllm_llmd.clock import MonotonicClock
from vllm_llmd.errors import ConfigError
from vllm_llmd.kernels import (
    frames_cpu,
    hash_chain_cpu,
    json_strings_cpu,
    kv_events_cpu,
    prefix_table_cpu,
    text_table_cpu,
)
from vllm_llmd.router.audit.decisions import Decisions
from vllm_llmd.router.audit.recorder import Recorder, recorder
from vllm_llmd.router.audit.recording import Began
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.index import evictions
from vllm_llmd.router.ingest import Ingest
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.placement import plans_cpu
from vllm_llmd.router.serving.admin import Admin, bearer_guard
from vllm_llmd.router.serving.context import Context
from vllm_llmd.router.serving.front import Front, in_openai_shape
from vllm_llmd.router.settings import RouterSettings, add_arguments, from_args
from vllm_llmd.router.stock.fleet import StockFleet
from vllm_llmd.router.stock.observe import StockCollector

log = logging.getLogger(__name__)


def run(settings: RouterSettings) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status. Raises ConfigError if it cannot listen."""
    program.log_to_stderr()
    return uvloop.run(serve(settings))


async def serve(settings: RouterSettings) -> int:
    """Runs one router in the current event loop."""
    hash_chain_cpu.compile_ahead()
    prefix_table_cpu.compile_ahead()
    evictions.compile_ahead()
    text_table_cpu.compile_ahead()
    json_strings_cpu.compile_ahead()
    frames_cpu.compile_ahead()
    plans_cpu.compile_ahead()
    clock, life = MonotonicClock(), secrets.token_hex(6)
    fleet = Fleet(settings, clock, life)
    metrics = Metrics(fleet)
    recording = _recorder(settings, metrics)
    kept = settings.decisions, settings.decision_bytes
    decisions = Decisions(settings.policy, *kept, time.time, recording)
    context = Context(settings, fleet, metrics, clock, decisions, life)
    ingest = Ingest(fleet, metrics, settings.bind)
    stock = _stock(settings, fleet, metrics)
    runner = web.AppRunner(
        _application(context),
        handler_cancellation=True,  # a client that goes away must stop the engine's work
        shutdown_timeout=settings.shutdown_ms / 1000,
        access_log=None,
    )
    try:
        http = await _listen(runner, settings)
        gc.freeze()  # what is there for good is not searched for garbage again and again, for 100 ms each time
        sys.stdout.write(json.dumps({"http": http, "router": ingest.endpoint}) + "\n")
        sys.stdout.flush()
        log.info("router %s: serving %s, engines connect to %s", life, http, ingest.endpoint)
        return await _until_told_to_stop(ingest.run(), *([] if stock is None else [stock.run()]))
    finally:
        await runner.cleanup()
        if recording is not None:
            recording.close()
        ingest.close()
        if stock is not None:
            stock.close()
        log.info("router %s: stopped", life)


def _stock(settings: RouterSettings, fleet: Fleet, metrics: Metrics) -> StockFleet | None:
    if not settings.stock_engine:
        return None
    kv_events_cpu.compile_ahead()
    stock = StockFleet(settings, fleet, MonotonicClock())
    metrics.add(StockCollector(stock))
    return stock


def _recorder(settings: RouterSettings, metrics: Metrics) -> Recorder | None:
    if settings.record_decisions is None:
        return None
    began = Began(vllm_llmd.__version__, settings.policy, settings.min_remote_tokens, time.time())
    return recorder(settings.record_decisions, began, metrics.decisions_recorded, metrics.decisions_lost)


def _application(context: Context) -> web.Application:
    settings = context.settings
    middlewares = [in_openai_shape, *([bearer_guard(settings.api_key)] if settings.api_key else [])]
    app = web.Application(middlewares=middlewares)
    Front(context).add_routes(app)
    Admin(context).add_routes(app)
    return app


async def _listen(runner: web.AppRunner, settings: RouterSettings) -> str:
    await runner.setup()
    site = web.TCPSite(runner, settings.host, settings.port)
    try:
        await site.start()
    except OSError as error:
        raise ConfigError(f"host and port must be free to listen on: {error}") from None
    return program.http_url(runner.addresses[0][:2])


async def _until_told_to_stop(*jobs: Coroutine[Any, Any, None]) -> int:
    """Ends when a signal comes, or when a link to engines fails, which no router survives."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    receiving = [asyncio.create_task(job) for job in jobs]
    waiting = asyncio.create_task(told.wait())
    await asyncio.wait([*receiving, waiting], return_when=asyncio.FIRST_COMPLETED)
    failed = [task for task in receiving if task.done()]
    for task in failed:
        log.error("a link to the engines has failed", exc_info=task.exception())
    waiting.cancel()
    for task in receiving:
        task.cancel()
    await asyncio.gather(*receiving, waiting, return_exceptions=True)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="vllm-llmd router", description="OpenAI front door that knows the KV cache")
    add_arguments(parser)
    return program.main(parser, lambda args: run(from_args(args)))


if __name__ == "__main__":
    sys.exit(main())
