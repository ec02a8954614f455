"""One attempt at one engine over HTTP: an answer whose first bytes are here, or a failure that may be retried."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import aiohttp

from vllm_llmd.router.upstream.rewrite import Headers, response_headers

RETRIED_STATUSES: Final = frozenset((500, 502, 503))
KEEPALIVE_S: Final = 3.0
"""Less than the 5 s after which vLLM closes an idle connection, so that we never write into one being closed."""

BROKEN: Final = (aiohttp.ClientError, OSError, TimeoutError)


@dataclass(frozen=True)
class Attempt:
    url: str
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class Answer:
    """An engine's answer under way. `first` is empty only if the whole body is."""

    status: int
    headers: Headers
    is_stream: bool
    first: bytes
    content: aiohttp.StreamReader

    def refuses(self, parameter: str) -> bool:
        """Whether the engine objects to a parameter of the request."""
        return self.status in (400, 422) and parameter.encode() in self.first


@dataclass(frozen=True)
class Failure:
    """The engine failed, before the first byte or, where another can go on, `midway`.

    `status` and the rest are what it said, if it said anything.
    """

    reason: str
    midway: bool = False
    status: int | None = None
    headers: Headers | None = None
    body: bytes = b""


def open_session(connect_timeout_ms: int) -> aiohttp.ClientSession:
    """The one session for all engines: no limit on how long or how many, bodies as they come."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_ms / 1000),
        auto_decompress=False,
        read_bufsize=1 << 20,
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


@asynccontextmanager
async def ask(session: aiohttp.ClientSession, attempt: Attempt) -> AsyncIterator[Answer | Failure]:
    """Sends the request. Leaving the context before the body's end closes the connection: the engine stops work."""
    try:
        response = await session.post(attempt.url, data=attempt.body, headers=attempt.headers, allow_redirects=False)
    except BROKEN as error:
        yield Failure(said(error))
        return
    del attempt  # its body, which may be large, is sent
    try:
        yield await _begin(response)
    finally:
        if response.content.at_eof():
            response.release()
        else:
            response.close()


async def _begin(response: aiohttp.ClientResponse) -> Answer | Failure:
    headers = response_headers(response.headers.items())
    try:
        if response.status in RETRIED_STATUSES:
            return Failure(f"status {response.status}", False, response.status, headers, await response.read())
        first = await response.content.readany()
    except BROKEN as error:
        return Failure(said(error))
    is_stream = response.content_type == "text/event-stream"
    return Answer(response.status, headers, is_stream, first, response.content)


def said(error: BaseException) -> str:
    """What an error says, and what kind it is."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
