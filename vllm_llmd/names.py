"""The types of the ids and roles that cross module boundaries. Values only; no behaviour."""

from typing import Final, Literal, NewType, get_args

EngineId = NewType("EngineId", str)
"""Names one engine for as long as its operator keeps it; survives restarts."""

Epoch = NewType("Epoch", int)
"""Names one life of an engine (63 random bits, drawn at start). A message from another life is refused."""

OrderId = NewType("OrderId", str)
"""Names one remote prefill order, unique across the fleet."""

RequestId = NewType("RequestId", str)
"""vLLM's id of a request inside one engine."""

BlockName = NewType("BlockName", int)
"""64-bit chain hash of a full KV block: its tokens, everything before it, and its salt."""

Role = Literal["prefill", "decode", "both"]
"""What the router may use an engine for. Every engine can serve an order whatever its role."""

Tier = Literal["gpu", "cpu", "disk"]
"""Where an engine keeps a cached block: in the memory it computes from, or offloaded from there."""

TIERS: Final[tuple[Tier, ...]] = get_args(Tier)
