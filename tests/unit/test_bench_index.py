"""The index benchmark's parts, its last line and its results file."""

import functools
import operator
import sys
from pathlib import Path

import numpy as np
import pytest
import zmq

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import index
from index_engines import Holding, engines_apart
from index_fleet import FilledFleet
from index_join import endpoint, exact
from index_lag import lags_ms, rate
from index_plan import KEYS, PARTS, kept, last_line
from index_publish import cost_pct, report
from index_storm import Engine, Storm
from index_values import Arms, Found, Settings, quartiles

from vllm_llmd import wire
from vllm_llmd.kernels.prefix_table import Contents
from vllm_llmd.launch_process import reserve_port
from vllm_llmd.names import EngineId

BENCH = Path(__file__).resolve().parents[2] / "bench"
SETTINGS = Settings(resident=1, rounds=1, calls=1, engine_python="python", model="tiny")


def test_a_figure_that_was_not_measured_is_null() -> None:
    line = last_line({"table": kept(Found({"bytes_per_block": 33.123456}), SETTINGS, "now")})
    assert tuple(line) == KEYS
    assert {key: value for key, value in line.items() if value is not None} == {"bytes_per_block": 33.12}


def test_every_part_is_a_module_and_no_figure_has_two() -> None:
    assert [part for part in PARTS if not (BENCH / f"index_{part}.py").exists()] == []
    figures = [figure for part in PARTS.values() for figure in part]
    assert len(figures) == len(set(figures))
    assert set(figures) <= set(KEYS)


def test_a_speed_up_is_larger_the_better_we_are() -> None:
    assert Arms("rate", "1/s", True, ours=[10.0], dynamo=[2.0]).speed_up == 5
    assert Arms("time", "us", False, ours=[2.0], dynamo=[10.0]).speed_up == 5


def test_one_value_is_its_own_quartiles() -> None:
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_parts_of_an_earlier_run_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "index.json"
    assert index.earlier(out) == {}
    parts = {"table": kept(Found({"bytes_per_block": 33.0}), SETTINGS, "now")}
    index.save(parts, out)
    assert index.earlier(out) == parts


def test_a_part_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["index", "--parts", "nonsense"])
    with pytest.raises(SystemExit):
        index.read_arguments()


def test_a_filled_fleet_knows_what_it_was_told() -> None:
    filled = FilledFleet(2, block_size=16, blocks=100)
    filled.store(1, np.array([5, 6], np.uint64))
    filled.store(1, np.array([7], np.uint64))
    engines = [engine.info.id for engine in filled.fleet.membership.ready()]
    assert [filled.fleet.index.contents(engine) for engine in engines] == [Contents(0, 0), Contents(3, 5 ^ 6 ^ 7)]


def test_a_join_is_over_when_all_are_ready_and_their_contents_are_known() -> None:
    filled = FilledFleet(2, block_size=16, blocks=100)
    filled.store(1, np.array([5], np.uint64))
    idle, other = (engine.info.id for engine in filled.fleet.membership.all())
    assert exact(filled.fleet, {idle: Contents(0, 0), other: Contents(1, 5)})
    assert not exact(filled.fleet, {idle: Contents(0, 0), other: Contents(1, 6)})
    assert not exact(filled.fleet, {idle: Contents(0, 0)})


def test_engines_in_a_process_of_their_own_tell_what_they_hold() -> None:
    with reserve_port() as port, engines_apart(Holding(2, 10, endpoint(port))) as held:
        assert [contents.blocks for contents in held.values()] == [10, 10]


A, B = EngineId("a"), EngineId("b")


def test_a_lag_runs_from_the_sending_of_its_own_change() -> None:
    sent = {A: [0, 1_000_000_000], B: [500_000_000]}
    seen = [(A, 1, 3_000_000), (B, 1, 504_000_000), (A, 2, 1_005_000_000)]
    assert lags_ms(seen, sent, warm_up_s=0) == [3, 4, 5]
    assert lags_ms(seen, sent, warm_up_s=0.6) == [5]


def test_a_rate_counts_the_events_of_every_message_but_the_first() -> None:
    assert rate([(A, 1, 0), (A, 2, 500_000_000), (B, 1, 1_000_000_000)], events_per_message=32) == 64


def test_an_engine_in_a_storm_holds_as_many_blocks_after_a_change_as_before_it() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        storm = Storm(f"tcp://127.0.0.1:{port}", 1, resident=6, events_per_message=4, events_per_s=40, seconds=1)
        engine = Engine(context, 0, storm)
        assert storm.messages == 10
        sender, hello = router.recv_multipart()
        assert wire.decode_link(hello) == wire.Hello(engine.info)
        router.send_multipart([sender, wire.encode(wire.SnapshotWanted(engine.info.epoch, "joined"))])
        while not engine.answer():
            pass
        snapshot = wire.decode_link(router.recv_multipart()[1])
        assert isinstance(snapshot, wire.Snapshot)
        held = set(wire.unpack_names(snapshot.names))
        for _ in range(3):
            engine.change()
            changed = wire.decode_link(router.recv_multipart()[1])
            assert isinstance(changed, wire.BlocksChanged)
            assert held.issuperset(wire.unpack_names(changed.removed))
            held = held.difference(wire.unpack_names(changed.removed)) | set(wire.unpack_names(changed.stored))
            assert len(held) == 6
        engine.heartbeat()
        heartbeat = wire.decode_link(router.recv_multipart()[1])
        assert isinstance(heartbeat, wire.Heartbeat)
        assert (heartbeat.seq, heartbeat.blocks) == (3, 6)
        assert heartbeat.digest == functools.reduce(operator.xor, held)
        context.destroy(linger=0)


def test_publishing_costs_what_the_arm_that_publishes_takes_beyond_the_other() -> None:
    rounds = [
        {"arm": arm, "cpu_us": 1000.0, "engine_thread_us": here, "other_threads_us": there}
        for arm, here, there in (("on", 12.0, 50.0), ("off", 3.0, 41.0), ("on", 14.0, 52.0), ("off", 5.0, 43.0))
    ]
    assert cost_pct(rounds, "engine_thread_us") == pytest.approx(0.9)
    assert any("0.9 %" in line for line in report(rounds_with_wall(rounds)))


def rounds_with_wall(rounds: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{**one, "wall_us": 1100.0} for one in rounds]
