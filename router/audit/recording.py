"""Decisions as a file has them: what they were made from, what was chosen, and what became of it. Pure.

One line that says what it is, then frames: 4 bytes of length, little endian, and a message in msgpack. Engines are told
once, and of their numbers only what has changed since the decision before. Never text or token ids of prompts.
"""

import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, BinaryIO, Final

import msgspec
import numpy as np
import numpy.typing as npt

from vllm_llmd.errors import LlmdError
from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.hash_chain_cpu import piece_names, xxh64
from vllm_llmd.names import EngineId
from vllm_llmd.router.audit.decisions import Made, Outcome, Record
from vllm_llmd.router.candidates import Candidates, Loads, RateColumns, Roster
from vllm_llmd.router.request import Facts
from vllm_llmd.wire import EngineInfo

VERSION: Final = 1
_MAGIC: Final = b"vllm-llmd decisions "
HEAD: Final = _MAGIC + b"%d\n" % VERSION
HEAD_BYTES: Final = len(HEAD)
LENGTH: Final = struct.Struct("<I")
MOST_BYTES: Final = 64 << 20
"""No frame is longer: what says so is damaged."""

ROSTERS_KEPT: Final = 64

LOADS: Final = Loads.ROW.names or ()
RATES: Final = RateColumns.ROW.names or ()
COLUMNS: Final = (*(f"load.{name}" for name in LOADS), *(f"rate.{name}" for name in RATES))
"""What of an engine's load and speed is told, in this order, as float64."""

UNTOLD: Final = ("tokens", "seed", "text", "salt", "selector")
"""What of a request is private, or has had its effect: who is no candidate for its labels is not in the roster."""
FACTS: Final = tuple(each.name for each in fields(Facts) if each.name not in UNTOLD)
"""What is told of it: numbers, names, yes or no."""
SCALARS: Final = tuple(each.name for each in fields(Candidates) if each.type in (float, "float"))

PREFIXES: Final = ("prefix_blocks", "offloaded_blocks", "claimed_blocks", "coming")

Rows = npt.NDArray[np.float64]
"""Shape (engines, columns)."""


class RecordingError(LlmdError):
    """A file that is no recording, or none that can be read here."""


class _Message(msgspec.Struct, frozen=True, array_like=True, tag_field="kind"):
    pass


class Began(_Message, frozen=True, tag="began"):
    """A router began to record; nothing that was told before counts any more. `columns` are those of `Decided.rows`."""

    vllm_llmd: str
    policy: str
    min_remote_tokens: int
    at_s: float
    columns: tuple[str, ...] = COLUMNS


class Member(_Message, frozen=True, tag="member"):
    """An engine, without its addresses, which has this number from now on."""

    number: int
    info: EngineInfo
    stock: bool


class Listed(_Message, frozen=True, tag="roster"):
    """Candidates for a model, by their numbers as uint32, in the order of the columns."""

    number: int
    model: str | None
    members: bytes


class Decided(_Message, frozen=True, tag="decided"):
    """Of the candidates of `roster`, those at the places `cached_at` (uint32) have something cached: `cached` is int64,
    one row for each of `PREFIXES`. Those at `changed` (uint32) have other `rows` (float64) than they had before.

    `chunks` (uint64) name the text of the prompt, `chunk_bytes` of it each and all before. Choices are places; those at
    `saturated` (uint32) were not to be chosen while others had room.
    """

    id: str
    at_s: float
    roster: int
    facts: dict[str, Any]
    chunks: bytes
    chunk_bytes: int
    text_bytes: int
    cached_at: bytes
    cached: bytes
    changed: bytes
    rows: bytes
    scalars: dict[str, float]
    destination: int | None
    source: int | None
    until: int | None
    terms: dict[str, float]
    waited_ms: float
    decided_ms: float
    saturated: bytes = b""
    """Not told by routers of before; then nobody is taken to have been."""


class Ended(_Message, frozen=True, tag="ended"):
    id: str
    outcome: Outcome


class Lost(_Message, frozen=True, tag="lost"):
    """So many decisions are missing here."""

    decisions: int


Message = Began | Member | Listed | Decided | Ended | Lost

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def framed(message: Message) -> bytes:
    payload = _encoder.encode(message)
    return LENGTH.pack(len(payload)) + payload


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass
class _Known:
    """A roster that was told; it is kept here so that no other can have its identity."""

    roster: Roster
    number: int
    members: npt.NDArray[np.uint32]


