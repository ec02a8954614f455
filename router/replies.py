"""The answers that the router itself gives, in OpenAI's shapes."""

import json
from typing import Any, Final

from aiohttp import web

RETRY_AFTER_S: Final = 1


def error_body(status: int, text: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def error(status: int, text: str, code: str | None = None, param: str | None = None) -> web.Response:
    response = web.json_response(error_body(status, text, code, param), status=status)
    if status == 503:
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def error_event(text: str, code: str) -> bytes:
    """An error as a server-sent event. Starts with an empty line, since the stream may have broken inside an event."""
    return b"\n\ndata: " + json.dumps(error_body(502, text, code)).encode() + b"\n\n"
