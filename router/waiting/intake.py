"""Reads the body of a request, as far as there is room for it."""

import asyncio
from typing import Final

from aiohttp import HttpVersion11, hdrs, web

from vllm_llmd.router.waiting.bodies import Hold

STALLED_S: Final = 60.0
"""A body of which nothing comes for so long is given up: its client may be gone without a word."""

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


async def say_later(http: web.Request) -> None:
    """For clients that want to be asked for the body: `read` does so, once there is room."""
    if http.version == HttpVersion11 and not _wants_to_be_asked(http):
        raise web.HTTPExpectationFailed


async def read(http: web.Request, hold: Hold) -> bytes:
    """The whole body. Raises BodyTooLarge or NoRoomForBody, at once where its length is told, and TimeoutError."""
    hold.reach(http.content_length or 0)
    if _wants_to_be_asked(http) and http.version == HttpVersion11 and http.transport is not None:
        http.transport.write(_CONTINUE)
    body, now_s = bytearray(), asyncio.get_running_loop().time
    async with asyncio.timeout(STALLED_S) as patience:
        while chunk := await http.content.readany():
            hold.reach(len(body) + len(chunk))
            body += chunk
            patience.reschedule(now_s() + STALLED_S)
    return bytes(body)


def _wants_to_be_asked(http: web.Request) -> bool:
    return http.headers.get(hdrs.EXPECT, "").lower() == "100-continue"
