"""Recorded decisions put to other policies."""

import argparse
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.cli import run as run_command
from vllm_llmd.errors import ConfigError
from vllm_llmd.names import EngineId, Epoch, Role
from vllm_llmd.router import policies
from vllm_llmd.router.audit import replay_command
from vllm_llmd.router.audit.decisions import Decisions, Made, Outcome, Record
from vllm_llmd.router.audit.recording import HEAD, LENGTH, Began, Ended, Lost, Reader, RecordingError, Writer, framed
from vllm_llmd.router.audit.replay import Prices, Report, ttft_error
from vllm_llmd.router.candidates import Candidates, Loads, RateColumns, Roster
from vllm_llmd.router.decide import decision_of, placed
from vllm_llmd.router.index.texts import cut
from vllm_llmd.router.members.membership import Engine, State
from vllm_llmd.router.placement.plans import UNTIL_FIRST_BYTE
from vllm_llmd.router.placement.prospects import prospect
from vllm_llmd.router.policy import Choice, Policy, PolicySettings
from vllm_llmd.router.request import Facts
from vllm_llmd.wire import EngineInfo, Load

SEED = 3


def engine(name: str, role: Role = "both") -> Engine:
    info = EngineInfo(EngineId(name), Epoch(1), role, "", ["m"], 16, 1000, 10_000, "f", [])
    return Engine(info, State.READY, 0)


