"""Every read of one rank that is under way. Used by the I/O thread alone; decides nothing about orders.

A range is one read straight into place, and any number into slots of the staging area, from where they are put into
place. It has ended when all of these have.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_llmd.errors import TransferError
from vllm_llmd.kv_connector.bridge import ReadWork, Staged, merge
from vllm_llmd.kv_connector.exchange import ReadFrom
from vllm_llmd.kv_connector.layout import Runs
from vllm_llmd.kv_connector.staging import ALIGNMENT, SLOT_BYTES, SLOTS, Placement, Staging
from vllm_llmd.kv_connector.transport import PeerName, ReadId, ReadPlan, ReadState, Transport
from vllm_llmd.wire import Regions

SLOTS_PER_PEER = SLOTS // 2
"""A peer that stalls may keep its slots for long: others go on with the rest."""


@dataclass(frozen=True)
class Ended:
    """A range's read has ended; `bytes` of KV are in place if it is `ok`. `read_ms` is when the last byte came."""

    act: ReadFrom
    ok: bool
    bytes: int
    started_ms: float
    read_ms: float


@dataclass(frozen=True)
class Batch:
    """What one slot takes: the source's runs, where they go in the slot, and how they are placed from there."""

    remote: Runs
    offsets: npt.NDArray[np.uint64]
    placements: tuple[Placement, ...]


@dataclass(eq=False)
class _Range:
    act: ReadFrom
    peer: PeerName
    memory: str
    bytes: int
    started_ms: float
    read_ms: float
    batches: deque[Batch]
    running: int = 0
    failed: bool = False

    @property
    def over(self) -> bool:
        return not self.running and not self.batches


@dataclass
class _Slot:
    range: _Range
    batch: Batch
    placed: Callable[[], bool] | None = field(default=None)


class Reads:
    """`start` a range's read, then `poll` until it is among those that have ended."""

    def __init__(self, transport: Transport, regions: Regions, new_staging: Callable[[], Staging]) -> None:
        """`new_staging` is called when staging is needed for the first time."""
        self._transport = transport
        self._regions = regions
        self._new_staging = new_staging
        self._staging: Staging | None = None
        self._direct: dict[ReadId, _Range] = {}
        self._into_slots: dict[ReadId, int] = {}
        self._slots: dict[int, _Slot] = {}
        self._waiting: deque[_Range] = deque()
        self._unstarted: list[_Range] = []

    @property
    def active(self) -> bool:
        return bool(self._direct or self._slots or self._waiting or self._unstarted)

    @property
    def peers(self) -> set[PeerName]:
        """Whom anything is being read from."""
        entries = [*self._direct.values(), *(slot.range for slot in self._slots.values()), *self._waiting]
        return {entry.peer for entry in entries}

    def start(self, act: ReadFrom, peer: PeerName, memory: str, work: ReadWork, now_ms: float) -> None:
        """Begin to read `work` from a peer whose cache is in `memory`. Raises TransferError if it cannot begin."""
        if not len(work.local) and not work.staged:
            raise TransferError(f"order {act.read.order}: this rank has nothing that range {act.read.seq} could go to")
        entry = _Range(act, peer, memory, work.bytes, now_ms, now_ms, deque(batches(work.staged)))
        if entry.batches and self._staging is None:
            self._staging = self._make_staging()
        if len(work.local):
            read = self._transport.start_read(ReadPlan(peer, work.local, work.remote, self._regions.memory, memory))
            self._direct[read] = entry
            entry.running += 1
        if entry.batches:
            self._waiting.append(entry)
            self._fill_slots()

    def _make_staging(self) -> Staging:
        try:
            staging = self._new_staging()
        except (MemoryError, RuntimeError) as error:  # torch's own error of a full device is a RuntimeError
            raise TransferError(f"no memory for a staging area of {SLOTS * SLOT_BYTES} bytes: {error}") from error
        self._transport.register(self._regions, [(staging.address, SLOTS * SLOT_BYTES)])
        return staging

    def poll(self, now_ms: float) -> list[Ended]:
        """The ranges whose reads have ended by now."""
        touched: list[_Range] = []
        for read, entry in list(self._direct.items()):
            state = self._transport.poll(read)
            if state is not ReadState.RUNNING:
                del self._direct[read]
                self._note(entry, state, now_ms)
                touched.append(entry)
        for read, slot in list(self._into_slots.items()):
            state = self._transport.poll(read)
            if state is not ReadState.RUNNING:
                del self._into_slots[read]
                self._read_into(slot, state, now_ms)
        touched += self._free_slots()
        self._fill_slots()
        touched += self._unstarted
        self._unstarted = []
        return [_ended(entry) for entry in dict.fromkeys(touched) if entry.over]

    def _note(self, entry: _Range, state: ReadState, now_ms: float) -> None:
        entry.running -= 1
        entry.read_ms = now_ms
        if state is ReadState.FAILED:
            entry.failed = True
            entry.batches.clear()

    def _read_into(self, number: int, state: ReadState, now_ms: float) -> None:
        """A slot has been read into: put what it holds into place."""
        slot = self._slots[number]
        self._note(slot.range, state, now_ms)
        slot.range.running += 1
        assert self._staging is not None
        slot.placed = (
            (lambda: True) if state is ReadState.FAILED else self._staging.place(number, slot.batch.placements)
        )

    def _free_slots(self) -> list[_Range]:
        freed = []
        for number, slot in list(self._slots.items()):
            if slot.placed is not None and slot.placed():
                del self._slots[number]
                slot.range.running -= 1
                freed.append(slot.range)
        return freed

    def _fill_slots(self) -> None:
        """Start reads into the slots that are free."""
        while len(self._slots) < SLOTS and (entry := self._next_in_line()) is not None:
            number = next(n for n in range(SLOTS) if n not in self._slots)
            batch = entry.batches.popleft()
            try:
                read = self._transport.start_read(self._plan(entry, number, batch))
            except TransferError:
                entry.failed = True
                entry.batches.clear()
                self._unstarted.append(entry)
                continue
            self._slots[number] = _Slot(entry, batch)
            self._into_slots[read] = number
            entry.running += 1

    def _next_in_line(self) -> _Range | None:
        """A range with batches left, of a peer that has not its share of the slots; it goes to the end of the line."""
        self._waiting = deque(entry for entry in self._waiting if entry.batches)
        taken = Counter(slot.range.peer for slot in self._slots.values())
        entry = next((entry for entry in self._waiting if taken[entry.peer] < SLOTS_PER_PEER), None)
        if entry is not None:
            self._waiting.remove(entry)
            self._waiting.append(entry)
        return entry

    def _plan(self, entry: _Range, number: int, batch: Batch) -> ReadPlan:
        assert self._staging is not None
        local = batch.remote.copy()
        local[:, 0] = np.uint64(self._staging.address + number * SLOT_BYTES) + batch.offsets
        local[:, 2] = self._regions.device_id
        return ReadPlan(entry.peer, *merge(local, batch.remote), self._regions.memory, entry.memory)


