"""How a server that was told to fail treats a request: before its first byte, and after its first chunk."""

import asyncio

from aiohttp import web

from vllm_llmd.sim import replies

_HEADERS_ALONE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def fail_before(http: web.Request, failure: str) -> web.Response | None:
    """Does what an `AnswerFailure` does before the first byte of an answer; None if it does nothing."""
    match failure:
        case "error":
            return web.json_response(replies.error("told to fail", 500, "InternalServerError"), status=500)
        case "refuse":
            return web.json_response(replies.error("told to refuse", 503, "ServiceUnavailable"), status=503)
        case "stall":
            await asyncio.Event().wait()
        case "reset":
            _abort(http)
            return web.Response()
        case "reset-after-headers":
            assert http.transport is not None
            http.transport.write(_HEADERS_ALONE)
            http.transport.close()
            return web.Response()
    return None


async def fail_midway(http: web.Request, failure: str) -> None:
    """Does what an `AnswerFailure` does after the first chunk. Raises ConnectionResetError if it hangs up."""
    if failure == "stall-midway":
        await asyncio.Event().wait()
    if failure == "die-midway":
        await asyncio.sleep(0.05)  # the chunk must be on its way before the reset overtakes it
        _abort(http)
        raise ConnectionResetError("told to die")


def _abort(http: web.Request) -> None:
    if http.transport is not None:
        http.transport.abort()
