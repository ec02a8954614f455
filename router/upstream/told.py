"""What one client has been told of an answer, event by event, so that another engine can go on with it. Pure.

Reads the ids of tokens out of each event, and takes them out of it where only the router asked for them. When another
engine goes on, what it says again must be what was said before, and is left out; the rest is put into the shape of
the stream that broke. An event in which an engine says that it has failed is held back.
"""

import re
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from vllm_llmd.router.request import Facts
from vllm_llmd.router.upstream.failover import Way, rest_facts, rest_of
from vllm_llmd.router.upstream.sse import Piece, Splitter, data_of

EVENT_BYTES: Final = 4 << 20
"""The first event has the ids of the whole prompt in it."""

DONE: Final = b"[DONE]"

_IDS: Final = re.compile(rb'"((?:prompt_)?token_ids)"\s*:\s*\[[0-9,\s]*\]')
"""A quote inside a JSON string is escaped, so this is never a part of a text."""

_CHANNELS: Final = ("content", "reasoning", "reasoning_content")
"""Where the delta of a chat may have text."""

_decoder = msgspec.json.Decoder()

Texts = dict[str, str]
"""Text by the field that it stands in."""


class Told:
    """One stream. `shows_ids`: the client has asked for the ids of tokens itself.

    `failure` is what the engine of the moment has said of its end, if it has; `breaks` counts the engines before it.
    """

    def __init__(self, way: Way, shows_ids: bool) -> None:
        self._way = way
        self._shows_ids = shows_ids
        self.breaks = 0
        self.failure: str | None = None
        self._traceable = True
        self._whole = self._finished = self._told_usage = False
        self._head: dict[str, Any] = {}
        self._prompt: array[int] = array("I")
        self._tokens: array[int] = array("I")
        self._base = 0
        """How many tokens' text was surely complete: a stream is resumed after these. 0 for one that is replayed."""
        self._said: dict[str, list[str]] = {}
        """Text after `_base`."""
        self._began_at = self._at = 0
        """At which token of the answer this engine began, and is."""
        self._owed: Texts = {}
        """What it has to say again."""
        self._events = Splitter(EVENT_BYTES)
        self._held = b""

    @property
    def can_go_on(self) -> bool:
        """Whether another engine could go on from here."""
        return self._traceable

    @property
    def is_whole(self) -> bool:
        """Whether the stream has come to its end, or its end cannot be told."""
        return self._whole or not self._traceable

    @property
    def says_why(self) -> bool:
        """Whether an event of the engine's about its failure is held back."""
        return bool(self._held)

    def feed(self, chunk: bytes) -> bytes:
        """What to tell the client now that the chunk has come: whole events."""
        return b"".join(map(self._pass, self._events.feed(chunk)))

    def end(self) -> bytes:
        """What is left when no engine goes on: the engine's own words about its failure, or half an event."""
        return self._held + self._events.end()

    def broke(self) -> None:
        """The engine has failed; the next one begins with what `rest` says."""
        self.breaks += 1
        self.failure, self._held = None, b""
        self._events = Splitter(EVENT_BYTES)
        self._began_at = self._at = self._base
        self._owed = {channel: "".join(pieces) for channel, pieces in self._said.items()}

    def rest(self, raw: bytes) -> bytes:
        """The request for the next engine; `raw` is that for the first."""
        return rest_of(raw, self._prompt, self._tokens[: self._base]) if self._base else raw

    def rest_facts(self, facts: Facts) -> Facts:
        """Its facts."""
        return rest_facts(facts, self._prompt, self._tokens[: self._base]) if self._base else facts

    # --- events -------------------------------------------------------------------------------------------------

    def _pass(self, piece: Piece) -> bytes:
        if self.failure is not None:
            self._held += piece.raw
            return b""
        if not piece.whole:
            self._traceable = self._traceable and not piece.raw.strip()
            return piece.raw
        data = data_of(piece.raw)
        said = _read(data)
        if said is None:
            self._whole = self._whole or data == DONE
            return piece.raw
        choices = said.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
        if self._traceable and ("error" in said or (choice or {}).get("finish_reason") == "abort"):
            self.failure, self._held = "it said so itself", piece.raw
            return b""
        if choice is None:
            return self._without_choice(piece.raw, said)
        return self._go_on(said, choice) if self._head and self.breaks else self._note(piece.raw, said, choice)

    def _note(self, event: bytes, said: dict[str, Any], choice: dict[str, Any]) -> bytes:
        """An event of the first engine: as it is, but for the ids."""
        ids, texts = choice.get("token_ids"), _texts(choice)
        if texts is None or (ids is None and (any(texts.values()) or choice.get("finish_reason"))):
            self._traceable = False
        self._head = self._head or {name: said[name] for name in ("id", "created", "model") if name in said}
        prompt = said.get("prompt_token_ids") or choice.get("prompt_token_ids")
        if prompt and not self._prompt:
            self._prompt = array("I", prompt)
        if self._traceable:
            self._add(ids or (), texts or {}, choice.get("finish_reason"))
            self._at = len(self._tokens)
        if self._shows_ids:
            return event
        if ids is not None and choice.get("delta") == {} and choice.get("finish_reason") is None:
            return b""  # is there for the ids alone
        return _IDS.sub(rb'"\1":null', event)

    def _add(self, ids: Sequence[int], texts: Texts, finish: str | None) -> None:
        self._tokens.extend(ids)
        self._finished = self._finished or finish is not None
        for channel, text in texts.items():
            if text:
                self._said.setdefault(channel, []).append(text)
        if self._way is Way.RESUME and len(ids) == 1 and texts.get("text") and not self._finished:
            # text comes when its last token makes it whole: nothing before this token is still to be said
            self._base = len(self._tokens)
            self._said.clear()

    # --- events of another engine -------------------------------------------------------------------------------

    def _go_on(self, said: dict[str, Any], choice: dict[str, Any]) -> bytes:
        """What is new in the event, in the shape of the stream that broke."""
        ids, texts, finish = choice.get("token_ids"), _texts(choice), choice.get("finish_reason")
        if texts is None or (ids is None and (any(texts.values()) or finish)):
            return self._diverged("the next engine does not tell its tokens")
        new_ids, new_texts = self._new_ids(ids or ()), self._new_texts(texts)
        if new_ids is None or new_texts is None or (finish and self._repeats):
            return self._diverged("the next engine says something else")
        if not (new_ids or any(new_texts.values()) or (finish and not self._finished)):
            return b""
        self._add(new_ids, new_texts, finish)
        if "text" in choice:
            choice["text"] = new_texts.get("text", "")
        else:
            choice["delta"] = new_texts
        if ids is not None:
            choice["token_ids"] = new_ids if self._shows_ids else None
        for part in (said, choice):
            if "prompt_token_ids" in part:
                part["prompt_token_ids"] = None
        return self._written(said)

    @property
    def _repeats(self) -> bool:
        """Whether it has not said all again that was said before."""
        return self._at < len(self._tokens) or any(self._owed.values())

    def _new_ids(self, ids: Sequence[int]) -> list[int] | None:
        """Those that were not told before; None if others were told in their place."""
        again = self._tokens[self._at : self._at + len(ids)]
        if list(again) != list(ids[: len(again)]):
            return None
        self._at += len(ids)
        return list(ids[len(again) :])

    def _new_texts(self, texts: Texts) -> Texts | None:
        new: Texts = {}
        for channel, text in texts.items():
            owed = self._owed.get(channel, "")
            again = min(len(owed), len(text))
            if text[:again] != owed[:again]:
                return None
            self._owed[channel], new[channel] = owed[again:], text[again:]
        return new

    def _without_choice(self, event: bytes, said: dict[str, Any]) -> bytes:
        """The usage, once."""
        told, self._told_usage = self._told_usage, self._told_usage or "usage" in said
        if not self.breaks:
            return event
        return b"" if told else self._usage(said)

    def _usage(self, said: dict[str, Any]) -> bytes:
        """The event with the usage; what this engine took for prompt, and was answer, is counted as such."""
        usage = said.get("usage")
        if isinstance(usage, dict) and self._began_at:
            for name, by in (("prompt_tokens", -self._began_at), ("completion_tokens", self._began_at)):
                if isinstance(usage.get(name), int):
                    usage[name] += by
            details = usage.get("prompt_tokens_details")
            if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
                details["cached_tokens"] = min(details["cached_tokens"], usage.get("prompt_tokens", 0))
        return self._written(said)

    def _written(self, said: dict[str, Any]) -> bytes:
        return b"data: " + msgspec.json.encode({**said, **self._head}) + b"\n\n"

    def _diverged(self, why: str) -> bytes:
        self._traceable, self.failure = False, why
        return b""


def _read(data: bytes) -> dict[str, Any] | None:
    try:
        said = _decoder.decode(data)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _texts(choice: Mapping[str, Any]) -> Texts | None:
    """The text in an event; None if there is something else in it that is not known how to go on with."""
    if choice.get("logprobs") or choice.get("index"):
        return None
    if "text" in choice:
        return {"text": choice["text"]} if isinstance(choice["text"], str) else None
    delta = choice.get("delta")
    if not isinstance(delta, Mapping) or any(delta[name] for name in delta if name not in (*_CHANNELS, "role")):
        return None
    return {channel: delta[channel] for channel in _CHANNELS if isinstance(delta.get(channel), str)}
