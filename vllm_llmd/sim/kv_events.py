"""vLLM's own KV events as a simulated engine without our link would publish them.

The forms are vLLM's: maps as of 0.32, tagged arrays before. Block hashes are not our names, as vLLM's are not.
"""

import hashlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from vllm_llmd.errors import ConfigError
from vllm_llmd.names import BlockName, Tier
from vllm_llmd.sim.cache_change import CacheChange
from vllm_llmd.sim.settings import EventForm, HashForm

KEPT_BATCHES = 10_000
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)

_MEDIUMS: Mapping[Tier, str] = {"gpu": "GPU", "cpu": "CPU", "disk": "STORAGE"}


@dataclass(frozen=True)
class Content:
    """What is in a block, as far as events tell: its tokens, and what it follows."""

    parent: BlockName | None
    tokens: list[int]
    adapter: str | None
    extra_keys: list[Any] | None


@dataclass(frozen=True)
class EventCodec:
    """How changes of the cache are put. Pure."""

    form: EventForm
    hashes: HashForm
    block_size: int

    def batch(self, at_s: float, change: CacheChange, contents: Mapping[BlockName, Content], tier: Tier) -> bytes:
        events: list[Any] = [self._event("AllBlocksCleared", {})] if change.cleared else []
        if change.removed:
            hashes = [self._hash(name) for name in change.removed]
            events.append(self._event("BlockRemoved", {"block_hashes": hashes, "medium": _MEDIUMS[tier]}))
        events += [self._stored(chain, contents, tier) for chain in _chains(change.stored, contents)]
        return msgspec.msgpack.encode([at_s, events, 0])

    def _stored(self, chain: list[BlockName], contents: Mapping[BlockName, Content], tier: Tier) -> Any:
        first = contents[chain[0]]
        fields: dict[str, Any] = {
            "block_hashes": [self._hash(name) for name in chain],
            "parent_block_hash": None if first.parent is None else self._hash(first.parent),
            "token_ids": [token for name in chain for token in contents[name].tokens],
            "block_size": self.block_size,
            "lora_id": None if first.adapter is None else 1,
            "medium": _MEDIUMS[tier],
            "lora_name": first.adapter,
        }
        if any(contents[name].extra_keys for name in chain):
            fields["extra_keys"] = [contents[name].extra_keys for name in chain]
        return self._event("BlockStored", fields)

    def _event(self, kind: str, fields: dict[str, Any]) -> Any:
        return {"type": kind, **fields} if self.form == "map" else [kind, *fields.values()]

    def _hash(self, name: BlockName) -> int | bytes:
        digest = hashlib.sha256(name.to_bytes(8, "little")).digest()
        return digest if self.hashes == "bytes" else int.from_bytes(digest[-8:], "big")


def _chains(names: list[BlockName], contents: Mapping[BlockName, Content]) -> list[list[BlockName]]:
    """Names cut up so that in each piece every block follows the one before it."""
    chains: list[list[BlockName]] = []
    for name in names:
        if chains and contents[name].parent == chains[-1][-1]:
            chains[-1].append(name)
        else:
            chains.append([name])
    return chains


class EventPublisher:
    """A PUB socket, and a ROUTER that sends batches again from a number on, as vLLM has them. Event loop only."""

    def __init__(self, context: zmq.asyncio.Context, host: str, port: int) -> None:
        """`port` and the next one; 0 takes free ones. Raises ConfigError if one is taken."""
        self._batches: deque[tuple[int, bytes]] = deque(maxlen=KEPT_BATCHES)
        self._next = 0
        self._pub: zmq.Socket[bytes] = zmq.Context(context).socket(zmq.PUB)
        self._replay = context.socket(zmq.ROUTER)
        try:
            self._pub.bind(f"tcp://{host}:{port}")
            self._replay.bind(f"tcp://{host}:{port + 1 if port else 0}")
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"kv_events_port and the next one must be free; got {port} ({error})") from None

    @property
    def endpoint(self) -> str:
        return self._pub.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def replay_endpoint(self) -> str:
        return self._replay.getsockopt_string(zmq.LAST_ENDPOINT)

    def publish(self, batch: bytes) -> None:
        number, self._next = self._next, self._next + 1
        self._batches.append((number, batch))
        self._pub.send_multipart((b"", number.to_bytes(8, "big"), batch))

    async def replay(self) -> None:
        """Answers whoever asks, for ever."""
        while True:
            frames = await self._replay.recv_multipart()
            if len(frames) != 3:
                continue
            client, _, start = frames
            for number, batch in list(self._batches):
                if number >= int.from_bytes(start, "big"):
                    await self._replay.send_multipart((client, b"", b"", number.to_bytes(8, "big"), batch))
            await self._replay.send_multipart((client, b"", b"", END_OF_REPLAY, b""))

    def close(self) -> None:
        self._pub.close(linger=0)
        self._replay.close(linger=0)
