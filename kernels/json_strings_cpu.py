"""Takes the long strings out of a JSON text, so that a parser has little to read, compiled by numba.

Only strings are looked at, which JSON lets be found without understanding the rest: outside of one, a quotation mark
begins one. A string is taken out only if any JSON parser takes it: no control characters, whole escapes, valid UTF-8.
A mark that begins with `stem` and ends with the string's number, 8 digits, stands in its place. The plain twin is
`json_strings.hollow`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels.json_strings import NUMBER_DIGITS, Hollow
from vllm_llmd.kernels.memory_cpu import compiled, load

Bytes = npt.NDArray[np.uint8]
Spans = npt.NDArray[np.int64]

QUOTE, BACKSLASH, SPACE, ZERO, U = 34, 92, 32, 48, 117
LOWS, HIGHS = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
QUOTES, BACKSLASHES, SPACES = LOWS * np.uint64(QUOTE), LOWS * np.uint64(BACKSLASH), LOWS * np.uint64(SPACE)
WHICH = np.uint64(0x0001020304050607)
"""Times a 1 in the lowest bit of byte k: the highest byte is k."""


def hollow(raw: bytes, stem: bytes, least_bytes: int) -> Hollow | None:
    """As the reference."""
    assert len(stem) + NUMBER_DIGITS <= least_bytes
    text, spans, valid = _hollow(np.frombuffer(raw, np.uint8), np.frombuffer(stem, np.uint8), least_bytes)
    return Hollow(text.tobytes(), spans.tolist()) if valid else None


def compile_ahead() -> None:
    """Compiles every kernel or loads it from numba's cache, so that no request has to wait for that."""
    hollow(b'{"": ""}', b"", 64)


@compiled
def _hollow(raw: Bytes, stem: Bytes, least_bytes: int) -> tuple[Bytes, Spans, bool]:
    """The text left, first byte and end of every string taken out, and whether every string is valid."""
    left = np.empty(len(raw), np.uint8)
    spans = np.empty((len(raw) // least_bytes + 1, 2), np.int64)
    size = taken = at = 0
    while at < len(raw):
        byte = raw[at]
        left[size] = byte
        size += 1
        at += 1
        if byte != QUOTE:
            continue
        end = _end_of_string(raw, at)
        if end == len(raw):
            return left[:size], spans[:taken], False
        if end - at < least_bytes:
            left[size : size + end - at] = raw[at:end]
            size += end - at
        else:
            spans[taken, 0], spans[taken, 1] = at, end
            left[size : size + len(stem)] = stem
            size += len(stem)
            number = taken
            for digit in range(NUMBER_DIGITS - 1, -1, -1):
                left[size + digit] = ZERO + number % 10
                number //= 10
            size += NUMBER_DIGITS
            taken += 1
        left[size] = QUOTE
        size += 1
        at = end + 1
    return left[:size], spans[:taken], True


@compiled
def _end_of_string(raw: Bytes, at: int) -> int:
    """Where the closing quotation mark is; the end of the text if the string is not valid or never ends."""
    end = len(raw)
    address = raw.ctypes.data
    while at < end:
        while at + 16 <= end:
            found, next_found = _remarkable(address, at), _remarkable(address, at + 8)
            if found | next_found != 0:
                if found == 0:
                    found, at = next_found, at + 8
                at += int(np.int64(((found & (~found + np.uint64(1))) >> np.uint64(7)) * WHICH >> np.uint64(56)))
                break
            at += 16
        byte = raw[at]
        if byte == QUOTE:
            return at
        if byte == BACKSLASH:
            at = _after_escape(raw, at)
        elif byte >= 128:
            while at < end and raw[at] >= 128:
                at = _after_character(raw, at)
        elif byte < SPACE:
            return end
        else:
            at += 1
    return end


@compiled
def _remarkable(address: int, at: int) -> Any:
    """The highest bit of each of 8 bytes that does not stand for itself. Only the first of them is sure to be right."""
    word = load(address, at, np.uint64)
    quotes, backslashes = word ^ QUOTES, word ^ BACKSLASHES
    quoted = (quotes - LOWS) & ~quotes | (backslashes - LOWS) & ~backslashes
    return (quoted | (word - SPACES) & ~word | word) & HIGHS


@compiled
def _after_escape(raw: Bytes, at: int) -> int:
    """Where an escape ends; the end of the text if it is none."""
    end = len(raw)
    if at + 1 >= end:
        return end
    kind = raw[at + 1]
    if kind == U:
        if at + 6 > end:
            return end
        for i in range(at + 2, at + 6):
            if not (48 <= raw[i] <= 57 or 65 <= raw[i] <= 70 or 97 <= raw[i] <= 102):
                return end
        return at + 6
    if kind in (34, 92, 47, 98, 102, 110, 114, 116):
        return at + 2
    return end


@compiled
def _after_character(raw: Bytes, at: int) -> int:
    """Where a character of several bytes ends; the end of the text if it is no valid UTF-8."""
    end, first = len(raw), raw[at]
    low, high = 128, 191
    if 194 <= first <= 223:
        more = 1
    elif 224 <= first <= 239:
        more = 2
        if first == 224:
            low = 160
        elif first == 237:
            high = 159
    elif 240 <= first <= 244:
        more = 3
        if first == 240:
            low = 144
        elif first == 244:
            high = 143
    else:
        return end
    if at + more >= end or not low <= raw[at + 1] <= high:
        return end
    for i in range(at + 2, at + 1 + more):
        if not 128 <= raw[i] <= 191:
            return end
    return at + 1 + more
