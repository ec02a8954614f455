"""Follows one engine's KV events, compiled: a batch of payloads -> the names that came and went.

The kernel reads msgpack as vLLM 0.20 to 0.32 and SGLang write it where blocks are in GPU memory and have no extra keys.
At anything else it stops before that payload, which `kv_events.decode` then reads. The plain twin is
`kv_events_plain.PlainFollower`.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_llmd.errors import MalformedMessageError
from vllm_llmd.kernels import frames_cpu, kv_events
from vllm_llmd.kernels.block_names import Cleared, NetChange, Removed, Stored, digests_of
from vllm_llmd.kernels.block_names_cpu import (
    REMOVED,
    SMALLEST,
    STORED,
    TAKEN,
    UNNAMED,
    Counts,
    NameTable,
    has_room,
    remove_run,
    store_run,
)
from vllm_llmd.kernels.frames_cpu import Frames, frames_of
from vllm_llmd.kernels.hash_chain import Names, token_bytes
from vllm_llmd.kernels.hash_chain_cpu import UNSALTED, TokenIds, xxh64
from vllm_llmd.kernels.kv_events import Reported
from vllm_llmd.kernels.kv_events_parse_cpu import (
    BLOCK_SIZE,
    END_KEY,
    END_TOKEN,
    EVENT_WORDS,
    FIRST_KEY,
    FIRST_TOKEN,
    GROUP,
    HAS_PARENT,
    IS_STORED,
    KEEPS_ALL,
    LEAST_EVENT_BYTES,
    Bytes,
    parse,
)
from vllm_llmd.kernels.kv_events_plain import NO_GROUP, NO_SIZE, Change, Tally, names_known
from vllm_llmd.kernels.memory_cpu import compiled
from vllm_llmd.kernels.offloaded_blocks import OffloadedBlocks
from vllm_llmd.names import BlockName, Tier

DONE, UNUSUAL, FULL = 0, 1, 2
SIZE_FACT, GROUP_FACT, SKIPPED_GROUP, SKIPPED_SIZE = 0, 1, 2, 3
FACTS = 4
MOST_EXPECTED = 1 << 22


class Follower:
    """One stream of payloads, in order. As `PlainFollower`, and faster."""

    def __init__(self) -> None:
        self._names = NameTable()
        self._facts: Counts = np.array([NO_SIZE, NO_GROUP, 0, 0], np.int64)
        self._scratch = _Scratch(1 << 16)
        self._counted = Tally()
        self._offloaded = OffloadedBlocks(self._name_of)
        self._elsewhere: dict[Tier, NetChange] = {}
        self._known: Mapping[Hashable, BlockName] = {}
        self._cleared = False

    @property
    def block_size(self) -> int | None:
        """Tokens per block, once an event has told."""
        size = int(self._facts[SIZE_FACT])
        return None if size == NO_SIZE else size

    @property
    def blocks(self) -> int:
        """Different hashes that are cached and have a name."""
        return int(self._names.counts[TAKEN])

    @property
    def tally(self) -> Tally:
        """What has come so far and was of no use."""
        self._counted.unnamed = int(self._names.counts[UNNAMED]) + self._offloaded.unnamed
        self._counted.other_group = int(self._facts[SKIPPED_GROUP])
        self._counted.other_size = int(self._facts[SKIPPED_SIZE])
        return self._counted

    def expect(self, blocks: int) -> None:
        """The engine's pool has so many: it is less work to know that before they come."""
        self._names.expect(min(blocks, MOST_EXPECTED) - self.blocks)

    def forget(self) -> None:
        """The engine's life is over, or lost from sight: whatever comes next is of an empty cache."""
        self._names.clear()
        self._facts[[SIZE_FACT, GROUP_FACT]] = NO_SIZE, NO_GROUP
        self._clear_elsewhere()
        self._cleared = True

    def follow(self, payloads: Sequence[bytes]) -> Change:
        """What the payloads change, in all. One that is malformed is counted and passed over."""
        return self.follow_frames(frames_of([(0, payload) for payload in payloads]))

    def follow_frames(self, frames: Frames) -> Change:
        """The same, of payloads as they are received."""
        starts, ends = np.ascontiguousarray(frames.starts), np.ascontiguousarray(frames.ends)
        self._scratch = self._scratch.for_payloads_of(int((ends - starts).max(initial=0)))
        at = 0
        while at < len(frames):
            at, reason, keys = self._run(frames.data, starts, ends, at)
            if reason == UNUSUAL:
                self._take(frames.payload(at))
                at += 1
            elif reason == FULL:
                self._names.make_room(keys)
        removed, stored = self._names.take_changes()
        cleared, self._cleared = self._cleared, False
        elsewhere, self._elsewhere = self._elsewhere, {}
        return Change(cleared, removed, stored, elsewhere)

    def _run(self, data: Bytes, starts: Counts, ends: Counts, at: int) -> tuple[int, int, int]:
        names, scratch = self._names, self._scratch
        return _follow(
            data, starts, ends, at, names.table, names.counts, names.stored, names.removed, self._facts, *scratch.arrays
        )

    def _take(self, payload: bytes) -> None:
        try:
            decoded = kv_events.decode(payload)
        except MalformedMessageError:
            self._counted.malformed += 1
            return
        self._counted.unknown += decoded.unknown
        self._known = names_known(decoded, self._cached_name)
        for reported in decoded.events:
            self._apply(reported)

    def _apply(self, reported: Reported) -> None:
        event = reported.event
        match event:
            case Cleared():
                self._names.clear()
                self._clear_elsewhere()
                self._cleared = True
            case _ if reported.tier is None:
                self._counted.other_tier += 1
            case _ if (told := reported.elsewhere) is not None:
                if reported.group == self._facts[GROUP_FACT]:
                    self._offloaded.apply([told], self._elsewhere)
                else:
                    self._facts[SKIPPED_GROUP] += 1
            case Stored():
                tokens = np.frombuffer(token_bytes(event.token_ids), np.uint32)
                blocks, size = len(event.hashes), reported.block_size or 0
                if not _wanted(self._facts, reported.group, reported.keeps_all, blocks, len(tokens), size):
                    return
                parent = None if event.parent is None else _key(event.parent)
                self._names.store(_keys(event.hashes), parent, tokens, digests_of(event.salts, 0))
            case Removed():
                if reported.group == self._facts[GROUP_FACT]:
                    self._names.remove(_keys(event.hashes))

    def _clear_elsewhere(self) -> None:
        self._offloaded.clear()
        self._elsewhere.clear()

    def _cached_name(self, block_hash: Hashable) -> BlockName | None:
        name = self._names.cached_name(_key(block_hash))
        return None if name is None else BlockName(name)

    def _name_of(self, block_hash: Hashable) -> BlockName | None:
        return self._known.get(block_hash) or self._cached_name(block_hash)


