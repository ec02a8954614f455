"""Both ways in which messages come out of a socket, over real ZeroMQ."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import zmq

from vllm_llmd.kernels import frames_cpu
from vllm_llmd.kernels.frames_cpu import MESSAGES, Frames, frames_of
from vllm_llmd.router.zmq_receive import KernelReceiver, PlainReceiver, Receiver, receiver

WITHIN_MS = 60_000


class Pair:
    """Two sockets that are connected, and what comes out of the second."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", receiver: Receiver) -> None:
        self.here, self.there = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        for socket in (self.here, self.there):
            socket.setsockopt(zmq.LINGER, 0)
        self.there.connect(f"tcp://127.0.0.1:{self.here.bind_to_random_port('tcp://127.0.0.1')}")
        self.receiver = receiver

    def send(self, *frames: bytes) -> None:
        self.here.send_multipart(frames)

    def receive(self, messages: int) -> list[tuple[int, bytes]]:
        """Until so many have come."""
        found: list[tuple[int, bytes]] = []
        while len(found) < messages:
            assert self.there.poll(WITHIN_MS)
            frames = self.receiver.receive(self.there)
            found += [(number, frames.payload(i)) for i, number in enumerate(frames.numbers.tolist())]
        return found


@pytest.fixture(params=[PlainReceiver, receiver])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with zmq.Context() as context:
        pair = Pair(context, request.param())
        yield pair
        pair.here.close(linger=0)
        pair.there.close(linger=0)


def numbered(number: int) -> bytes:
    return number.to_bytes(8, "big", signed=True)


def test_messages_come_in_order_with_their_numbers(pair: Pair) -> None:
    sent = [(number, bytes([number % 251]) * (number % 4000)) for number in range(3 * MESSAGES)]
    for number, payload in sent:
        pair.send(b"topic", numbered(number), payload)
    assert pair.receive(len(sent)) == sent


def test_an_empty_socket_gives_nothing(pair: Pair) -> None:
    frames = pair.receiver.receive(pair.there)
    assert (len(frames), frames.misshapen) == (0, 0)


def test_a_replays_frames_and_the_end_of_it_are_read(pair: Pair) -> None:
    pair.send(b"", b"topic", numbered(7), b"payload")
    pair.send(b"", numbered(8), b"payload")
    pair.send(numbered(-1), b"")
    assert pair.receive(3) == [(7, b"payload"), (8, b"payload"), (-1, b"")]


def test_a_message_of_another_shape_is_counted_and_its_neighbours_come(pair: Pair) -> None:
    for frames in ([b"one"], [b"seven..", b"payload"], [b"", numbered(1), b"good"]):
        pair.send(*frames)
    misshapen = 0
    found: list[tuple[int, bytes]] = []
    while not found:
        assert pair.there.poll(WITHIN_MS)
        frames = pair.receiver.receive(pair.there)
        misshapen += frames.misshapen
        found = [(number, frames.payload(i)) for i, number in enumerate(frames.numbers.tolist())]
    assert found == [(1, b"good")]
    assert misshapen == 2


def test_of_messages_of_any_shape_the_first_and_the_last_frame_are_told(pair: Pair) -> None:
    sent = [[b"a", b"one"], [b"alone"], [b"b", b"", b"x" * 5000, b"two"], [b"", b""]]
    for frames in sent:
        pair.send(*frames)
    found: list[tuple[int, bytes, bytes]] = []
    while len(found) < len(sent):
        assert pair.there.poll(WITHIN_MS)
        some = pair.receiver.receive_ends(pair.there, 3)
        assert len(some) <= 3
        found += some
    assert found == [(len(frames), frames[0], frames[-1]) for frames in sent]
    assert pair.receiver.receive_ends(pair.there, 3) == []


def test_a_message_that_is_too_large_is_told_of_without_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames_cpu, "ARENA_BYTES", frames_cpu.LARGEST_MESSAGE)
    with zmq.Context() as context:
        pair = Pair(context, receiver())
        pair.send(b"a", bytes(frames_cpu.LARGEST_MESSAGE))
        pair.send(b"b", b"next")
        found: list[tuple[int, bytes, bytes]] = []
        while len(found) < 2:
            assert pair.there.poll(WITHIN_MS)
            found += pair.receiver.receive_ends(pair.there, 3)
        assert found[0][0] == 0
        assert found[1] == (2, b"b", b"next")
        for socket in (pair.here, pair.there):
            socket.close(linger=0)


def test_on_cpython_a_kernel_receives() -> None:
    assert isinstance(receiver(), KernelReceiver)


@pytest.mark.parametrize("places", [[0, 2], slice(1, None), []])
def test_some_messages_are_chosen(places: Any) -> None:
    every = [(3, b"abc"), (4, b""), (5, b"de")]
    frames: Frames = frames_of(every).only(np.array(places, np.intp) if isinstance(places, list) else places)
    chosen = [every[i] for i in places] if isinstance(places, list) else every[places]
    assert [(number, frames.payload(i)) for i, number in enumerate(frames.numbers.tolist())] == chosen
