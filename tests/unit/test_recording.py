"""Decisions written to a file and read again: nothing is lost but what is said to be, and no prompt is in it."""

import errno
import io
import logging
import os
import random
import resource
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.errors import ConfigError
from vllm_llmd.names import EngineId, Epoch, Role
from vllm_llmd.router import policies
from vllm_llmd.router.audit import recording
from vllm_llmd.router.audit.decisions import Decisions, Made, Outcome
from vllm_llmd.router.audit.recorded import Event, Recorded, Restorer
from vllm_llmd.router.audit.recorder import Recorder, RecordFile
from vllm_llmd.router.audit.recording import LENGTH, Began, Ended, Lost, Reader, RecordingError, Writer, framed
from vllm_llmd.router.candidates import Candidates, Loads, RateColumns, Roster
from vllm_llmd.router.decide import decide
from vllm_llmd.router.index.texts import cut
from vllm_llmd.router.members.membership import Engine, State, Stock
from vllm_llmd.router.members.rates import Rates, packed
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.request import Facts
from vllm_llmd.wire import EngineInfo, Load

BEGAN = Began("0", "cost", 256, 1.0)
KEY = (1, 2)
SECRET = b"the text of a prompt that is nobody's business " * 40


def engine(name: str, role: Role = "both", stock: bool = False) -> Engine:
    info = EngineInfo(EngineId(name), Epoch(1), role, f"http://{name}", ["m"], 16, 1000, 10_000, "f", ["tcp://w"])
    return Engine(info, State.READY, 0, stock=Stock(None) if stock else None)


def busy(engine: Engine, running: int, token_ms: float = 0.1) -> None:
    engine.reported(Load(running=running, free_blocks=900, prefill_tokens=running * 10, step_ms=0.1 * running), 0, 7)
    engine.rates = packed(Rates(token_ms=token_ms))


