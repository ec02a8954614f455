"""What of a client's request goes on to an engine: the body with our hint in place of any of the client's, and the
headers that a client may send. Pure.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from vllm_llmd.router.request import parse_body

HINT_KEY: Final = "kv_transfer_params"
STREAM_OPTIONS: Final = "stream_options"
TOKEN_IDS: Final = "return_token_ids"
PRIORITY: Final = "priority"
RANK_HEADER: Final = "X-data-parallel-rank"

_XARGS: Final = "vllm_xargs"
"""Where vLLM takes the key from, too."""

_SPELT_OUT = re.compile(rb"kv_transfer_params|\\u00[5-7]", re.IGNORECASE)
"""The key, or an escape that could hide a letter of it: printable ASCII needs none, so honest bodies have neither."""

_SPACE: Final = b" \t\r\n"

_HOP_BY_HOP: Final = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)
_OURS_TO_SET: Final = frozenset(("host", "content-length", "content-encoding", "expect", "x-request-id"))
_TRUST: Final = frozenset(("forwarded", "x-real-ip"))
_TRUST_PREFIXES: Final = ("x-llmd-", "x-llm-d-", "x-forwarded-", "x-gateway-", "x-envoy-")

Headers = list[tuple[str, str]]


def with_hint(raw: bytes, body: Mapping[str, Any], hint: Mapping[str, Any]) -> bytes:
    """The body to send on. `body` is `raw`, skimmed or whole; the bytes stay unless the client named the key."""
    if _names_the_key(raw, body):
        return json.dumps({**_stripped(parse_body(raw)), HINT_KEY: hint}).encode()
    return _with_member(raw, body, HINT_KEY, hint)


def may_ask_for_usage(body: Mapping[str, Any]) -> bool:
    """Whether the answer is a stream whose usage can be asked for, and the client does not ask for it."""
    options = body.get(STREAM_OPTIONS)
    if body.get("stream") is not True or not isinstance(options, Mapping | None):
        return False
    return options is None or options.get("include_usage") in (None, False)


def asking_for_usage(raw: bytes, body: Mapping[str, Any]) -> "tuple[bytes, Mapping[str, Any]] | None":
    """The request, raw and parsed, with the usage of its stream asked for. None if there is no need or no way to.

    The bytes stay as they are unless the client has stream options of its own.
    """
    if not may_ask_for_usage(body):
        return None
    options = body.get(STREAM_OPTIONS)
    asking = {**(options or {}), "include_usage": True}
    if "continuous_usage_stats" in asking:  # which says nothing unless usage is included
        asking["continuous_usage_stats"] = False
    if STREAM_OPTIONS in body:
        return json.dumps({**parse_body(raw), STREAM_OPTIONS: asking}).encode(), {**body, STREAM_OPTIONS: asking}
    return _with_member(raw, body, STREAM_OPTIONS, asking), {**body, STREAM_OPTIONS: asking}


def asking_for_token_ids(raw: bytes, body: Mapping[str, Any]) -> bytes:
    """The request with the ids of its tokens asked for; `body` is `raw`, skimmed or whole."""
    if body.get(TOKEN_IDS) is True:
        return raw
    if TOKEN_IDS in body:
        return json.dumps({**parse_body(raw), TOKEN_IDS: True}).encode()
    return _with_member(raw, body, TOKEN_IDS, value=True)


def with_priority(raw: bytes, body: Mapping[str, Any], priority: int) -> "tuple[bytes, Mapping[str, Any]]":
    """The request, raw and parsed, with a priority as vLLM understands it, where less is more urgent."""
    changed = {**body, PRIORITY: priority}
    if PRIORITY in body:
        return json.dumps({**parse_body(raw), PRIORITY: priority}).encode(), changed
    return _with_member(raw, body, PRIORITY, priority), changed


def uncompressed(headers: Headers) -> Headers:
    """The same headers, for an answer that is to be read on its way."""
    return [(name, value) for name, value in headers if name.lower() != "accept-encoding"]


def unsized(headers: Headers) -> Headers:
    """The same headers, for an answer that may become shorter on its way."""
    return [(name, value) for name, value in headers if name.lower() != "content-length"]


def without_hint(raw: bytes, body: Mapping[str, Any]) -> bytes:
    """The body for an engine that knows no hints: the client's bytes, unless they name the key."""
    if _names_the_key(raw, body):
        return json.dumps(_stripped(parse_body(raw))).encode()
    return raw


def request_headers(headers: Iterable[tuple[str, str]], request: str) -> Headers:
    """The client's headers that an engine may see, and the router's id of the request."""
    kept = _without_hop_by_hop(headers)
    passed = [(name, value) for name, value in kept if not _is_withheld(name.lower())]
    return [*passed, ("X-Request-Id", request)]


def for_rank(headers: Headers, rank: int) -> Headers:
    """The headers that send a request to one data-parallel rank, whichever the client had in mind."""
    others = [(name, value) for name, value in headers if name.lower() != RANK_HEADER.lower()]
    return [*others, (RANK_HEADER, str(rank))]


def response_headers(headers: Iterable[tuple[str, str]]) -> Headers:
    """The engine's headers that the client gets: all but those about the connection."""
    return _without_hop_by_hop(headers)


def _with_member(raw: bytes, body: Mapping[str, Any], key: str, value: Any) -> bytes:
    """The object with one member more at its end; every byte before stays."""
    end = raw.rindex(b"}")
    while raw[end - 1] in _SPACE:
        end -= 1
    comma = b"," if body else b""
    return b"".join((memoryview(raw)[:end], comma, f'"{key}":{json.dumps(value)}}}'.encode()))


def _names_the_key(raw: bytes, body: Mapping[str, Any]) -> bool:
    return HINT_KEY in body or (_XARGS in body and _SPELT_OUT.search(raw) is not None)


def _stripped(body: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in body.items() if name != HINT_KEY}
    if isinstance(kept.get(_XARGS), dict):
        kept[_XARGS] = {name: value for name, value in kept[_XARGS].items() if name != HINT_KEY}
    return kept


def _is_withheld(name: str) -> bool:
    return name in _OURS_TO_SET or name in _TRUST or name.startswith(_TRUST_PREFIXES)


def _without_hop_by_hop(headers: Iterable[tuple[str, str]]) -> Headers:
    listed = list(headers)
    named = {
        token.strip().lower() for name, value in listed if name.lower() == "connection" for token in value.split(",")
    }
    return [(name, value) for name, value in listed if name.lower() not in _HOP_BY_HOP | named]
