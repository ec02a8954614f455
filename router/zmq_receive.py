"""How messages come out of a ZeroMQ socket: many per call by a kernel that calls libzmq itself, or one by one.

The kernel needs the addresses of two functions of the library that pyzmq has loaded. Where they cannot be found
(another Python than CPython), messages come through pyzmq.
"""

import ctypes
from typing import Final, Protocol

import zmq

from vllm_llmd.kernels.frames_cpu import MESSAGES, NUMBER_BYTES, Arena, Frames, Functions, frames_of

Ends = list[tuple[int, bytes, bytes]]
"""Of each message, how many frames it has, the first of them and the last. No frames: it was too large."""

BYTES_PER_TURN: Final = 4 << 20

Socket = zmq.Socket[bytes]


class Receiver(Protocol):
    """Example: with two messages there, `receive(socket)` has both, and nothing when it is called again."""

    def receive(self, socket: Socket) -> Frames:
        """Numbered messages that are there, up to a bound. To be used before the next call."""
        ...

    def receive_ends(self, socket: Socket, most: int) -> Ends:
        """Messages that are there, `most` at the most."""
        ...


class KernelReceiver:
    def __init__(self, functions: Functions) -> None:
        self._arena = Arena(functions)

    def receive(self, socket: Socket) -> Frames:
        return Frames.of(self._arena.receive(socket.underlying))

    def receive_ends(self, socket: Socket, most: int) -> Ends:
        return self._arena.receive(socket.underlying, most).first_and_last()


class PlainReceiver:
    def receive(self, socket: Socket) -> Frames:
        messages: list[tuple[int, bytes]] = []
        size = misshapen = 0
        while len(messages) < MESSAGES and size < BYTES_PER_TURN:
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            if len(frames) < 2 or len(frames[-2]) != NUMBER_BYTES:
                misshapen += 1
                continue
            size += len(frames[-1])
            messages.append((int.from_bytes(frames[-2], "big", signed=True), frames[-1]))
        return frames_of(messages, misshapen)

    def receive_ends(self, socket: Socket, most: int) -> Ends:
        found: Ends = []
        while len(found) < most:
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            found.append((len(frames), frames[0], frames[-1]))
        return found


def receiver() -> Receiver:
    """The fastest there is."""
    try:
        return KernelReceiver(Functions(address_of("zmq_recv"), address_of("zmq_getsockopt")))
    except (ImportError, OSError, AttributeError):
        return PlainReceiver()


def address_of(function: str) -> int:
    """Where a function of the libzmq is that pyzmq uses. Raises ImportError, OSError or AttributeError if unknown."""
    from zmq.backend.cython import _zmq

    address = ctypes.cast(getattr(ctypes.CDLL(_zmq.__file__), function), ctypes.c_void_p).value
    assert address is not None
    return address
