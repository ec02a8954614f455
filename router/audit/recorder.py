"""Appends decisions to a file, in a thread of its own, so that no request waits for a disk.

What the thread cannot keep up with, and what the file does not take, is lost: counted and logged, never waited for.
"""

import fcntl
import logging
import os
import secrets
import stat
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from vllm_llmd.errors import ConfigError
from vllm_llmd.router.audit.decisions import Made, Record
from vllm_llmd.router.audit.recording import HEAD, Began, Ended, Lost, Reader, RecordingError, Writer, framed

log = logging.getLogger(__name__)

EVERY_S: Final = 0.05
"""How often what has come is written."""
BATCH: Final = 8
"""Decisions that are made frames of at a time: between batches the event loop has its turn."""
MOST_BYTES: Final = 64 << 20
"""Memory that what is not written yet may take."""
ENGINE_BYTES: Final = 180
"""What a candidate takes of it."""
MOST_CUT: Final = 16 << 20
"""What is not whole at the end of a file is shorter, unless the file is damaged."""
STOP_S: Final = 5.0


class Tally(Protocol):
    """Counts up."""

    def inc(self, amount: float = 1) -> None: ...


class RecordFile:
    """One file that this process alone appends to; every append is there as a whole or not at all."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError. What an earlier router has left unfinished at the end is cut off."""
        self._is_torn = False
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"record_decisions: {path} cannot be written ({error.strerror})") from None
        try:
            self._size = self._prepare(path)
        except OSError as error:
            os.close(self._file)
            raise ConfigError(f"record_decisions: {path} cannot be written ({error.strerror})") from None
        except (ConfigError, RecordingError) as error:
            os.close(self._file)
            raise ConfigError(f"record_decisions: {error}") from None

    def _prepare(self, path: Path) -> int:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise ConfigError(f"{path} must be a file")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another router writes to {path}: give each a file of its own") from None
        if os.fstat(self._file).st_size == 0:
            os.write(self._file, HEAD)
            return len(HEAD)
        with path.open("rb") as stream:
            reader = Reader(stream, str(path))
            reader.skim()
        if reader.damaged or reader.cut_bytes > MOST_CUT:
            raise ConfigError(f"{path} is damaged at byte {reader.end}: record to another file")
        if reader.cut_bytes:
            log.warning("%s: %d bytes of an unfinished record at its end are cut off", path, reader.cut_bytes)
            os.ftruncate(self._file, reader.end)
        return reader.end

    def append(self, content: bytes) -> None:
        """Raises OSError if there is no room, or the disk fails; then nothing of it is there."""
        if self._is_torn:
            os.ftruncate(self._file, self._size)
        self._is_torn, rest = True, memoryview(content)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._is_torn = False
        self._size += len(content)

    def close(self) -> None:
        os.close(self._file)


class Recorder:
    """A `decisions.Sink`. `decided`, `ended` and `close` are called by one thread."""

    def __init__(self, file: RecordFile, writer: Writer, recorded: Tally, lost: Tally) -> None:
        self._file = file
        self._writer = writer
        self._recorded = recorded
        self._lost = lost
        self._queue: deque[tuple[Record, Made | None]] = deque()
        self._bytes_in = 0
        self._bytes_out = 0
        """Of these each is written by one thread; what lies between is in the queue."""
        self._dropped = 0
        self._telling = self._dropped_told = 0
        """Of what was dropped, what the file is being told, and what it has been told."""
        self._missing = 0
        self._is_failing = False
        self._has_begun = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decisions", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def decided(self, record: Record, made: Made) -> None:
        if not self._put(record, made):
            if self._dropped == 0:
                log.error("decisions come faster than they can be recorded: some are lost")
            self._dropped += 1
            self._lost.inc()

    def ended(self, record: Record) -> None:
        self._put(record, None)

    def close(self) -> None:
        """Writes what is left, for a few seconds at most."""
        self._stop.set()
        self._thread.join(STOP_S)
        if not self._thread.is_alive():
            self._file.close()

    def _put(self, record: Record, made: Made | None) -> bool:
        size = _size(made)
        if self._bytes_in - self._bytes_out + size > MOST_BYTES:
            return False
        self._bytes_in += size
        self._queue.append((record, made))
        return True

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self._write_all()
        self._write_all()

    def _write_all(self) -> None:
        while batch := [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]:
            decisions = sum(made is not None for _, made in batch)
            try:
                self._file.append(b"".join(self._frames(batch)))
            except OSError as error:
                self._failed(decisions, error.strerror)
            except Exception:  # whatever it is, the router goes on without
                log.exception("decisions cannot be put into frames")
                self._failed(decisions, "see above")
            else:
                self._succeeded(decisions)
            self._bytes_out += sum(_size(made) for _, made in batch)
            time.sleep(0)

    def _frames(self, batch: list[tuple[Record, Made | None]]) -> Iterator[bytes]:
        if not self._has_begun:
            yield self._writer.begin()
        self._telling = dropped = self._dropped
        if self._missing or dropped != self._dropped_told:
            yield framed(Lost(self._missing + dropped - self._dropped_told))
        for record, made in batch:
            if made is not None:
                yield self._writer.decided(record, made)
            elif record.outcome is not None:
                yield framed(Ended(record.id, record.outcome))

    def _failed(self, decisions: int, why: str | None) -> None:
        """What the frames have told is not there: everything has to be told again."""
        self._has_begun = False
        self._missing += decisions
        self._lost.inc(decisions)
        if not self._is_failing:
            log.error("decisions cannot be recorded, and are lost (%s)", why)
        self._is_failing = True

    def _succeeded(self, decisions: int) -> None:
        self._has_begun, self._missing, self._dropped_told = True, 0, self._telling
        self._recorded.inc(decisions)
        if self._is_failing:
            log.warning("decisions are recorded again")
        self._is_failing = False


def recorder(path: str, began: Began, recorded: Tally, lost: Tally) -> Recorder:
    """One that has begun to run. Raises ConfigError if the file cannot be appended to."""
    key = secrets.randbits(64), secrets.randbits(64)
    made = Recorder(RecordFile(Path(path)), Writer(began, key), recorded, lost)
    made.start()
    return made


def _size(made: Made | None) -> int:
    """Memory that it takes while it is not written."""
    return 1024 if made is None else 1024 + ENGINE_BYTES * len(made.candidates) + len(made.facts.text)