class Run:
    """A router that records: `decide` as often as wanted."""

    def __init__(self, policy: str, roles: Sequence[Role] = ("both",) * 4) -> None:
        self.engines = [engine(f"e{number}", role) for number, role in enumerate(roles)]
        self.policy: Policy = policies.make(policy, PolicySettings(256, random.Random(f"{policy} {SEED}")))
        self.began = Began("0", policy, 256, 1.0)
        self.writer, self.chance = Writer(self.began, (5, 6)), random.Random(7)
        self.ring = Decisions(policy, 10, 1 << 20, lambda: 5.0)
        self.content = HEAD + self.writer.begin()
        self.made: list[Made] = []
        self.roster = Roster.of(self.engines, "m")

    def decide(self, first_byte_ms: float | None = None, saturated: tuple[int, ...] = ()) -> Record:
        for each in self.engines:
            running, tokens = self.chance.randrange(9), self.chance.randrange(4000)
            each.reported(Load(running=running, prefill_tokens=tokens, free_blocks=900), 0, 50)
        text = bytes([self.chance.randrange(3)]) * self.chance.randrange(300, 20_000)
        facts = Facts("m", None, b"seed", text, len(text) // 4, None)
        blocks = np.array([self.chance.choice((0, facts.prompt_tokens // 20)) for _ in self.engines])
        columns = Loads.of(self.engines), RateColumns.of(self.engines)
        candidates = Candidates(self.roster, blocks, blocks // 2, blocks, *columns)
        busy = [self.engines[place] for place in saturated]
        found = prospect(facts, candidates, self.policy, lambda engine: engine in busy)
        decision = None if found is None else decision_of(found.choice, facts, candidates)
        if decision is not None:
            placed(decision, facts, candidates, self.policy)
        chunks = cut(facts, 128)
        self.made.append(Made(f"r-{len(self.made)}", 1, facts, chunks, candidates, decision, 0.0, 0.1, saturated))
        record = self.ring.made(self.made[-1])
        self.content += self.writer.decided(record, self.made[-1])
        if first_byte_ms is not None:
            outcome = Outcome(status=200, is_stream=True, first_byte_ms=first_byte_ms)
            self.content += framed(Ended(record.id, outcome))
        return record


def replayed(content: bytes, path: Path, *names: str, seed: int = SEED, **more: Any) -> tuple[Report, list[str]]:
    path.write_bytes(content)
    said: list[str] = []
    report = path.with_suffix(".json")
    given = {"file": str(path), "policy": list(names) or None, "seed": seed, "limit": None, "json": str(report)}
    assert replay_command.run(argparse.Namespace(**{**given, **more}), said.append) == 0
    return msgspec.json.decode(report.read_bytes(), type=Report), said


@pytest.mark.parametrize("roles", [("both",) * 4, ("prefill", "decode") * 2], ids=["both", "split"])
@pytest.mark.parametrize("policy", policies.BUILT_IN)
def test_the_policy_that_was_recorded_agrees_with_itself(policy: str, roles: Sequence[Role], tmp_path: Path) -> None:
    run = Run(policy, roles)
    for _ in range(60):
        run.decide()
    report, _ = replayed(run.content, tmp_path / "file", policy)
    taken, score = report.scores
    assert score.agree == 1.0 and score.cheaper == score.dearer == 0.0
    assert score.mean_ms == score.mean_taken_ms == taken.mean_ms
    assert (score.cached_share, score.busiest_to_mean) == (taken.cached_share, taken.busiest_to_mean)


SATURATED = [(), (1,), (0, 2), (3,), (0, 1, 2), (0, 1, 2, 3)]


@pytest.mark.parametrize("policy", policies.BUILT_IN)
def test_who_was_saturated_is_passed_over_as_it_was(policy: str, tmp_path: Path) -> None:
    run = Run(policy)
    for number in range(60):
        run.decide(saturated=SATURATED[number % len(SATURATED)])
    report, _ = replayed(run.content, tmp_path / "file", policy, "cost")
    assert report.scores[1].agree == 1.0 and report.scores[1].cheaper == report.scores[1].dearer == 0.0


def test_a_policy_goes_to_no_saturated_engine_while_others_have_room(tmp_path: Path) -> None:
    run = Run("random")
    for _ in range(40):
        run.decide(saturated=(0, 1, 2))
    report, _ = replayed(run.content, tmp_path / "file", *policies.BUILT_IN)
    assert [score.busiest_to_mean for score in report.scores] == [4.0] * (1 + len(policies.BUILT_IN))


def test_a_recording_that_does_not_say_who_was_saturated_is_replayed_as_if_nobody_was(tmp_path: Path) -> None:
    run = Run("round_robin")
    for _ in range(12):
        run.decide()
    former = Reader(io.BytesIO(run.content), "file")
    frames = [msgspec.msgpack.decode(msgspec.msgpack.encode(message)) for message in former]
    shorter = [frame[:-1] if frame[0] == "decided" else frame for frame in frames]
    payloads = [msgspec.msgpack.encode(frame) for frame in shorter]
    content = HEAD + b"".join(LENGTH.pack(len(payload)) + payload for payload in payloads)
    report, _ = replayed(content, tmp_path / "file", "round_robin")
    assert report.decisions == 12 and report.scores[1].agree == 1.0


def test_another_policy_differs_and_the_cheapest_is_never_dearer(tmp_path: Path) -> None:
    run = Run("round_robin")
    for _ in range(100):
        run.decide()
    report, _ = replayed(run.content, tmp_path / "file", "cost", "round_robin", "random")
    scores = {score.policy: score for score in report.scores}
    assert scores["cost"].agree < 0.9 and scores["cost"].dearer == 0.0 and scores["cost"].cheaper > 0.3
    assert scores["cost"].mean_ms < scores["cost"].mean_taken_ms == scores["taken"].mean_ms
    assert scores["round_robin"].agree == 1.0 and scores["round_robin"].busiest_to_mean == 1.0
    assert scores["cost"].cached_share > scores["round_robin"].cached_share
    assert report.recorded_policies == ["round_robin"] and report.decisions == 100


@pytest.mark.parametrize("roles", [("both",) * 4, ("prefill", "decode") * 2], ids=["both", "split"])
def test_prices_are_those_that_the_policy_has_chosen_by(roles: Sequence[Role]) -> None:
    run = Run("cost", roles)
    sources = 0
    for _ in range(60):
        run.decide()
        made = run.made[-1]
        assert made.decision is not None and made.decision.choice is not None
        terms = Prices(made.facts, made.candidates, 256).terms(made.decision.choice)
        assert terms == pytest.approx(dict(made.decision.terms))
        sources += made.decision.source is not None
    assert sources > 5


def test_predictions_are_compared_with_what_was_measured(tmp_path: Path) -> None:
    run = Run("cost")
    for _ in range(20):
        record = run.decide()
        expected_ms = sum(record.terms[name] for name in UNTIL_FIRST_BYTE)
        outcome = Outcome(status=200, is_stream=True, first_byte_ms=2 * expected_ms)
        run.content += framed(Ended(record.id, outcome))
    report, said = replayed(run.content, tmp_path / "file", "cost")
    assert report.ttft is not None and report.ttft.answers == 20
    assert report.ttft.ratio == pytest.approx(0.5) and report.ttft.error_p50 == pytest.approx(0.5)
    assert any("predicted over measured 0.50" in line for line in said)


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(status=200, is_stream=False, first_byte_ms=5.0),
        Outcome(status=400, is_stream=True, first_byte_ms=5.0),
        Outcome(status=200, is_stream=True, first_byte_ms=5.0, failure="midway: it died"),
        Outcome(failure="the client left"),
    ],
)
def test_only_streams_that_were_answered_tell_of_the_first_byte(outcome: Outcome, tmp_path: Path) -> None:
    run = Run("cost")
    run.content += framed(Ended(run.decide().id, outcome))
    report, said = replayed(run.content, tmp_path / "file", "cost")
    assert report.ttft is None and "time to first byte: no stream's was measured" in said


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0.001, 1e6))))
def test_errors_are_numbers_whatever_was_measured(pairs: list[tuple[float, float]]) -> None:
    found = ttft_error(*zip(*pairs, strict=True)) if pairs else ttft_error([], [])
    assert (found is None) == (not pairs)
    assert found is None or 0 <= found.error_p50 <= found.error_p90