class _Scratch:
    """Room for what one payload of up to so many bytes may hold."""

    def __init__(self, payload_bytes: int) -> None:
        self._bytes = payload_bytes
        events = payload_bytes // LEAST_EVENT_BYTES + 1
        self.arrays: tuple[npt.NDArray[Any], ...] = (
            np.empty((events, EVENT_WORDS), np.int64),
            np.empty(events, np.uint64),
            np.empty(payload_bytes + 1, np.uint64),
            np.empty(payload_bytes + 1, np.uint32),
        )

    def for_payloads_of(self, payload_bytes: int) -> "_Scratch":
        return self if payload_bytes <= self._bytes else _Scratch(2 * payload_bytes)


def compile_ahead() -> None:
    """Compiles every kernel or loads it from numba's cache, so that no message has to wait for that."""
    frames_cpu.compile_ahead()
    NameTable().make_room(SMALLEST)
    Follower().follow([b"", b"\x92\xcb" + bytes(8) + b"\x90"])
    follower = Follower()
    for event in (Stored((1,), None, [1], None), Stored((2,), 1, [1], [["x"]]), Removed((1,))):
        follower._apply(Reported(event, block_size=1))


def _key(block_hash: Hashable) -> int:
    """An engine's hash as a key of the table."""
    return (xxh64(block_hash, 0) if isinstance(block_hash, bytes) else int(block_hash)) or 1  # type: ignore[call-overload]


def _keys(hashes: Sequence[Hashable]) -> Names:
    return np.array([_key(each) for each in hashes], np.uint64)


@compiled
def _wanted(facts: Counts, group: int, keeps_all: bool, blocks: int, tokens: int, size: int) -> bool:
    """Whether a stored event tells of full blocks of the group that names them; the first that could do so decides."""
    if facts[GROUP_FACT] == NO_GROUP and keeps_all:
        facts[GROUP_FACT] = group
    if group != facts[GROUP_FACT]:
        facts[SKIPPED_GROUP] += 1
        return False
    if facts[SIZE_FACT] == NO_SIZE:
        facts[SIZE_FACT] = size
    if size != facts[SIZE_FACT] or tokens != blocks * size:
        facts[SKIPPED_SIZE] += 1
        return False
    return True


@compiled
def _follow(
    data: Bytes,
    starts: Counts,
    ends: Counts,
    first: int,
    table: Names,
    counts: Counts,
    stored: Names,
    removed: Names,
    facts: Counts,
    events: Counts,
    parents: Names,
    keys: Names,
    tokens: TokenIds,
) -> tuple[int, int, int]:
    """Follows payloads from the first on. Which one is next, why it stopped there, and how many hashes that one has."""
    for number in range(first, len(starts)):
        understood, found, seen = parse(data, starts[number], ends[number], events, parents, keys, tokens, table)
        if not understood:
            return number, UNUSUAL, 0
        if (
            not has_room(len(table), counts[TAKEN], seen)
            or counts[STORED] + seen > len(stored)
            or counts[REMOVED] + seen > len(removed)
        ):
            return number, FULL, seen
        for i in range(found):
            event = events[i]
            some = keys[event[FIRST_KEY] : event[END_KEY]]
            if event[IS_STORED]:
                size, amount = event[BLOCK_SIZE], event[END_TOKEN] - event[FIRST_TOKEN]
                if not _wanted(facts, event[GROUP], event[KEEPS_ALL] != 0, len(some), amount, size):
                    continue
                words = tokens[event[FIRST_TOKEN] : event[END_TOKEN]]
                has_parent = event[HAS_PARENT] != 0
                store_run(table, counts, some, words, size, has_parent, parents[i], UNSALTED, stored)
            elif event[GROUP] == facts[GROUP_FACT]:
                remove_run(table, counts, some, stored, removed)
    return len(starts), DONE, 0
