"""Takes the long strings out of a JSON text, so that a parser has little to read: the contract, and its plain twin."""

import json
import re
from dataclasses import dataclass

NUMBER_DIGITS = 8

_STRING = re.compile(rb'"((?:[^"\\]|\\.)*)"', re.DOTALL)


@dataclass(frozen=True)
class Hollow:
    """`text` with a mark in place of each string taken out; `spans` are where those were, first byte and end."""

    text: bytes
    spans: list[list[int]]


def hollow(raw: bytes, stem: bytes, least_bytes: int) -> Hollow | None:
    """Without strings of at least `least_bytes` bytes as they are written; None if a string is no valid JSON string.

    A mark is `stem` and 8 digits, the string's number; it must not be longer than `least_bytes`.
    Example: `{"a": "xyz"}` with a stem of `-` and at least 3 bytes is `{"a": "-00000000"}` and the span 7 to 10.
    """
    parts: list[bytes] = []
    spans: list[list[int]] = []
    at = 0
    while (start := raw.find(b'"', at)) >= 0:
        found = _STRING.match(raw, start)
        if found is None or not _is_valid(found.group()):
            return None
        first, end = found.span(1)
        parts.append(raw[at:first])
        if end - first < least_bytes:
            parts.append(raw[first:end])
        else:
            parts.append(stem + b"%08d" % len(spans))
            spans.append([first, end])
        parts.append(b'"')
        at = found.end()
    return Hollow(b"".join((*parts, raw[at:])), spans)


def _is_valid(string: bytes) -> bool:
    try:
        json.loads(string.decode())
    except ValueError:
        return False
    return True
