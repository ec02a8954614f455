"""What engines and routers say to each other, and the values in it; and what every message on the wire is."""

import msgspec

from vllm_llmd.names import EngineId, Epoch, Role, Tier


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
    """How busy an engine is. Counts are of this instant; `step_ms` is a moving average of steps with compute.

    `prefill_tokens` of prompts are to be computed here; `unplaced_tokens` have no block yet, whoever computes them, as
    many as are to be computed if it is None.
    """

    running: int = 0
    waiting: int = 0
    waiting_for_kv: int = 0
    prefill_tokens: int = 0
    free_blocks: int = 0
    pinned_blocks: int = 0
    step_ms: float = 0.0
    orders_placed: int = 0
    orders_served: int = 0
    unplaced_tokens: int | None = None


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


LinkMessage = (
    Hello | Heartbeat | BlocksChanged | Snapshot | RequestSeen | Goodbye
    | Welcome | SnapshotWanted | HelloWanted | Members | Refused
)  # fmt: skip
