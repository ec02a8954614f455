"""Receives many ZeroMQ messages in one call, compiled, without the GIL. Knows ZeroMQ by the addresses of two functions.

Of a message's frames the first, the last but one and the last are told, which all lie one behind the other in an arena
that the next call overwrites. Who numbers messages has the number in the last frame but one, 8 bytes with the highest
first, and the payload in the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types  # type: ignore[import-untyped]

from vllm_llmd.kernels.memory_cpu import compiled, inside_kernels

Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]

NUMBER_BYTES = 8
ARENA_BYTES = 12 << 20
LARGEST_MESSAGE = 8 << 20
"""While less than this is left of the arena, nothing more is received; a message that is larger is cut off and lost."""

MESSAGES = 256
PARTS, FIRST_START, FIRST_END, HEAD_START, HEAD_END, START, END = range(7)
COLUMNS = 7
DONTWAIT, RCVMORE = 1, 13


@dataclass(frozen=True)
class Functions:
    """Addresses of `zmq_recv` and `zmq_getsockopt`."""

    receive: int
    option: int


@dataclass(frozen=True)
class Frames:
    """Messages: `numbers`, shape (n,), and payloads, `data[starts[i]:ends[i]]`. `misshapen` others were of no use."""

    numbers: Counts
    data: Bytes
    starts: Counts
    ends: Counts
    misshapen: int = 0

    def __len__(self) -> int:
        return len(self.numbers)

    def payload(self, place: int) -> bytes:
        return self.data[self.starts[place] : self.ends[place]].tobytes()

    @classmethod
    def of(cls, messages: "Messages") -> "Frames":
        """Those of the messages that are numbered."""
        numbered = (messages.head_ends - messages.head_starts == NUMBER_BYTES) & (messages.parts > 1)
        starts, ends, at = messages.starts[numbered], messages.ends[numbered], messages.head_starts[numbered]
        numbers = messages.data[at[:, None] + np.arange(NUMBER_BYTES)].view(">i8").ravel().astype(np.int64)
        return cls(numbers, messages.data, starts, ends, len(messages) - len(numbers))

    def only(self, places: Any) -> "Frames":
        """Some of them: a slice, or places."""
        return Frames(self.numbers[places], self.data, self.starts[places], self.ends[places])


def frames_of(messages: Sequence[tuple[int, bytes]], misshapen: int = 0) -> Frames:
    """Messages as one value."""
    ends = np.cumsum([len(payload) for _, payload in messages], dtype=np.int64)
    sizes = np.diff(ends, prepend=0)
    data = np.frombuffer(b"".join(payload for _, payload in messages), np.uint8)
    return Frames(np.array([number for number, _ in messages], np.int64), data, ends - sizes, ends, misshapen)


@dataclass(frozen=True)
class Messages:
    """Of each message how many `parts` it has, 0 if it did not fit, and where its first, last but one and last lie."""

    data: Bytes
    parts: Counts
    first_starts: Counts
    first_ends: Counts
    head_starts: Counts
    head_ends: Counts
    starts: Counts
    ends: Counts

    def __len__(self) -> int:
        return len(self.parts)

    def first_and_last(self) -> list[tuple[int, bytes, bytes]]:
        """Each message's number of parts, its first and its last."""
        data = self.data.data
        rows = zip(
            self.parts.tolist(),
            self.first_starts.tolist(),
            self.first_ends.tolist(),
            self.starts.tolist(),
            self.ends.tolist(),
            strict=True,
        )
        return [(parts, bytes(data[a:b]), bytes(data[c:d])) for parts, a, b, c, d in rows]


class Arena:
    """Where messages are received into. Not to be used by two threads at once."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions
        self._data: Bytes = np.empty(ARENA_BYTES, np.uint8)
        self._seen = self._data.view()
        self._seen.flags.writeable = False  # to numba of the same type as bytes are: kernels are compiled once
        self._spans: Counts = np.empty((COLUMNS, MESSAGES), np.int64)
        self._state: Counts = np.zeros(2, np.int64)

    def receive(self, socket: int, most: int = MESSAGES) -> Messages:
        """What is there, `most` messages at the most, of the socket at this address."""
        functions = self._functions
        count = _receive(functions.receive, functions.option, socket, self._data, self._spans[:, :most], self._state)
        return Messages(self._seen, *self._spans[:, :count])


def compile_ahead() -> None:
    """Compiles the kernel or loads it from numba's cache, so that no message has to wait for that."""
    for columns in (MESSAGES, 1):  # an array of all columns, and of some, are two types; without room nothing is called
        spans = np.empty((COLUMNS, MESSAGES), np.int64)[:, :columns]
        _receive(0, 0, 0, np.empty(0, np.uint8), spans, np.zeros(2, np.int64))


@inside_kernels
def call(context: Any, function: Any, first: Any, second: Any, third: Any, fourth: Any) -> Any:
    """Calls the C function at an address with four arguments, pointers or integers; gives its int."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), [word] * 4)
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), list(args[1:]))

    return types.int32(*[types.int64] * 5), emit


@compiled
def _receive(receive: int, option: int, socket: int, data: Bytes, spans: Counts, state: Counts) -> int:
    """How many messages were received. `spans` are columns as in `Messages`, shape (7, n)."""
    arena, at, count = data.ctypes.data, 0, 0
    more, more_size = state.ctypes.data, state.ctypes.data + 8
    while count < spans.shape[1] and len(data) - at >= LARGEST_MESSAGE:
        parts, head, head_end, start, end, whole, flags = 0, 0, 0, 0, 0, True, DONTWAIT
        while True:
            got = int(call(receive, socket, arena + at, len(data) - at, flags))
            if got < 0:
                return count
            whole = whole and at + got <= len(data)
            head, head_end, start = start, end, at
            at = end = min(at + got, len(data))
            parts += 1
            if parts == 1:
                spans[FIRST_START, count], spans[FIRST_END, count] = start, end
            state[0], state[1], flags = 0, 4, 0
            call(option, socket, RCVMORE, more, more_size)
            if not state[0]:
                break
        spans[PARTS, count] = parts if whole else 0
        spans[HEAD_START, count], spans[HEAD_END, count] = head, head_end
        spans[START, count], spans[END, count] = start, end
        count += 1
    return count
