"""The users: hold the conversations of a workload over HTTP, and time the tokens they get.

One process and one thread, connections kept alive. Of a stream only the moments of its pieces are looked at, and the
usage at its end.
"""

import asyncio
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Self, TypeVar

import aiohttp
import msgspec
import uvloop
from pd_requests import MODEL_NAME, BenchError
from routing_plan import Conversation, Turn, Workload
from routing_values import Asked

from vllm_llmd.launch import ToldToStop

Found = TypeVar("Found")

ANSWER_S: Final = 300.0
_PIECE: Final = b'"choices":[{'


class _Details(msgspec.Struct):
    cached_tokens: int | None = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Event)


@dataclass
class _Answer:
    """An answer as it arrives: its events, and when the first and the last piece came."""

    first_s: float | None = None
    last_s: float = 0.0
    events: list[bytes] = field(default_factory=list)

    def line(self, line: bytes) -> None:
        """One line of the stream, which has just come."""
        if not line.startswith(b"data: {"):
            return
        if _PIECE in line:
            self.last_s = time.perf_counter()
            self.first_s = self.first_s or self.last_s
        self.events.append(line[6:])

    def read(self) -> tuple[str, _Usage]:
        """Its text and usage. Raises BenchError if it is not a whole answer."""
        try:
            events = [_decoder.decode(event) for event in self.events]
        except msgspec.DecodeError as error:
            raise BenchError(f"an answer cannot be read: {error}") from error
        usage = next((event.usage for event in reversed(events) if event.usage is not None), None)
        if self.first_s is None or usage is None:
            raise BenchError(f"an answer without tokens or usage: {b' '.join(self.events)[:500]!r}")
        return "".join(choice.delta.content or "" for event in events for choice in event.choices), usage


def run(work: Coroutine[Any, Any, Found]) -> Found:
    """In an event loop. Raises ToldToStop even if the signal comes within a callback, where loops swallow it."""
    told: list[ToldToStop] = []

    async def watched() -> Found:
        task = asyncio.current_task()

        def on_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            error = context.get("exception")
            if isinstance(error, ToldToStop) and task is not None:
                told.append(error)
                task.cancel()
            else:
                loop.default_exception_handler(context)

        asyncio.get_running_loop().set_exception_handler(on_error)
        return await work

    try:
        return uvloop.run(watched())
    except asyncio.CancelledError:
        if told:
            raise told[0] from None
        raise


@dataclass
class Users:
    """Everybody who asks at `http`. Times of a plan are multiplied by `unit_s`."""

    http: str
    unit_s: float
    asked: list[Asked] = field(default_factory=list)
    began_s: float = 0.0
    ended_s: float = 0.0

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60.0),
            timeout=aiohttp.ClientTimeout(total=ANSWER_S),
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def hold(self, workload: Workload) -> None:
        """Returns when everything is answered. Raises BenchError."""
        self.began_s = time.perf_counter()
        numbered = iter(enumerate(workload.conversations))
        try:
            async with asyncio.TaskGroup() as tasks:
                if workload.clients is None:
                    for number, conversation in numbered:
                        tasks.create_task(self._at(number, conversation))
                else:
                    for _ in range(workload.clients):
                        tasks.create_task(self._client(numbered))
        except* BenchError as group:
            raise group.exceptions[0] from None
        self.ended_s = time.perf_counter()

    async def _client(self, numbered: Iterator[tuple[int, Conversation]]) -> None:
        for number, conversation in numbered:
            await self._converse(number, conversation)

    async def _at(self, number: int, conversation: Conversation) -> None:
        await asyncio.sleep(self.began_s + conversation.at * self.unit_s - time.perf_counter())
        await self._converse(number, conversation)

    async def _converse(self, number: int, conversation: Conversation) -> None:
        said = [{"role": "system", "content": conversation.system}] if conversation.system else []
        for place, turn in enumerate(conversation.turns):
            if turn.pause:
                await asyncio.sleep(turn.pause * self.unit_s)
            said.append({"role": "user", "content": turn.text})
            answer, asked = await self._ask(said, turn, (number, place))
            said.append({"role": "assistant", "content": answer})
            self.asked.append(asked)

    async def _ask(self, said: list[dict[str, str]], turn: Turn, place: tuple[int, int]) -> tuple[str, Asked]:
        body = {
            "model": MODEL_NAME,
            "messages": said,
            "max_tokens": turn.answer_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sent_s, answer = time.perf_counter(), _Answer()
        try:
            async with self._session.post(f"{self.http}/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    raise BenchError(f"{self.http} answered {response.status}: {(await response.text())[:500]}")
                async for line in response.content:
                    answer.line(line)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchError(f"{self.http} did not answer: {error!r}") from error
        text, usage = answer.read()
        if usage.completion_tokens != turn.answer_tokens:
            raise BenchError(f"{self.http} answered {usage.completion_tokens} tokens, not {turn.answer_tokens}")
        return text, self._timed(sent_s, answer, usage, place)

    def _timed(self, sent_s: float, answer: _Answer, usage: _Usage, place: tuple[int, int]) -> Asked:
        first_s = answer.first_s or sent_s
        details: Any = usage.prompt_tokens_details
        return Asked(
            *place,
            sent_ms=round((sent_s - self.began_s) * 1000, 1),
            ttft_ms=round((first_s - sent_s) * 1000, 1),
            tpot_ms=round((answer.last_s - first_s) * 1000 / max(usage.completion_tokens - 1, 1), 2),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
            output_tokens=usage.completion_tokens,
        )
