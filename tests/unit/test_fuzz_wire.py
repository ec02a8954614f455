"""What a broken or hostile peer puts on the wire: it is decoded or refused as a WireError, at a cost like its size."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd import wire
from vllm_llmd.errors import MalformedMessageError, UnknownVersionError, WireError
from vllm_llmd.names import EngineId, Epoch, OrderId

VERSION = bytes((wire.MAJOR, wire.MINOR))
ENGINE, EPOCH, ORDER = EngineId("e"), Epoch(1), OrderId("o")
INFO = wire.EngineInfo(
    ENGINE, EPOCH, "both", "http://h", ["m"], 16, 9, 99, "f", ["tcp://h:1"],
    {"zone": "a"}, wire.Geometry(2, 4, "cells", [wire.GroupShape(16, 2)]), True,
)  # fmt: skip
INTERIOR = wire.Interior(2, 16, 512, [wire.Component(0, 512, 32, 2, 16, 2)])
REGIONS = wire.Regions([4096], [1024], [1024], [0], [0], [0], [INTERIOR], 9, 0, "DRAM")

LINK: list[wire.Message] = [
    wire.Hello(INFO),
    wire.Heartbeat(ENGINE, EPOCH, 1, 1, 2**64 - 1, wire.Load()),
    wire.BlocksChanged(ENGINE, EPOCH, 1, False, bytes(8), bytes(16)),
    wire.Snapshot(ENGINE, EPOCH, 1, 0, 1, bytes(8)),
    wire.RequestSeen(ENGINE, EPOCH, "r", 1, bytes(8)),
    wire.Goodbye(ENGINE, EPOCH),
    wire.Welcome("router", 500),
    wire.SnapshotWanted(EPOCH, "gap"),
    wire.HelloWanted("router"),
    wire.Members([INFO, INFO]),
    wire.Refused("no"),
]
PEER: list[wire.Message] = [
    wire.Greet(ENGINE, EPOCH, 0, "f", "mac"),
    wire.Renew(ORDER, 1),
    wire.Ack(ORDER, [0, 1]),
    wire.Done(ORDER),
    wire.Greeting(ENGINE, EPOCH, "f", b"agent", REGIONS, 4096),
    wire.Announce(ORDER, 0, [wire.Strip(0, 0, [1, 2])], True, 0, 2),
    wire.Renewed(ORDER, 1, True),
    wire.Dropped(ORDER, "aborted"),
    wire.Refused("no"),
]
Decode = Callable[[bytes], Any]
ENDS: list[tuple[Decode, list[wire.Message]]] = [(wire.decode_link, LINK), (wire.decode_peer, PEER)]
both_ends = pytest.mark.parametrize(("decode", "samples"), ENDS, ids=["link", "peer"])

hostile = st.recursive(
    st.sampled_from([None, True, 0, -1, 2**63, 2**64 - 1, -(2**63), 0.5, float("nan"), float("inf"), "", "Hello", b""])
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner),
    max_leaves=6,
)


def mangled(draw: st.DrawFn, tree: Any) -> Any:
    """A message's tree with a node replaced, taken out, doubled or put in."""
    if not isinstance(tree, list) or not tree or draw(st.integers(0, 3)) == 0:
        return draw(hostile)
    at = draw(st.integers(0, len(tree) - 1))
    how = draw(st.sampled_from(["deeper", "deeper", "deeper", "out", "twice", "more"]))
    changed = {"deeper": [mangled(draw, tree[at])], "out": [], "twice": [tree[at]] * 2}
    return [*tree[:at], *changed.get(how, [draw(hostile), tree[at]]), *tree[at + 1 :]]


def refused_or(decode: Decode, frame: bytes) -> Any:
    """The message in a frame, or None if it was refused; any other exception is a bug."""
    try:
        return decode(frame)
    except WireError:
        return None