def made(number: int, roster: Roster, prefix: Sequence[int] = (), facts: Facts | None = None) -> Made:
    facts = facts or Facts("m", None, b"seed", SECRET, 900, "salt", output_tokens=5)
    blocks = np.array([*prefix, *[0] * (len(roster.engines) - len(prefix))], np.int64)
    columns = Loads.of(roster.engines), RateColumns.of(roster.engines)
    candidates = Candidates(roster, blocks, blocks // 2, blocks + (blocks > 0), *columns, output_tokens=33.0, reuse=0.5)
    decision = decide(facts, candidates, policies.make("cost", PolicySettings(256, random.Random(number))))
    saturated = tuple(range(number % 2, len(roster.engines), 2))
    return Made(f"r-{number}", 1, facts, cut(facts, 256), candidates, decision, 0.5, 0.25, saturated)


def written(*every: Made, writer: Writer | None = None) -> bytes:
    writer = writer or Writer(BEGAN, KEY)
    ring = Decisions("cost", 10, 1 << 20, lambda: 5.0)
    return recording.HEAD + writer.begin() + b"".join(writer.decided(ring.made(each), each) for each in every)


def read(content: bytes) -> list[Event]:
    return list(Restorer().events(Reader(io.BytesIO(content), "file")))


def decisions_in(content: bytes) -> list[Recorded]:
    return [event for event in read(content) if isinstance(event, Recorded)]


def assert_same(found: Recorded, one: Made) -> None:
    """Bit by bit: so every field and column of candidates must be recorded."""
    for field in fields(Candidates):
        mine, theirs = getattr(one.candidates, field.name), getattr(found.candidates, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.tolist() == theirs.tolist(), field.name
        elif isinstance(mine, float):
            assert mine == theirs, field.name
    assert [each.row for each in found.candidates.roster.engines] == [
        each.row for each in one.candidates.roster.engines
    ]
    assert recording.rows_of(found.candidates).tobytes() == recording.rows_of(one.candidates).tobytes()
    for name in ("decoders", "prefillers", "kinds", "block_sizes", "num_blocks", "helped"):
        assert getattr(found.candidates.roster, name).tolist() == getattr(one.candidates.roster, name).tolist()
    choice = None if one.decision is None else one.decision.choice
    assert found.destination == (None if choice is None else choice.destination)
    assert found.source == (None if choice is None else choice.source)
    for name in recording.FACTS:
        assert getattr(found.facts, name) == getattr(one.facts, name), name
    assert len(found.facts.text) == len(one.facts.text)
    assert found.saturated == {one.candidates.roster.id(place) for place in one.saturated}


# --- round trips ------------------------------------------------------------------------------------------------------


def test_every_fact_that_is_recorded_is_a_number_a_name_or_yes_or_no() -> None:
    """A new field of facts must be, or be left out on purpose."""
    types = {each.name: set(get_args(each.type)) or {each.type} for each in fields(Facts)}
    assert [name for name in recording.FACTS if not types[name] <= {int, float, str, bool, type(None)}] == []


def test_a_decision_comes_back_as_it_was() -> None:
    engines = [engine("p", "prefill"), engine("d", "decode"), engine("s", stock=True)]
    for number, each in enumerate(engines):
        busy(each, number * 3, 0.1 / (number + 1))
    one = made(1, Roster.of(engines, "m"), [3, 0, 5])
    [found] = decisions_in(written(one))
    assert_same(found, one)
    assert [each.stock is not None for each in found.candidates.roster.engines] == [False, False, True]


loads = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 500), st.floats(0.001, 9)), max_size=4)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sets(st.integers(0, 4)), loads, st.lists(st.integers(0, 50), max_size=5)), max_size=12))
def test_any_sequence_of_decisions_comes_back(
    steps: list[tuple[set[int], list[tuple[int, int, float]], list[int]]],
) -> None:
    """Fleets change, loads change, and what has not changed since the decision before is not told again."""
    engines, rosters, every = [engine(f"e{number}") for number in range(5)], {}, []
    writer, ring = Writer(BEGAN, KEY), Decisions("cost", 10, 1 << 20, lambda: 5.0)
    content = recording.HEAD + writer.begin()
    for number, (members, changes, prefix) in enumerate(steps):
        for at, running, token_ms in changes:
            busy(engines[at], running, token_ms)
        key = frozenset(members)
        roster = rosters.setdefault(key, Roster.of([engines[at] for at in sorted(members)], "m"))
        one = made(number, roster, prefix[: len(members)])
        content += writer.decided(ring.made(one), one)
        rows = [each.row for each in one.candidates.roster.engines]
        every.append((one, rows))
    found = Restorer().events(Reader(io.BytesIO(content), "file"))
    assert isinstance(next(found), Began)
    for one, rows in every:
        again = next(found)
        assert isinstance(again, Recorded)
        for each, row in zip(one.candidates.roster.engines, rows, strict=True):
            each.row = row
        assert_same(again, one)
    assert next(found, None) is None


def test_what_has_not_changed_is_not_told_again() -> None:
    engines = [engine(f"e{number}") for number in range(200)]
    roster = Roster.of(engines, "m")
    writer, ring = Writer(BEGAN, KEY), Decisions("cost", 10, 1 << 20, lambda: 5.0)
    sizes = []
    for number in range(3):
        busy(engines[7], number)
        one = made(number, roster)
        sizes.append(len(writer.decided(ring.made(one), one)))
    assert max(sizes[1:]) < sizes[0] / 20


def test_no_prompt_and_no_address_is_in_a_recording() -> None:
    tokens = array("I", range(70_000, 70_900))
    asked = [
        Facts("m", None, b"seed of it", SECRET, 900, "salty"),
        Facts("m", tokens, b"", tokens.tobytes(), 900, None),
    ]
    roster = Roster.of([engine("a")], "m")
    content = written(*(made(number, roster, facts=facts) for number, facts in enumerate(asked)))
    for private in (SECRET[:20], b"seed of it", b"salty", tokens[:4].tobytes(), b"http://a", b"tcp://w"):
        assert private not in content
    named = cut(asked[0], 256).hashes
    assert not any(name.tobytes() in content for name in named)