class Writer:
    """Makes frames of decisions. `key` makes names of text useless to whoever would try texts out."""

    def __init__(self, began: Began, key: tuple[int, int]) -> None:
        self._began = began
        self._key = key
        self._forget()

    def begin(self) -> bytes:
        """Frames that stand before all others, and after frames that were lost."""
        self._forget()
        return framed(self._began)

    def _forget(self) -> None:
        self._members: dict[EngineId, tuple[EngineInfo, bool, int]] = {}
        self._rosters: OrderedDict[int, _Known] = OrderedDict()
        self._told = 0
        self._rows: Rows = np.full((64, len(COLUMNS)), np.nan)

    def decided(self, record: Record, made: Made) -> bytes:
        """Frames that tell a decision."""
        frames: list[bytes] = []
        candidates = made.candidates
        known = self._roster(candidates.roster, made.facts.model, frames)
        cached = np.stack([getattr(candidates, name) for name in PREFIXES]).astype(np.int64)
        cached_at = np.flatnonzero(cached.any(axis=0))
        rows = rows_of(candidates)
        changed = np.flatnonzero((rows.view(np.uint64) != self._rows[known.members].view(np.uint64)).any(axis=1))
        self._rows[known.members[changed]] = rows[changed]
        choice = None if made.decision is None else made.decision.choice
        frames.append(
            framed(
                Decided(
                    id=record.id,
                    at_s=record.at_s,
                    roster=known.number,
                    facts={name: getattr(made.facts, name) for name in FACTS},
                    chunks=self._masked(names_of(made)).tobytes(),
                    chunk_bytes=made.chunks.chunk_bytes,
                    text_bytes=len(made.facts.text),
                    cached_at=cached_at.astype(np.uint32).tobytes(),
                    cached=cached[:, cached_at].tobytes(),
                    changed=changed.astype(np.uint32).tobytes(),
                    rows=rows[changed].tobytes(),
                    scalars={name: float(getattr(candidates, name)) for name in SCALARS},
                    destination=None if choice is None else choice.destination,
                    source=None if choice is None else choice.source,
                    until=None if choice is None else choice.until,
                    terms=record.terms,
                    waited_ms=record.waited_ms,
                    decided_ms=record.decided_ms,
                    saturated=np.array(made.saturated, np.uint32).tobytes(),
                )
            )
        )
        return b"".join(frames)

    def _roster(self, roster: Roster, model: str | None, frames: list[bytes]) -> _Known:
        known = self._rosters.get(id(roster))
        if known is not None:
            self._rosters.move_to_end(id(roster))
            return known
        members = [self._member(engine.info, engine.stock is not None, frames) for engine in roster.engines]
        self._told += 1
        known = self._rosters[id(roster)] = _Known(roster, self._told, np.array(members, np.uint32))
        if len(self._rosters) > ROSTERS_KEPT:
            self._rosters.popitem(last=False)
        frames.append(framed(Listed(known.number, model, known.members.tobytes())))
        return known

    def _member(self, info: EngineInfo, stock: bool, frames: list[bytes]) -> int:
        known = self._members.get(info.id)
        if known is not None and known[0] is info and known[1] is stock:
            return known[2]
        self._told += 1
        number = self._told
        self._members[info.id] = info, stock, number
        if number >= len(self._rows):
            self._rows = np.vstack([self._rows, np.full((number, len(COLUMNS)), np.nan)])
        frames.append(framed(Member(number, msgspec.structs.replace(info, http="", workers=[]), stock)))
        return number

    def _masked(self, hashes: Names) -> Names:
        """Other names, as different as the ones before."""
        first, second = (np.uint64(each) for each in self._key)
        mixed = (hashes ^ first) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(32)) ^ second) * np.uint64(0xD6E8FEB86659FD93)
        found: Names = mixed ^ (mixed >> np.uint64(29))
        return found


def names_of(made: Made) -> Names:
    """Of the prompt's beginnings, token ids being text of 4 bytes each: routing has no need to name those."""
    if len(made.chunks.hashes) or not made.facts.text:
        return made.chunks.hashes
    return piece_names(made.facts.text, made.chunks.chunk_bytes, xxh64(made.facts.seed, 0))


def rows_of(candidates: Candidates) -> Rows:
    """What of each engine's load and speed is told."""
    loads = candidates.loads.rows.view(np.float64).reshape(-1, len(LOADS))
    rates = candidates.rates.rows.view(np.float64).reshape(-1, len(RATES))
    return np.concatenate([loads, rates], axis=1)


# --- reading ----------------------------------------------------------------------------------------------------------


def check_head(head: bytes, name: str) -> None:
    """Raises RecordingError unless a file that begins so is a recording that can be read here."""
    if not head.startswith(_MAGIC):
        raise RecordingError(f"{name} is no recording of decisions: give a file of `router --record-decisions`")
    version = head[len(_MAGIC) :].partition(b"\n")[0].decode("ascii", "replace")
    if version != str(VERSION):
        raise RecordingError(
            f"{name} is a recording of version {version[:20]}, and this is version {VERSION}: use the vllm-llmd that "
            "has written it, or record to another file"
        )


class Reader:
    """The messages of a recording. Afterwards, `end` is where the last whole frame ends.

    `cut_bytes` come after it, of a frame that is not whole: the router was killed, or still writes. Frames that make no
    sense are `damaged`, those of kinds that a later release has added `unknown`.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        """Raises RecordingError."""
        self._stream = stream
        check_head(stream.read(HEAD_BYTES), name)
        self.end = HEAD_BYTES
        self.cut_bytes = 0
        self.damaged = 0
        self.unknown = 0

    def __iter__(self) -> Iterator[Message]:
        for payload in self._payloads():
            try:
                yield _decoder.decode(payload)
            except msgspec.ValidationError:
                self.unknown += 1
            except (msgspec.DecodeError, ValueError, RecursionError):
                self.damaged += 1

    def skim(self) -> None:
        """Only looks where frames end."""
        for _ in self._payloads():
            pass

    def _payloads(self) -> Iterator[bytes]:
        while length := self._stream.read(LENGTH.size):
            if len(length) < LENGTH.size:
                self.cut_bytes = len(length)
                return
            [size] = LENGTH.unpack(length)
            if size > MOST_BYTES:
                self.damaged += 1
                return
            payload = self._stream.read(size)
            if len(payload) < size:
                self.cut_bytes = LENGTH.size + len(payload)
                return
            self.end += LENGTH.size + size
            yield payload