@both_ends
def test_a_frame_with_other_values_is_decoded_or_refused(decode: Decode, samples: list[wire.Message]) -> None:
    @settings(max_examples=400)
    @given(st.data(), st.sampled_from(samples), st.integers(1, 3))
    def holds(data: st.DataObject, sample: wire.Message, times: int) -> None:
        tree = msgspec.msgpack.decode(wire.encode(sample)[2:])
        for _ in range(times):
            tree = data.draw(st.composite(mangled)(tree))
        message = refused_or(decode, VERSION + msgspec.msgpack.encode(tree))
        if message is not None:
            assert refused_or(decode, wire.encode(message)) is not None, "what is believed can be passed on"

    holds()


@both_ends
def test_a_frame_with_other_bytes_is_decoded_or_refused(decode: Decode, samples: list[wire.Message]) -> None:
    @settings(max_examples=400)
    @given(st.data(), st.sampled_from(samples))
    def holds(data: st.DataObject, sample: wire.Message) -> None:
        frame = bytearray(wire.encode(sample))
        for at, bits in data.draw(st.lists(st.tuples(st.integers(0, len(frame) - 1), st.integers(1, 255)), max_size=4)):
            frame[at] ^= bits
        cut = data.draw(st.just(len(frame)) | st.integers(0, len(frame)))
        refused_or(decode, bytes(frame[:cut]) + data.draw(st.just(b"") | st.binary(max_size=9)))

    holds()


@both_ends
def test_no_frame_is_decoded_after_its_end(decode: Decode, samples: list[wire.Message]) -> None:
    for sample in samples:
        frame = wire.encode(sample)
        for cut in range(len(frame)):
            with pytest.raises(WireError):
                decode(frame[:cut])
        with pytest.raises(MalformedMessageError):
            decode(frame + b"\0")


@both_ends
def test_a_message_of_another_version_is_refused_before_it_is_read(decode: Decode, samples: list[wire.Message]) -> None:
    for sample in samples:
        for major in (0, wire.MAJOR + 1, 255):
            with pytest.raises(UnknownVersionError, match=f"protocol {major}."):
                decode(bytes((major,)) + wire.encode(sample)[1:])


ARRAY_OF_BILLIONS, BYTES_OF_BILLIONS, MAP_OF_BILLIONS = b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf" * 5
"""Headers that promise more than the frame holds."""


def announce(strips: bytes) -> bytes:
    return b"\x95\xa8Announce\xa1o\x00" + strips + b"\xc2"


@pytest.mark.parametrize(
    "body",
    [
        ARRAY_OF_BILLIONS,
        BYTES_OF_BILLIONS,
        MAP_OF_BILLIONS,
        announce(ARRAY_OF_BILLIONS),
        announce(b"\x91\x93\x00\x00" + ARRAY_OF_BILLIONS),
        announce(MAP_OF_BILLIONS),
        announce(b"\xdd\x00\x03\x00\x00" + b"\x93\x00\x00\x90" * 0x30000),
        announce(b"\x91\x93\x00\x00\xdd\x00\x10\x00\x00" + b"\x07" * 0x100000),
        announce(b"\x91\x93\x00\x00\xdd\x00\x01\x00\x00" + b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff" * 0x10000),
        announce(b"\x91" * 100_000),
        b"\x93\xa4Done\xa1o" + b"\x91" * 1_000_000 + b"\x90",
        b"\x92\xa7Members" + ARRAY_OF_BILLIONS,
        b"\x92\xa7Refused" + b"\xdb\xff\xff\xff\xff",
    ],
    ids=range(13),
)
def test_decoding_takes_memory_in_proportion_to_the_frame(body: bytes) -> None:
    frame = VERSION + body
    for decode, _ in ENDS:
        tracemalloc.start()
        refused_or(decode, frame)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 64 * len(frame) + 65_536


@given(st.binary(max_size=100))
def test_packed_names_of_any_bytes_are_unpacked_or_refused(packed: bytes) -> None:
    try:
        assert wire.pack_names(wire.unpack_names(packed)) == packed
    except WireError:
        assert len(packed) % 8
