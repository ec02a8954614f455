"""Every message that crosses a process boundary over ZeroMQ, by name, and the one codec for them.

A frame is two bytes (major, minor version) followed by one msgpack array: tag, then fields in order.
New fields go to the end with a default, so that an older reader ignores them and a newer one fills them in;
a new meaning of an old field needs a new major version. Block names travel packed, 8 bytes each, little endian.
"""

import sys
from array import array
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from vllm_llmd.errors import MalformedMessageError, UnknownVersionError
from vllm_llmd.names import BlockName
from vllm_llmd.wire_link import (
    BlocksChanged,
    EngineInfo,
    Geometry,
    Goodbye,
    GroupShape,
    Heartbeat,
    Held,
    Hello,
    HelloWanted,
    LinkMessage,
    Load,
    Members,
    Message,
    Record,
    Refused,
    RequestSeen,
    Snapshot,
    SnapshotWanted,
    Welcome,
)
from vllm_llmd.wire_peer import (
    Ack,
    Announce,
    Component,
    Done,
    Dropped,
    Greet,
    Greeting,
    Interior,
    PeerMessage,
    Regions,
    Renew,
    Renewed,
    Strip,
)

__all__ = [
    "MAJOR",
    "MINOR",
    "Ack",
    "Announce",
    "BlocksChanged",
    "Component",
    "Done",
    "Dropped",
    "EngineInfo",
    "Geometry",
    "Goodbye",
    "Greet",
    "Greeting",
    "GroupShape",
    "Heartbeat",
    "Held",
    "Hello",
    "HelloWanted",
    "Interior",
    "LinkMessage",
    "Load",
    "Members",
    "Message",
    "PeerMessage",
    "Record",
    "Refused",
    "Regions",
    "Renew",
    "Renewed",
    "RequestSeen",
    "Snapshot",
    "SnapshotWanted",
    "Strip",
    "Welcome",
    "check_packed",
    "decode_link",
    "decode_peer",
    "encode",
    "pack_names",
    "unpack_names",
]

MAJOR: Final = 1
MINOR: Final = 0

_VERSION = bytes((MAJOR, MINOR))
_encoder = msgspec.msgpack.Encoder()
_link_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(LinkMessage)
_peer_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(PeerMessage)


def encode(message: Message) -> bytes:
    """One message as one frame."""
    return _VERSION + _encoder.encode(message)


def decode_link(frame: bytes) -> LinkMessage:
    """A frame between engine and router.

    Raises UnknownVersionError for another major version and MalformedMessageError for anything else unusable.
    """
    message: LinkMessage = _decode(_link_decoder, frame)
    return message


def decode_peer(frame: bytes) -> PeerMessage:
    """A frame between two engines' workers. Raises as `decode_link` does."""
    message: PeerMessage = _decode(_peer_decoder, frame)
    return message


def _decode(decoder: msgspec.msgpack.Decoder[Any], frame: bytes) -> Any:
    if len(frame) < 3:
        raise MalformedMessageError(f"a frame needs at least 3 bytes; got {len(frame)}")
    if frame[0] != MAJOR:
        raise UnknownVersionError(
            f"the sender speaks protocol {frame[0]}.{frame[1]}, this side {MAJOR}.{MINOR}: "
            "run the same major version of vllm-llmd on every engine and router"
        )
    try:
        return decoder.decode(memoryview(frame)[2:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(f"not a message of protocol {MAJOR}.{MINOR}: {error}") from error


def pack_names(names: Iterable[BlockName]) -> bytes:
    """Block names as they travel: 8 bytes each, little endian."""
    packed = array("Q", names)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def check_packed(packed: bytes) -> None:
    """Raises MalformedMessageError unless the length is a multiple of 8."""
    if len(packed) % 8:
        raise MalformedMessageError(f"packed block names need a multiple of 8 bytes; got {len(packed)}")


def unpack_names(packed: bytes) -> list[BlockName]:
    """The inverse of `pack_names`. Raises as `check_packed` does."""
    check_packed(packed)
    names = array("Q")
    names.frombytes(packed)
    if sys.byteorder == "big":
        names.byteswap()
    return names.tolist()  # type: ignore[return-value]