def batches(staged: Sequence[Staged]) -> list[Batch]:
    """Deal pieces out to as few slots as can be, each piece aligned. Raises TransferError for one that fits in none."""
    found: list[Batch] = []
    rows: list[Runs] = []
    offsets: list[npt.NDArray[np.uint64]] = []
    placements: list[Placement] = []
    used = 0
    for piece in staged:
        spaced = -(-piece.piece_bytes // ALIGNMENT) * ALIGNMENT
        if spaced > SLOT_BYTES:
            raise TransferError(f"{piece.piece_bytes} bytes of a KV block do not fit into a slot of {SLOT_BYTES}")
        begin = 0
        while begin < len(piece.local):
            count = min((SLOT_BYTES - used) // spaced, len(piece.local) - begin)
            if not count:
                found.append(_batch(rows, offsets, placements))
                rows, offsets, placements, used = [], [], [], 0
                continue
            at = used + spaced * np.arange(count, dtype=np.int64)
            part = slice(begin, begin + count)
            rows.append(_piece_rows(piece, part))
            offsets.append(at.astype(np.uint64))
            placements.append(Placement(at, piece.local[part], piece.grid))
            used += count * spaced
            begin += count
    return [*found, _batch(rows, offsets, placements)] if rows else found


def _ended(entry: _Range) -> Ended:
    return Ended(entry.act, not entry.failed, entry.bytes, entry.started_ms, entry.read_ms)


def _piece_rows(piece: Staged, part: slice) -> Runs:
    rows = np.empty((len(piece.remote[part]), 3), dtype=np.uint64)
    rows[:, 0], rows[:, 1], rows[:, 2] = piece.remote[part], piece.piece_bytes, piece.device_id
    return rows


def _batch(rows: list[Runs], offsets: list[npt.NDArray[np.uint64]], placements: list[Placement]) -> Batch:
    return Batch(np.concatenate(rows), np.concatenate(offsets), tuple(placements))