@pytest.mark.parametrize("as_tokens", [False, True], ids=["text", "tokens"])
def test_prompts_that_begin_alike_do_so_in_a_recording(as_tokens: bool) -> None:
    roster = Roster.of([engine("a")], "m")
    texts = [SECRET, SECRET[:1024] + b"x" * 900, b"yyyy" + SECRET]
    asked = [Facts("m", array("I", text) if as_tokens else None, b"", text, 9, None) for text in texts]
    content = written(*(made(at, roster, facts=facts) for at, facts in enumerate(asked)))
    first, second, third = (found.facts.text for found in decisions_in(content))
    assert first[:1024] == second[:1024] and first[1024:1280] != second[1024:1280] and first[:256] != third[:256]
    assert [len(first), len(second), len(third)] == [len(text) for text in texts]


def test_a_request_that_nobody_could_take_is_recorded() -> None:
    [found] = decisions_in(written(made(1, Roster.of([], "m"))))
    assert found.destination is None and len(found.candidates) == 0


# --- files that are not as they should be -----------------------------------------------------------------------------


WHOLE = written(*(made(number, Roster.of([engine("a"), engine("b")], "m")) for number in range(3)))


@given(st.integers(recording.HEAD_BYTES, len(WHOLE) - 1))
def test_a_file_that_is_cut_loses_no_whole_record(size: int) -> None:
    reader = Reader(io.BytesIO(WHOLE[:size]), "file")
    messages = list(reader)
    assert reader.end + reader.cut_bytes == size and not reader.damaged
    whole = Reader(io.BytesIO(WHOLE), "file")
    for message, expected in zip(messages, whole, strict=False):
        assert message == expected
    following = next(iter(Reader(io.BytesIO(recording.HEAD + WHOLE[reader.end :]), "file")))
    assert following not in messages


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 whatever", b"vllm-llmd", b"{}\n" * 20])
def test_another_file_is_an_error_that_says_what_to_give(content: bytes) -> None:
    with pytest.raises(RecordingError, match=r"x\.bin is no recording of decisions: give"):
        Reader(io.BytesIO(content), "x.bin")


@pytest.mark.parametrize("version", [b"2\n", b"17\n", b"\n"])
def test_another_version_is_an_error_that_names_both(version: bytes) -> None:
    with pytest.raises(RecordingError, match=r"recording of version .* this is version 1"):
        Reader(io.BytesIO(b"vllm-llmd decisions " + version + b"\x00" * 40), "x.bin")


def test_a_message_of_a_later_release_is_passed_over() -> None:
    later = msgspec.msgpack.encode(["weather", 1, 2])
    content = written() + LENGTH.pack(len(later)) + later + WHOLE[recording.HEAD_BYTES :]
    reader = Reader(io.BytesIO(content), "file")
    assert len([each for each in Restorer().events(reader) if isinstance(each, Recorded)]) == 3
    assert reader.unknown == 1


@given(st.integers(recording.HEAD_BYTES, len(WHOLE) - 1), st.integers(0, 255))
def test_a_damaged_file_is_read_as_far_as_possible_and_never_raises(at: int, byte: int) -> None:
    content = bytearray(WHOLE)
    content[at] = byte
    assert len(decisions_in(bytes(content))) <= 3


@given(st.binary(max_size=400))
def test_rubbish_after_the_head_never_raises(rubbish: bytes) -> None:
    read(recording.HEAD + rubbish)


# --- the file of a router ---------------------------------------------------------------------------------------------


class Counts:
    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        self.value += amount


def record(path: Path, *every: Made, file: RecordFile | None = None) -> tuple[float, float]:
    """How many were recorded, and lost."""
    recorded, lost = Counts(), Counts()
    recorder = Recorder(file or RecordFile(path), Writer(BEGAN, KEY), recorded, lost)
    ring = Decisions("cost", 10, 1 << 20, lambda: 5.0, recorder)
    recorder.start()
    for each in every:
        ring.ended(ring.made(each), Outcome(status=200, first_byte_ms=3.5))
    recorder.close()
    return recorded.value, lost.value


@pytest.fixture
def some() -> list[Made]:
    roster = Roster.of([engine("a"), engine("b")], "m")
    return [made(number, roster, [number]) for number in range(100)]