@settings(max_examples=30)
@given(st.integers(0, 3), st.sampled_from([None, 0, 1, 2, 3]), st.sampled_from([None, 16, 4096]))
def test_any_plan_has_a_price(destination: int, source: int | None, until: int | None) -> None:
    run = Run("random", ("prefill", "decode", "both", "both"))
    run.decide()
    terms = Prices(run.made[0].facts, run.made[0].candidates, 256).terms(Choice(destination, source, until))
    assert all(np.isfinite(value) and value >= 0 for name, value in terms.items() if name != "prefill_ms")


def test_a_file_that_is_cut_is_replayed_as_far_as_it_goes_and_says_so(tmp_path: Path) -> None:
    run = Run("cost")
    for _ in range(5):
        run.decide()
    report, said = replayed(run.content[:-7], tmp_path / "file", "cost")
    assert report.decisions == 4
    assert any("ends within a record" in line for line in said)


def test_a_limit_takes_the_first(tmp_path: Path) -> None:
    run = Run("random")
    for _ in range(9):
        run.decide()
    assert replayed(run.content, tmp_path / "file", "random", limit=4)[0].decisions == 4


def test_what_was_lost_and_who_found_nobody_is_told(tmp_path: Path) -> None:
    run = Run("cost", ())
    run.decide()
    run.content += framed(Lost(12))
    report, said = replayed(run.content, tmp_path / "file")
    assert (report.decisions, report.nobody, report.lost) == (0, 1, 12)
    assert "12 more were lost when they were recorded" in said
    assert {score.policy for score in report.scores} >= {"taken", *policies.BUILT_IN}


def test_a_router_that_goes_on_after_a_loss_keeps_its_policies_and_another_gets_new_ones(tmp_path: Path) -> None:
    run = Run("round_robin")
    for _ in range(3):
        run.decide()
    run.content += run.writer.begin()
    run.decide()
    report, _ = replayed(run.content, tmp_path / "file", "round_robin")
    assert report.scores[1].agree == 1.0
    other = Run("round_robin")
    other.began = Began("0", "round_robin", 256, 2.0)
    other.writer = Writer(other.began, (1, 1))
    other.content = other.writer.begin()
    other.decide()
    report, _ = replayed(run.content + other.content, tmp_path / "file", "round_robin")
    assert report.decisions == 5 and report.scores[1].agree == 1.0


def test_other_files_and_policies_are_clear_errors(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a letter")
    with pytest.raises(RecordingError, match="no recording"):
        run_command(["replay", str(path)])
    with pytest.raises(ConfigError, match="cannot be read"):
        run_command(["replay", str(tmp_path / "nothing")])
    with pytest.raises(ConfigError, match="policy must be one of"):
        run_command(["replay", str(path), "--policy", "clairvoyant"])
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        run_command(["replay", str(path), "--limit", "0"])


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run("cost")
    for _ in range(4):
        run.decide(first_byte_ms=100.0)
    path = tmp_path / "file"
    path.write_bytes(run.content)
    assert run_command(["replay", str(path), "--policy", "cost", "--policy", "weighted"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 decisions of cost"
    assert [line.split()[0] for line in lines[1:5]] == ["policy", "taken", "cost", "weighted"]
