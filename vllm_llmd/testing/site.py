"""A router process, fake engines and a client, over real ZeroMQ and HTTP."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Final, TypeVar

import aiohttp

from vllm_llmd.names import Epoch
from vllm_llmd.testing.fake_engine import FakeEngine, FakeSettings
from vllm_llmd.testing.process import ServerProcess

DEADLINE_S: Final = 120.0
"""What has not happened by then never will, however slow the machine."""

PATIENT: Final = (
    *("--stale-after-ms", "120000", "--gone-after-ms", "240000"),
    *("--connect-timeout-ms", "60000", "--tokenizer-wait-ms", "60000"),
)
"""How long a router of tests waits for others, unless it is told otherwise: a busy machine is nobody's failure."""

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"

T = TypeVar("T")


async def until(ask: Callable[[], Awaitable[T]], wanted: Callable[[T], bool]) -> T:
    """Asks until the answer is the one wanted."""
    give_up = time.monotonic() + DEADLINE_S
    while True:
        answer = await ask()
        if wanted(answer):
            return answer
        assert time.monotonic() < give_up, f"still {answer!r}"
        await asyncio.sleep(0.02)


async def statuses(answers: Iterable[Awaitable[aiohttp.ClientResponse]]) -> list[int]:
    """Of answers that are read to their ends."""
    responses = [await answer for answer in answers]
    for response in responses:
        await response.read()
    return [response.status for response in responses]


class WholeAnswer(aiohttp.ClientResponse):
    """Is read to its end when its context is left, after which the router knows all that the answer teaches it.

    If it were not, the client would have left, as a router sees it. Where that is meant, a test closes the answer.
    """

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if error is None and not self.closed:
            await self.read()
        await super().__aexit__(kind, error, at)


@asynccontextmanager
async def open_client() -> AsyncIterator[aiohttp.ClientSession]:
    """Its answers are whole; those that are still open in the end are closed, or they would warn in a later test."""
    answers: list[aiohttp.ClientResponse] = []

    async def came(_: aiohttp.ClientSession, __: SimpleNamespace, end: aiohttp.TraceRequestEndParams) -> None:
        answers.append(end.response)

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(came)
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(timeout=timeout, response_class=WholeAnswer, trace_configs=[trace]) as client:
        try:
            yield client
        finally:
            for answer in answers:
                answer.close()


class Router:
    """One router process, which can be killed and started again on the same ports."""

    def __init__(self, log: Path, flags: tuple[str, ...]) -> None:
        self.log = log
        self.http = self.zmq = ""
        self._process = ServerProcess("vllm_llmd.router.main", (*PATIENT, *flags), log)

    @property
    def running(self) -> bool:
        return self._process.running

    async def start(self) -> None:
        port, bind = (self.http.rpartition(":")[2], self.zmq) if self.http else ("0", "tcp://127.0.0.1:0")
        said = await asyncio.to_thread(self._process.start, "--port", port, "--bind", bind)
        self.http, self.zmq = said["http"], said["router"]

    def end(self, number: signal.Signals) -> int:
        return self._process.end(number)


@dataclass
class Site:
    """A router, its engines and a client."""

    router: Router
    client: aiohttp.ClientSession
    engines: list[FakeEngine] = field(default_factory=list)

    async def engine(self, engine_id: str, epoch: int | None = None, **settings: Any) -> FakeEngine:
        engine = FakeEngine(FakeSettings(engine_id, (self.router.zmq,), **settings))
        if epoch is not None:
            engine.epoch = Epoch(epoch)
        self.engines.append(await engine.start())
        return engine

    async def ready(self, *engines: FakeEngine) -> None:
        wanted = {(engine.settings.id, engine.epoch, "ready") for engine in engines}
        await until(self.states, lambda states: wanted <= states)

    async def states(self) -> set[tuple[str, int, str]]:
        return {(engine["id"], engine["epoch"], engine["state"]) for engine in await self.admin_engines()}

    async def admin_engines(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = (await self.get_json("/admin/engines"))["engines"]
        return listed

    async def get_json(self, path: str) -> Any:
        async with self.client.get(self.router.http + path) as response:
            return await response.json()

    async def indexed(self, engine: FakeEngine) -> set[int]:
        index = await self.get_json(f"/admin/index/{engine.settings.id}")
        return {int(name) for name in index.get("names", ["-1"])}

    async def index_equals_truth(self, engine: FakeEngine) -> None:
        await until(lambda: self.indexed(engine), lambda names: names == engine.held)

    def post(self, body: Any, path: str = CHAT, **more: Any) -> Any:
        return self.client.post(self.router.http + path, json=body, **more)

    async def metric(self, line: str) -> float:
        async with self.client.get(self.router.http + "/metrics") as response:
            found = [each.split()[-1] for each in (await response.text()).splitlines() if each.startswith(line + " ")]
        return float(found[0]) if found else 0.0


def chat(text: str, **more: Any) -> dict[str, Any]:
    """The body of a chat of one turn."""
    return {"model": "fake", "messages": [{"role": "user", "content": text}], **more}
