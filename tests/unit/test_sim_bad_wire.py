"""What a bad wire does to messages: nothing unless told to, and never anything but what it was told to."""

import random
from collections import Counter
from collections.abc import Iterator

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.sim.bad_wire import DELAYED_MESSAGES, BadWire, Lane
from vllm_llmd.sim.failures import WireFaults

NOTHING = WireFaults()


def through(lane: Lane, count: int, faults: WireFaults, first: int = 0) -> list[int]:
    frames = (str(number).encode() for number in range(first, first + count))
    return [int(frame) for sent in frames for frame in lane.pass_on(sent, faults)]


def lane(seed: int = 0) -> tuple[Lane, Counter[str]]:
    happened: Counter[str] = Counter()
    return Lane(random.Random(seed), happened), happened


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_messages_are_only_dropped_doubled_and_moved_as_often_as_is_counted(
    seed: int, drop: float, duplicate: float, delay: float, reorder: float
) -> None:
    wire, happened = lane(seed)
    out = through(wire, 200, WireFaults(drop, duplicate, delay, reorder))
    out += through(wire, 20, NOTHING, 200)
    counts = Counter(out)
    assert set(counts) <= set(range(220)) and set(counts.values()) <= {1, 2}
    assert happened["drop"] == 220 - len(counts)
    assert happened["duplicate"] == sum(count == 2 for count in counts.values())
    assert set(range(200, 220)) <= set(out)


def test_without_faults_everything_passes_in_order() -> None:
    wire, happened = lane()
    assert through(wire, 50, NOTHING) == list(range(50))
    assert not happened


def test_what_is_reordered_lets_one_other_pass() -> None:
    wire, _ = lane()
    assert through(wire, 1, WireFaults(reorder=1.0)) == []
    assert through(wire, 2, NOTHING, 1) == [1, 0, 2]


def test_what_is_delayed_comes_in_the_end() -> None:
    wire, _ = lane()
    through(wire, 1, WireFaults(delay=1.0))
    out = through(wire, DELAYED_MESSAGES, NOTHING, 1)
    assert 0 in out and out.index(0) >= 2


@pytest.fixture
def sockets() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    with zmq.Context() as context:
        yield context


def test_a_real_socket_loses_what_the_wire_loses_in_both_directions(
    sockets: "zmq.Context[zmq.Socket[bytes]]",
) -> None:
    wire = BadWire(sockets, random.Random(0))
    with sockets.socket(zmq.PAIR) as far, wire.socket(zmq.PAIR) as near:
        far.bind("inproc://far")
        near.connect("inproc://far")
        near.send(b"1")
        assert far.recv() == b"1"
        wire.faults = WireFaults(drop=1.0)
        near.send(b"2")
        far.send(b"3")
        with pytest.raises(zmq.Again):
            near.recv(zmq.DONTWAIT)
        wire.faults = WireFaults(duplicate=1.0)
        near.send(b"4")
        far.send(b"5")
        assert [far.recv(), far.recv()] == [b"4", b"4"]
        assert [near.recv(), near.recv()] == [b"5", b"5"]
        assert not far.poll(0)
        assert wire.happened == {"drop": 2, "duplicate": 2}
