"""What an engine says a prompt has cost, read from its answer on the way to the client. Pure.

A meter passes an answer on and keeps its usage. Where the router asked for the usage of a stream and the client did
not, `Unasked` makes the stream what it would have been. No meter changes anything else, or waits for more than an
event's end.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from vllm_llmd.router.upstream.sse import Splitter, data_of

USAGE_BYTES: Final = 4096
"""No usage object is longer; most have about 150."""

_KEY: Final = b'"usage"'
"""Quotes inside a JSON string are escaped, so these bytes are a key or a whole string, never a part of a text."""

_FINISHED: Final = b'"finish_reason":"'
"""As vLLM writes it; a choice that goes on has `null` there."""

_FINGERPRINT: Final = re.compile(rb'"system_fingerprint":"(?:[^"\\]|\\.)*"')
_VALUE: Final = re.compile(rb"\s*:\s*(\{.*)", re.DOTALL)
_OBJECT: Final = re.compile(rb'"usage"\s*:\s*\{')
_NOTHING_ELSE: Final = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_decoder = json.JSONDecoder()


@dataclass(frozen=True)
class Usage:
    """`cached_tokens` of the `prompt_tokens` were not computed; the answer has `completion_tokens`. None: not told."""

    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int | None = field(default=None, compare=False)


class Meter(Protocol):
    """`usage` is there once it has passed, if the answer has any."""

    usage: Usage | None

    def feed(self, chunk: bytes) -> bytes:
        """What to pass on now that the chunk has come."""

    def end(self) -> bytes:
        """What is left to pass on when the answer has ended, well or not."""


def tells_of_its_prompt(body: Mapping[str, Any]) -> bool:
    """Whether the usage of the answer will be that of one sequence which the engine looked up in its cache."""
    one = all(body.get(name) in (None, 1) for name in ("n", "best_of")) and not body.get("use_beam_search")
    scores_prompt = body.get("prompt_logprobs") is not None or (body.get("echo") and body.get("logprobs") is not None)
    return one and not scores_prompt


def meter_for(asked_for_usage: bool, is_stream: bool, stamp: bytes | None) -> Meter:
    """The meter for an answer to a request that the router asked the usage of a stream in, or left as it was."""
    if not is_stream:
        return Body()
    return Unasked(stamp) if asked_for_usage else Asked()


def read_usage(value: Any) -> Usage | None:
    """The usage in OpenAI's shape; None for anything else."""
    if not isinstance(value, Mapping) or not _is_count(value.get("prompt_tokens")):
        return None
    details = value.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    made = value.get("completion_tokens")
    return Usage(value["prompt_tokens"], cached if _is_count(cached) else None, made if _is_count(made) else None)


class Body:
    """An answer that is one JSON object. Every byte passes at once; keeps no more than `USAGE_BYTES`."""

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self._recent = b""

    def feed(self, chunk: bytes) -> bytes:
        if self.usage is None:
            self._look(self._recent + chunk)
        return chunk

    def end(self) -> bytes:
        return b""

    def _look(self, seen: bytes) -> None:
        keep = len(seen) - len(_KEY) + 1
        for found in re.finditer(_KEY, seen):
            self.usage = _usage_at(seen[found.end() : found.start() + USAGE_BYTES])
            if self.usage is not None:
                self._recent = b""
                return
            if len(seen) - found.start() < USAGE_BYTES:  # the object may not be whole yet
                keep = min(keep, found.start())
        self._recent = seen[max(keep, 0) :]


class Asked:
    """A stream whose usage the client itself asked for. Every byte passes at once."""

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self._events = Splitter()

    def feed(self, chunk: bytes) -> bytes:
        if _KEY in chunk or not _ends_clean(self._events, chunk):
            for piece in self._events.feed(chunk):
                if piece.whole and _KEY in piece.raw:
                    self.usage = _final_usage(piece.raw) or self.usage
        return chunk

    def end(self) -> bytes:
        return b""


class Unasked:
    """A stream whose usage only the router asked for: the event with the usage is taken out.

    vLLM writes its fingerprint into the event that finishes a choice, but into the one with the usage if there is to
    be one: it is put back. `stamp` is what was taken from there before, empty if nothing; with None, the last event
    that finishes a choice waits for the one after it, the first time that an engine streams.
    """

    def __init__(self, stamp: bytes | None) -> None:
        self.usage: Usage | None = None
        self.stamp = stamp
        self._events = Splitter()
        self._finish = b""
        self._told_anyway = False

    def feed(self, chunk: bytes) -> bytes:
        plain = _KEY not in chunk and _FINISHED not in chunk
        if plain and not self._finish and _ends_clean(self._events, chunk):
            return chunk
        pieces = self._events.feed(chunk)
        return b"".join(self._pass(each.raw) if each.whole else self._release() + each.raw for each in pieces)

    def end(self) -> bytes:
        held = self._events.end()
        taken_out = _NOTHING_ELSE.search(held) is not None and not self._told_anyway
        return self._release() + (b"" if taken_out else held)

    def _pass(self, event: bytes) -> bytes:
        if _KEY in event:
            usage = _final_usage(event)
            self.usage = usage or self.usage
            if usage is not None and not self._told_anyway:
                return self._take_out(event)
            self._told_anyway = self._told_anyway or _OBJECT.search(event) is not None
        if _FINISHED in event and not self._told_anyway:
            return self._release() + self._finished(event)
        return self._release() + event

    def _take_out(self, event: bytes) -> bytes:
        found = _FINGERPRINT.search(event)
        self.stamp = b"" if found is None else b"," + found.group()
        finish, self._finish = self._finish, b""
        return _stamped(finish, self.stamp)

    def _finished(self, event: bytes) -> bytes:
        if self.stamp is not None:
            return _stamped(event, self.stamp)
        self._finish = event
        return b""

    def _release(self) -> bytes:
        finish, self._finish = self._finish, b""
        return finish


def _ends_clean(events: Splitter, chunk: bytes) -> bool:
    """Whether the chunk is whole events of vLLM's writing, so that nothing needs to be kept of it."""
    return events.between_events and chunk.endswith(b"\n\n")


def _stamped(event: bytes, stamp: bytes) -> bytes:
    """The event with its fingerprint at the end of its object, where vLLM writes it."""
    at = event.rfind(b"}")
    if not stamp or at < 0 or b'"system_fingerprint"' in event:
        return event
    return event[:at] + stamp + event[at:]


def _final_usage(event: bytes) -> Usage | None:
    """The usage, if the event is the one that has nothing else to say."""
    if _NOTHING_ELSE.search(event) is None:
        return None
    try:
        said = json.loads(data_of(event))
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, Mapping) or said.get("choices") != []:
        return None
    return read_usage(said.get("usage"))


def _usage_at(value: bytes) -> Usage | None:
    found = _VALUE.match(value)
    if found is None:
        return None
    try:
        return read_usage(_decoder.raw_decode(found.group(1).decode("utf-8", "replace"))[0])
    except (ValueError, RecursionError):
        return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
