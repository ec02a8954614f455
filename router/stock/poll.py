"""Asks stock engines over HTTP whether they live, what they serve and how busy they are. Decides nothing.

One task per engine, with one question at a time and a limit on each: an engine that hangs keeps nobody waiting.
"""

import asyncio
import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from vllm_llmd.router.stock.report import Models, Scrape, read_metrics, read_models
from vllm_llmd.router.stock.settings import StockEngine

log = logging.getLogger(__name__)

MODELS_EVERY_POLLS: Final = 20
LONGEST_PAUSE_S: Final = 5.0
LARGEST_ANSWER: Final = 16 << 20


@dataclass(frozen=True)
class Report:
    """An engine's answer. `models` is None where they were not asked for, `scrape` where no `/metrics` came in time."""

    models: Models | None
    scrape: Scrape | None


@dataclass(frozen=True)
class Pace:
    """How often to ask, and how long to wait for an answer."""

    every_s: float
    patience_s: float


Heard = Callable[[StockEngine, Report], None]
Failed = Callable[[StockEngine, str], None]


class StockPoll:
    """`heard` is called for every answer, `failed` with what was asked where none came."""

    def __init__(self, pace: Pace, api_key: str | None, heard: Heard, failed: Failed) -> None:
        self._pace = pace
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._heard = heard
        self._failed = failed

    async def run(self, engines: Sequence[StockEngine]) -> None:
        """Asks for ever."""
        timeout = aiohttp.ClientTimeout(total=self._pace.patience_s)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0)
        async with (
            aiohttp.ClientSession(headers=self._headers, timeout=timeout, connector=connector) as session,
            asyncio.TaskGroup() as tasks,
        ):
            for engine in engines:
                tasks.create_task(self._watch(session, engine))

    async def _watch(self, session: aiohttp.ClientSession, engine: StockEngine) -> None:
        await asyncio.sleep(random.random() * self._pace.every_s)
        polls = failures = 0
        while True:
            report = await self._ask(session, engine, with_models=polls % MODELS_EVERY_POLLS == 0)
            if report is None:
                failures, polls = failures + 1, 0  # whoever comes back may serve something else
            else:
                failures, polls = 0, polls + 1
                self._heard(engine, report)
            pause_s = min(self._pace.every_s * 2 ** min(failures, 10), max(LONGEST_PAUSE_S, self._pace.every_s))
            await asyncio.sleep(pause_s)

    async def _ask(self, session: aiohttp.ClientSession, engine: StockEngine, with_models: bool) -> Report | None:
        base = engine.http.rstrip("/")
        if await self._body(session, engine, f"{base}/health") is None:
            return None
        models = None
        if with_models:
            body = await self._body(session, engine, f"{base}/v1/models")
            models = None if body is None else read_models(_json(body))
            if models is None:
                return None
        body = await self._body(session, engine, f"{base}/metrics")
        return Report(models, None if body is None else read_metrics(body.decode("utf-8", "replace")))

    async def _body(self, session: aiohttp.ClientSession, engine: StockEngine, url: str) -> bytes | None:
        """The answer's body; None if there is no good one in time."""
        try:
            async with session.get(url, allow_redirects=False) as response:
                if response.status == 200 and (response.content_length or 0) <= LARGEST_ANSWER:
                    return await response.read()
                problem = f"status {response.status}"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            problem = f"{type(error).__name__} {error}".strip()
        log.debug("stock engine %s: %s", url, problem)
        self._failed(engine, url.rpartition("/")[2])
        return None


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
