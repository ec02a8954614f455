from types import NoneType, UnionType
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd import wire
from vllm_llmd.errors import MalformedMessageError, UnknownVersionError, WireError
from vllm_llmd.names import BlockName

LINK = get_args(wire.LinkMessage)
PEER = get_args(wire.PeerMessage)

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def resolved(kind: type) -> st.SearchStrategy[Any]:
    return st.builds(
        kind, **{field.name: from_type(field.type) for field in msgspec.structs.fields(kind)}
    )  # every field, defaults included


def from_type(kind: Any) -> st.SearchStrategy[Any]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return resolved(kind)
    if kind is int:
        return st.integers(0, 2**64 - 1)
    if kind is float:
        return st.floats(allow_nan=False)
    if kind is bytes:
        return st.binary()
    if kind is str:
        return st.text()
    if kind is bool:
        return st.booleans()
    if hasattr(kind, "__supertype__"):
        return from_type(kind.__supertype__)
    origin, args = getattr(kind, "__origin__", None), get_args(kind)
    if origin is list:
        return st.lists(from_type(args[0]), max_size=4)
    if isinstance(kind, UnionType):
        return st.one_of(*(st.none() if arg is NoneType else from_type(arg) for arg in args))
    if origin is dict:
        return st.dictionaries(from_type(args[0]), from_type(args[1]), max_size=3)
    return st.sampled_from(args)  # a Literal


@pytest.mark.parametrize("kind", LINK, ids=lambda kind: kind.__name__)
def test_every_link_message_comes_back_as_it_was_sent(kind: type) -> None:
    @given(resolved(kind))
    def round_trip(message: Any) -> None:
        assert wire.decode_link(wire.encode(message)) == message

    round_trip()


@pytest.mark.parametrize("kind", PEER, ids=lambda kind: kind.__name__)
def test_every_peer_message_comes_back_as_it_was_sent(kind: type) -> None:
    @given(resolved(kind))
    def round_trip(message: Any) -> None:
        assert wire.decode_peer(wire.encode(message)) == message

    round_trip()


@given(st.integers(0, 255).filter(lambda major: major != wire.MAJOR), st.binary(min_size=1))
def test_an_unknown_major_version_is_refused_by_name(major: int, rest: bytes) -> None:
    with pytest.raises(UnknownVersionError, match=f"protocol {major}."):
        wire.decode_link(bytes((major, rest[0])) + b"\0" + rest)


def test_a_later_minor_version_is_understood() -> None:
    frame = wire.encode(wire.Welcome("r", 1))
    assert wire.decode_link(bytes((wire.MAJOR, wire.MINOR + 1)) + frame[2:]) == wire.Welcome("r", 1)


@given(st.lists(values, max_size=3))
def test_trailing_fields_of_a_later_version_are_ignored(extra: list[Any]) -> None:
    frame = bytes((wire.MAJOR, 99)) + msgspec.msgpack.encode(["Welcome", "r", 1, *extra])
    assert wire.decode_link(frame) == wire.Welcome("r", 1)


def test_missing_trailing_fields_take_their_defaults() -> None:
    frame = wire.encode(wire.Hello(engine=None))  # type: ignore[arg-type]
    info = ["id", 1, "both", "http://h", ["m"], 16, 1, 1, "f", []]
    frame = frame[:2] + msgspec.msgpack.encode(["Hello", info])
    decoded = wire.decode_link(frame)
    assert isinstance(decoded, wire.Hello) and decoded.engine.labels == {}


@given(st.binary())
def test_noise_raises_a_wire_error_and_nothing_else(noise: bytes) -> None:
    for decode in (wire.decode_link, wire.decode_peer):
        for frame in (noise, bytes((wire.MAJOR, wire.MINOR)) + noise):
            try:
                decode(frame)
            except WireError:
                continue


@given(values)
def test_well_formed_nonsense_is_malformed(value: Any) -> None:
    with pytest.raises(MalformedMessageError):
        wire.decode_link(bytes((wire.MAJOR, wire.MINOR)) + msgspec.msgpack.encode(["Nonsense", value]))


def test_a_peer_message_is_no_link_message() -> None:
    with pytest.raises(MalformedMessageError):
        wire.decode_link(wire.encode(wire.Done(order="o")))  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 2**64 - 1).map(BlockName)))
def test_packed_names_come_back(names: list[BlockName]) -> None:
    packed = wire.pack_names(names)
    assert len(packed) == 8 * len(names)
    assert wire.unpack_names(packed) == names


def test_packed_names_are_little_endian() -> None:
    assert wire.pack_names([BlockName(1)]) == b"\x01" + bytes(7)


def test_packed_names_that_are_not_whole_are_malformed() -> None:
    with pytest.raises(MalformedMessageError, match="multiple of 8"):
        wire.unpack_names(b"1234567")
