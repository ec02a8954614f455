"""Receives many ZeroMQ messages in one call, compiled, without the GIL. Knows ZeroMQ by the addresses of two functions.

A message's last two frames are its number, 8 bytes with the highest first, and its payload; what stands before them is
passed over. Payloads lie one behind the other in an arena that the next call overwrites.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types  # type: ignore[import-untyped]

from vllm_llmd.kernels.memory_cpu import compiled, inside_kernels, load_big_endian

Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]

NUMBER_BYTES = 8
ARENA_BYTES = 12 << 20
LARGEST_MESSAGE = 8 << 20
"""While less than this is left of the arena, nothing more is received; a message that is larger is cut off and lost."""

MESSAGES = 256
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

    def only(self, places: Any) -> "Frames":
        """Some of them: a slice, or places."""
        return Frames(self.numbers[places], self.data, self.starts[places], self.ends[places])


def frames_of(messages: Sequence[tuple[int, bytes]], misshapen: int = 0) -> Frames:
    """Messages as one value."""
    ends = np.cumsum([len(payload) for _, payload in messages], dtype=np.int64)
    sizes = np.diff(ends, prepend=0)
    data = np.frombuffer(b"".join(payload for _, payload in messages), np.uint8)
    return Frames(np.array([number for number, _ in messages], np.int64), data, ends - sizes, ends, misshapen)


class Arena:
    """Where messages are received into. Not to be used by two threads at once."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions
        self._data: Bytes = np.empty(ARENA_BYTES, np.uint8)
        self._seen = self._data.view()
        self._seen.flags.writeable = False  # to numba of the same type as bytes are: kernels are compiled once
        self._numbers, self._starts, self._ends = np.empty((3, MESSAGES), np.int64)
        self._state: Counts = np.zeros(2, np.int64)

    def receive(self, socket: int) -> Frames:
        """What is there, up to a bound, of the socket at this address."""
        functions = self._functions
        count, misshapen = _receive(
            functions.receive,
            functions.option,
            socket,
            self._data,
            self._numbers,
            self._starts,
            self._ends,
            self._state,
        )
        return Frames(self._numbers[:count], self._seen, self._starts[:count], self._ends[:count], misshapen)


def compile_ahead() -> None:
    """Compiles the kernel or loads it from numba's cache, so that no message has to wait for that."""
    nothing = np.empty(0, np.int64)  # room for no message: nothing is called
    _receive(0, 0, 0, np.empty(0, np.uint8), nothing, nothing, nothing, np.zeros(2, np.int64))


@inside_kernels
def call(context: Any, function: Any, first: Any, second: Any, third: Any, fourth: Any) -> Any:
    """Calls the C function at an address with four arguments, pointers or integers; gives its int."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), [word] * 4)
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), list(args[1:]))

    return types.int32(*[types.int64] * 5), emit


@compiled
def _receive(
    receive: int,
    option: int,
    socket: int,
    data: Bytes,
    numbers: Counts,
    starts: Counts,
    ends: Counts,
    state: Counts,
) -> tuple[int, int]:
    """How many messages were received, and how many others were not of that shape."""
    arena, at, count, misshapen = data.ctypes.data, 0, 0, 0
    more, more_size = state.ctypes.data, state.ctypes.data + 8
    while count < len(numbers) and len(data) - at >= LARGEST_MESSAGE:
        number_at, number_size, start, size, whole, flags = 0, 0, 0, 0, True, DONTWAIT
        while True:
            got = int(call(receive, socket, arena + at, len(data) - at, flags))
            if got < 0:
                return count, misshapen
            number_at, number_size, start, size = start, size, at, got
            whole = whole and at + got <= len(data)
            at = min(at + got, len(data))
            state[0], state[1], flags = 0, 4, 0
            call(option, socket, RCVMORE, more, more_size)
            if not state[0]:
                break
        if not whole or number_size != NUMBER_BYTES:
            misshapen += 1
            continue
        numbers[count] = np.int64(load_big_endian(arena, number_at, np.uint64))
        starts[count], ends[count] = start, start + size
        count += 1
    return count, misshapen
