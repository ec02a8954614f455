"""Every message that crosses a process boundary over ZeroMQ, and the one codec for them.

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
from vllm_llmd.names import BlockName, EngineId, Epoch, OrderId, Role, Tier

MAJOR: Final = 1
MINOR: Final = 0


class Record(msgspec.Struct, array_like=True, frozen=True):
    """A value inside messages."""


class Message(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """A message; its class name is its tag."""


# --- values ---------------------------------------------------------------------------------------------------


class GroupShape(Record, frozen=True):
    """One KV cache group: layers that share a block table. `window` is in tokens, 0 where all of the past is kept."""

    block_size: int
    layers: int
    window: int = 0


class Geometry(Record, frozen=True):
    """How an engine cuts its KV cache up. Engines of one fingerprint may differ in it, within limits.

    `tp` ranks share `kv_heads` heads; 0 says that every rank holds the whole cache (MLA). `interior` names the order
    of bytes within a block; an empty one says that only engines cut the very same way understand it.
    """

    tp: int = 1
    kv_heads: int = 0
    interior: str = ""
    groups: list[GroupShape] = []


class EngineInfo(Record, frozen=True):
    """What an engine says of itself when it joins.

    `http` is the base URL of its OpenAI API; `workers` are the ZeroMQ endpoints of its worker ranks, in rank order.
    `fingerprint` is equal on two engines exactly when their caches hold the same values; `geometry` says how each cuts
    them up. `priorities` tells whether it schedules by priority. `models` are names of its base model, `adapters` those
    of the adapters that it can serve on top. `max_sequences` is how many requests it runs at a time.
    """

    id: EngineId
    epoch: Epoch
    role: Role
    http: str
    models: list[str]
    block_size: int
    num_blocks: int
    max_model_len: int
    fingerprint: str
    workers: list[str]
    labels: dict[str, str] = {}
    geometry: Geometry = Geometry()
    priorities: bool = False
    adapters: list[str] = []
    max_sequences: int | None = None

    def serves(self, model: str | None) -> bool:
        """Whether a request for `model`, or for no model by name, is for this engine."""
        return model is None or model in self.models or model in self.adapters


class Load(Record, frozen=True):
    """How busy an engine is. Counts are of this instant; `step_ms` is a moving average of steps with compute."""

    running: int = 0
    waiting: int = 0
    waiting_for_kv: int = 0
    prefill_tokens: int = 0
    free_blocks: int = 0
    pinned_blocks: int = 0
    step_ms: float = 0.0
    orders_placed: int = 0
    orders_served: int = 0


class Held(Record, frozen=True):
    """How many blocks an engine holds in a tier, and the exclusive or of their names."""

    tier: Tier
    blocks: int
    digest: int


# --- engine -> router -----------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """Opens a link, and opens it again whenever the router asks or may have forgotten."""

    engine: EngineInfo


class Heartbeat(Message, frozen=True):
    """Sent every `Welcome.heartbeat_ms`. `seq` is that of the latest BlocksChanged.

    As of then, `blocks` are held on the GPU, and `digest` is the exclusive or of their names; `offloaded` says the same
    of every other tier in which any are. `draining`: the engine is about to leave, and wants no more requests.
    """

    engine: EngineId
    epoch: Epoch
    seq: int
    blocks: int
    digest: int
    load: Load
    offloaded: list[Held] = []
    draining: bool = False


class BlocksChanged(Message, frozen=True):
    """Net change of one tier of the engine's prefix cache since `seq - 1`: clear if `cleared`, then remove, then store.

    Nothing else has changed since.
    """

    engine: EngineId
    epoch: Epoch
    seq: int
    cleared: bool
    removed: bytes
    stored: bytes
    tier: Tier = "gpu"


class Snapshot(Message, frozen=True):
    """Part `part` of `parts` of everything the engine holds as of `seq`: names of one tier."""

    engine: EngineId
    epoch: Epoch
    seq: int
    part: int
    parts: int
    names: bytes
    tier: Tier = "gpu"


class RequestSeen(Message, frozen=True):
    """The block names of a request's prompt (full blocks only), under the name the router gave the request."""

    engine: EngineId
    epoch: Epoch
    request: str
    prompt_tokens: int
    names: bytes


class Goodbye(Message, frozen=True):
    """The engine leaves in good order."""

    engine: EngineId
    epoch: Epoch


