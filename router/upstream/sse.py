"""Cuts a stream of server-sent events where its events end, whatever the boundaries of the chunks it arrives in. Pure.

Nothing is lost or changed: the pieces put together are the stream. An event that is not whole yet is held back, up
to a limit; a longer one is passed on in parts, as it comes.
"""

import re
from dataclasses import dataclass
from typing import Final

EVENT_BYTES: Final = 64 << 10

_EVENT_END = re.compile(rb"\n(?:\n|\r\n|\r(?=[^\n]))|\r(?:\r\n|\r(?=[^\n]))")
"""The last byte of a line's end, then an empty line: lines end in CR LF, LF or CR.

A carriage return that is the last byte so far may be half a line end: it waits.
"""

_BEFORE_END: Final = 3
"""How many bytes of an event's end may be here without its being known."""

_LINE = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True)
class Piece:
    """`whole`: an event with the empty line that ends it, of at most the splitter's `event_bytes`.

    Otherwise a part of one, or empty lines between two.
    """

    raw: bytes
    whole: bool


class Splitter:
    """Takes chunks in, gives pieces out. An event of more than `event_bytes` (`EVENT_BYTES`) is passed on in parts."""

    def __init__(self, event_bytes: int | None = None) -> None:
        self._event_bytes = EVENT_BYTES if event_bytes is None else event_bytes
        self._held = b""
        self._searched = 0
        self._in_parts = False

    @property
    def between_events(self) -> bool:
        """Whether the next byte begins an event."""
        return not self._held and not self._in_parts

    def feed(self, chunk: bytes) -> list[Piece]:
        """What the chunk completes, in order."""
        pieces: list[Piece] = []
        buffer, begin = self._held + chunk, 0
        if self.between_events:
            begin = self._pass_empty_lines(buffer, 0, pieces)
        while (end := _end_of_event(buffer, max(begin, self._searched))) is not None:
            whole = not self._in_parts and end - begin <= self._event_bytes
            pieces.append(Piece(buffer[begin:end], whole))
            self._searched, self._in_parts = 0, False
            begin = self._pass_empty_lines(buffer, end, pieces)
        if self._in_parts or len(buffer) - begin > self._event_bytes:
            pieces.append(Piece(buffer[begin:-_BEFORE_END], whole=False))
            begin, self._in_parts = max(len(buffer) - _BEFORE_END, begin), True
        self._held = buffer[begin:]
        self._searched = max(len(self._held) - _BEFORE_END, 0)
        return pieces

    @staticmethod
    def _pass_empty_lines(buffer: bytes, begin: int, pieces: list[Piece]) -> int:
        end = begin
        while end < len(buffer) and buffer[end] in b"\r\n":
            end += 1
        if end > begin:
            pieces.append(Piece(buffer[begin:end], whole=False))
        return end

    def end(self) -> bytes:
        """What is still held when the stream ends: an event that never became whole."""
        held, self._held, self._searched = self._held, b"", 0
        return held


def _end_of_event(buffer: bytes, begin: int) -> int | None:
    if b"\r" in buffer:
        found = _EVENT_END.search(buffer, begin)
        return None if found is None else found.end()
    at = buffer.find(b"\n\n", begin)
    return None if at < 0 else at + 2


def data_of(event: bytes) -> bytes:
    """The event's data: its `data` lines, put together as the standard says."""
    if event.startswith(b"data:") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return event[5:-2].removeprefix(b" ")
    lines = (line[5:] for line in _LINE.split(event) if line.startswith(b"data:"))
    return b"\n".join(line.removeprefix(b" ") for line in lines)