def test_decisions_and_outcomes_are_in_the_file_when_the_router_has_stopped(tmp_path: Path, some: list[Made]) -> None:
    path = tmp_path / "decisions"
    assert record(path, *some) == (100, 0)
    events = read(path.read_bytes())
    assert [each.id for each in events if isinstance(each, Recorded)] == [each.id for each in some]
    outcomes = {each.id: each.outcome for each in events if isinstance(each, Ended)}
    assert outcomes == {each.id: Outcome(status=200, first_byte_ms=3.5) for each in some}
    assert path.stat().st_mode & 0o077 == 0


def test_a_second_router_goes_on_with_the_file_of_the_first(tmp_path: Path, some: list[Made]) -> None:
    path = tmp_path / "decisions"
    record(path, *some[:3])
    with path.open("ab") as file:
        file.write(b"\x50\x00\x00\x00 killed in the middle")
    record(path, *some[3:5])
    assert [each.id for each in decisions_in(path.read_bytes())] == [each.id for each in some[:5]]


@pytest.mark.parametrize(
    ("content", "said"), [(b"a letter to a friend\n", "no recording"), (b"vllm-llmd decisions 9\n...", "version 9")]
)
def test_a_file_of_another_kind_stops_the_router_and_stays_as_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"record_decisions: .*{said}"):
        RecordFile(path)
    assert path.read_bytes() == content


def test_a_damaged_file_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(WHOLE + b"\xff" * 50)
    with pytest.raises(ConfigError, match=f"damaged at byte {len(WHOLE)}"):
        RecordFile(path)
    assert path.stat().st_size == len(WHOLE) + 50


def test_where_there_can_be_no_file_the_router_does_not_start(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "such" / "folder", tmp_path, Path("/dev/full")):
        with pytest.raises(ConfigError, match="record_decisions: "):
            RecordFile(path)


def test_two_routers_cannot_write_to_one_file(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "file")
    with pytest.raises(ConfigError, match="another router writes to"):
        RecordFile(tmp_path / "file")
    file.close()
    RecordFile(tmp_path / "file").close()


@pytest.fixture
def room() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("room")
def test_what_finds_no_room_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    file = RecordFile(path)
    file.append(framed(BEGAN))
    size, limits = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            file.append(framed(BEGAN))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.append(framed(Lost(7)))
    assert list(Reader(io.BytesIO(path.read_bytes()), "file")) == [BEGAN, Lost(7)]


class FullFor:
    """A file that takes nothing the first `failures` times."""

    def __init__(self, file: RecordFile, failures: int) -> None:
        self._file = file
        self._failures = failures

    def append(self, content: bytes) -> None:
        if self._failures > 0:
            self._failures -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._file.append(content)

    def close(self) -> None:
        self._file.close()


def test_a_full_disk_loses_decisions_that_are_counted_and_no_others(
    tmp_path: Path, some: list[Made], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file"
    with caplog.at_level(logging.WARNING):
        recorded, lost = record(path, *some, file=FullFor(RecordFile(path), 2))  # type: ignore[arg-type]
    events = read(path.read_bytes())
    found = [each for each in events if isinstance(each, Recorded)]
    assert recorded + lost == 100 and recorded == len(found) and lost > 0
    assert sum(each.decisions for each in events if isinstance(each, Lost)) == lost
    for again, one in zip(found, some[int(lost) :], strict=True):
        assert again.id == one.id
        assert_same(again, one)
    assert [message.split(",")[0] for message in caplog.messages] == [
        "decisions cannot be recorded",
        "decisions are recorded again",
    ]


def test_a_disk_that_hangs_does_not_fill_the_memory(
    tmp_path: Path, some: list[Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_llmd.router.audit.recorder.MOST_BYTES", 20_000)
    recorded, lost = Counts(), Counts()
    recorder = Recorder(RecordFile(tmp_path / "file"), Writer(BEGAN, KEY), recorded, lost)
    ring = Decisions("cost", 10, 1 << 20, lambda: 5.0, recorder)
    for each in some:
        ring.made(each)
    recorder.start()
    recorder.close()
    events = read((tmp_path / "file").read_bytes())
    assert 0 < recorded.value < 20 and recorded.value + lost.value == 100
    assert sum(each.decisions for each in events if isinstance(each, Lost)) == lost.value
