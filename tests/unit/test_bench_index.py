"""The index benchmark's parts, its last line and its results file."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import index
from index_engines import Holding, engines_apart
from index_fleet import FilledFleet
from index_join import endpoint, exact
from index_plan import KEYS, PARTS, kept, last_line
from index_values import Arms, Found, Settings, quartiles

from vllm_llmd.kernels.prefix_table import Contents
from vllm_llmd.launch_process import reserve_port

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
