"""The HTTP client thread: places orders with source engines as ordinary one-token requests.

Closing the connection cancels the source's request. Decides nothing about the order's fate: it reports results.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from vllm_llmd.kv_connector.ticket import Ticket
from vllm_llmd.names import OrderId

logger = logging.getLogger(__name__)

ORDER_KEY = "llmd_order"
"""Where the ticket stands in an order's `kv_transfer_params`."""

CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class HttpOrder:
    """What to POST, and where. `body` lacks the ticket; `headers` carry the trace on."""

    url: str
    ticket: Ticket
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OrderResult:
    """How the source's request ended; `error` is None in good order."""

    order: OrderId
    error: str | None


class OrderClient:
    """Places and cancels orders from any thread; results are taken by the engine thread.

    `on_result` is called, from the client's own thread, when there is one to take.
    """

    def __init__(self, api_key: str | None, on_result: Callable[[], None]) -> None:
        self._on_result = on_result
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._results: queue.SimpleQueue[OrderResult] = queue.SimpleQueue()
        self._tasks: dict[OrderId, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None
        self._thread = threading.Thread(target=self._run, name="llmd-orders", daemon=True)
        self._thread.start()

    def place(self, order: HttpOrder) -> None:
        """Send an order; returns at once."""
        self._loop.call_soon_threadsafe(self._start, order)

    def cancel(self, order: OrderId) -> None:
        """Hang up on an order; it yields no result any more. An order that has ended stays as it is."""
        self._loop.call_soon_threadsafe(self._stop, order)

    def results(self) -> list[OrderResult]:
        """What has ended since the last call."""
        taken = []
        while True:
            try:
                taken.append(self._results.get_nowait())
            except queue.Empty:
                return taken

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=2)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        for task in self._tasks.values():
            task.cancel()
        self._loop.run_until_complete(self._finish())
        self._loop.close()

    async def _finish(self) -> None:
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def _start(self, order: HttpOrder) -> None:
        task = self._loop.create_task(self._place(order))
        self._tasks[order.ticket.order] = task
        task.add_done_callback(lambda _: self._tasks.pop(order.ticket.order, None))

    def _stop(self, order: OrderId) -> None:
        if order in self._tasks:
            self._tasks[order].cancel()

    async def _place(self, order: HttpOrder) -> None:
        error: str | None
        try:
            error = await self._post(order)
        except (aiohttp.ClientError, TimeoutError, OSError) as failure:
            error = f"source unreachable: {type(failure).__name__}: {failure}"
        except Exception as failure:
            logger.exception("llmd order %s", order.ticket.order)
            error = f"could not be placed: {failure}"
        self._results.put(OrderResult(order.ticket.order, error))
        self._on_result()

    async def _post(self, order: HttpOrder) -> str | None:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, headers=self._headers)
        body = {**order.body, "kv_transfer_params": {ORDER_KEY: msgspec.to_builtins(order.ticket)}}
        headers = {**order.headers, "X-Request-Id": order.ticket.order}
        url = f"{order.url}/v1/completions"
        async with self._session.post(url, data=msgspec.json.encode(body), headers=headers) as response:
            content = await response.read()
            if response.status != 200:
                return f"source answered {response.status}: {content[:200].decode(errors='replace')}"
            return None