# --- router -> engine -----------------------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """Answers Hello. `router` names one life of the router: a new one means that everything must be told again."""

    router: str
    heartbeat_ms: int


class SnapshotWanted(Message, frozen=True):
    """Asks for a Snapshot; `reason` is for the log."""

    epoch: Epoch
    reason: str


class HelloWanted(Message, frozen=True):
    """The router does not know the sender (it restarted): say Hello again."""

    router: str


class Members(Message, frozen=True):
    """Every engine of the fleet, the receiver included. Replaces the list before it."""

    engines: list[EngineInfo]


class Refused(Message, frozen=True):
    """The receiver's message cannot be accepted; `reason` says why and what to do."""

    reason: str


# --- destination worker -> source worker ----------------------------------------------------------------------


class Greet(Message, frozen=True):
    """Opens a peer connection. The source forgets every order of an earlier epoch of this engine.

    `mac` proves knowledge of the fleet's secret, where there is one.
    """

    engine: EngineId
    epoch: Epoch
    rank: int
    fingerprint: str
    mac: str = ""


class Renew(Message, frozen=True):
    """Asks to extend the lease of `order`. `n` counts renewals, from 1; the answer repeats it."""

    order: OrderId
    n: int


class Ack(Message, frozen=True):
    """The ranges `seqs` of `order` were read and accepted: the source may release their blocks."""

    order: OrderId
    seqs: list[int]


class Done(Message, frozen=True):
    """The destination wants nothing more of `order`, whether it has all of it or gave up."""

    order: OrderId


# --- source worker -> destination worker ----------------------------------------------------------------------


class Component(Record, frozen=True):
    """Values at fixed strides within a block, in bytes: `offset + h * head + t * token + c * channel`.

    There are `channels` of them per head and token, `item_bytes` each.
    """

    offset: int
    head: int
    token: int
    channel: int
    channels: int
    item_bytes: int


class Interior(Record, frozen=True):
    """What stands where within one block of one layer.

    `heads` and `tokens` are what the block holds; a head is one run of `head_bytes`, or of none if that is 0. Without
    `components` the order of bytes within a head is unknown.
    """

    heads: int
    tokens: int
    head_bytes: int
    components: list[Component]


class Regions(Record, frozen=True):
    """Where a rank keeps its KV cache, region by region; a layer is one region, or two where K and V are apart.

    Region `r` holds block `b` of layer `layers[r]`, of KV cache group `groups[r]`, in `block_bytes[r]` bytes at
    `bases[r] + b * strides[r]`, ordered as `interiors[kinds[r]]` says.
    """

    bases: list[int]
    strides: list[int]
    block_bytes: list[int]
    layers: list[int]
    groups: list[int]
    kinds: list[int]
    interiors: list[Interior]
    num_blocks: int
    device_id: int
    memory: str


class Greeting(Message, frozen=True):
    """Answers Greet with what the destination needs to read from this rank. `agent` is NIXL metadata.

    `scratch` is the address of a few bytes of host memory: reading them makes the wire ready before it is needed.
    """

    engine: EngineId
    epoch: Epoch
    fingerprint: str
    agent: bytes
    regions: Regions
    scratch: int


class Strip(Record, frozen=True):
    """Successive prompt blocks `first_block ...` of one KV cache group stand in the source's blocks `blocks`."""

    group: int
    first_block: int
    blocks: list[int]


class Announce(Message, frozen=True):
    """A range of `order` is ready and pinned: `strips`, in layers `first_layer` to `end_layer` (exclusive; 0: all).

    `seq` counts the order's ranges from 0. `last` marks the range that completes the order.
    """

    order: OrderId
    seq: int
    strips: list[Strip]
    last: bool
    first_layer: int = 0
    end_layer: int = 0


class Renewed(Message, frozen=True):
    """Answers Renew. `held` is false while the source has not announced anything for the order."""

    order: OrderId
    n: int
    held: bool


class Dropped(Message, frozen=True):
    """The source will serve no more of `order`, and its unread ranges are no longer pinned."""

    order: OrderId
    reason: str


LinkMessage = (
    Hello | Heartbeat | BlocksChanged | Snapshot | RequestSeen | Goodbye
    | Welcome | SnapshotWanted | HelloWanted | Members | Refused
)  # fmt: skip
PeerMessage = Greet | Renew | Ack | Done | Greeting | Announce | Renewed | Dropped | Refused

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
