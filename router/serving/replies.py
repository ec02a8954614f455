"""The answers that the router itself gives, in OpenAI's shapes."""

import json
from collections.abc import Mapping
from typing import Any, Final, Literal

from aiohttp import web

from vllm_llmd.router.placement.rosters import Bar
from vllm_llmd.router.waiting.flow import Reason

REASON_HEADER: Final = "x-llmd-reason"

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


def models(longest: Mapping[str, int], created_s: int) -> dict[str, Any]:
    """OpenAI's list of models, in the form that vLLM gives it: names, and how many tokens a request may have."""
    data = [
        {"id": model, "object": "model", "created": created_s, "owned_by": "vllm-llmd", "max_model_len": length}
        for model, length in sorted(longest.items())
    ]
    return {"object": "list", "data": data}


Refusal = Reason | Literal["bodies-full"]

_SHED: Final[dict[Refusal, tuple[int, str, str]]] = {
    "queue-full": (429, "rejected-saturated", "Every engine is saturated and the queue is full: try again later."),
    "displaced": (429, "rejected-saturated", "The queue is full and others had to go first: try again later."),
    "bodies-full": (429, "rejected-saturated", "The router holds as many request bodies as it may: try again later."),
    "expired": (503, "rejected-ttl-expired", "No engine was free for as long as the request could wait."),
    "shutting-down": (503, "rejected-shutting-down", "The router is shutting down: ask another."),
}


def shed(reason: Refusal, retry_after_s: int) -> web.Response:
    """The request was refused, or waited in vain. No engine has seen it. Says why in our header and in llm-d's."""
    status, llm_d, text = _SHED[reason]
    response = error(status, text, reason.replace("-", "_"))
    response.headers["Retry-After"] = str(retry_after_s)
    response.headers[REASON_HEADER] = reason
    response.headers["x-llm-d-request-dropped-reason"] = llm_d
    return response


def too_large(most_bytes: int) -> web.Response:
    """A body that the router never takes."""
    text = f"The request body is too large: at most {most_bytes} bytes are taken. Ask with a shorter prompt, or have "
    return error(413, text + "the router run with higher --max-body-bytes and --bodies-bytes.", "request_too_large")


_NOBODY: Final[dict[Bar, tuple[str, str]]] = {
    "labels": (
        "No engine that is ready to serve this model has the labels that are asked for.",
        "matches",
    ),
    "context": ("No engine that is ready to serve this model has a context long enough for the prompt.", "fits"),
    "filters": ("Filters let the request go to no engine that is ready to serve this model.", "allowed"),
}


def nobody(bar: Bar | None) -> web.Response:
    """No engine takes the request, because of `bar` or because none is ready."""
    if bar is None:
        return error(503, "No engine is ready to serve this model.", "no_engine_ready")
    text, how = _NOBODY[bar]
    response = error(503, text, f"no_engine_{how}")
    response.headers[REASON_HEADER] = f"no-engine-{how}"
    return response


def error_event(text: str, code: str) -> bytes:
    """An error as a server-sent event. Starts with an empty line, since the stream may have broken inside an event."""
    return b"\n\ndata: " + json.dumps(error_body(502, text, code)).encode() + b"\n\n"
