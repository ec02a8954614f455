"""What the workers of two engines say to each other, and the values in it."""

from vllm_llmd.names import EngineId, Epoch, OrderId
from vllm_llmd.wire_link import Message, Record, Refused

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


PeerMessage = Greet | Renew | Ack | Done | Greeting | Announce | Renewed | Dropped | Refused
