"""What the benchmark does in which order, how it is asked for, and how it is continued."""

import argparse
import sys
from pathlib import Path

import msgspec
import pytest

from vllm_llmd.errors import ConfigError

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import pd
from pd_environ import for_transport
from pd_plan import loads_of, plan, remaining_s
from pd_values import Finished, Load, Results, Settings, load, save

SETTINGS = Settings(
    models=["big", "small"],
    transports=["shm", "tcp"],
    lengths=["512", "8x512"],
    arms=["chunk", "layer", "pull", "push_quiet"],
    parts=["ttft", "idle", "raw"],
    rounds=5,
    turns=2,
)


def changed(**more: object) -> Settings:
    return msgspec.structs.replace(SETTINGS, **more)


# --- lengths ----------------------------------------------------------------------------------------------------


def test_a_length_says_tokens_requests_at_once_and_rounds() -> None:
    assert Load.parse("2048") == Load(2048)
    assert Load.parse("8x512@3") == Load(512, 8, 3)


def test_a_length_is_called_the_same_however_often_it_is_measured() -> None:
    assert (str(Load.parse("6000@5")), str(Load.parse("8x512"))) == ("6000", "8x512")


@pytest.mark.parametrize("text", ["", "x", "0", "0x512", "8x", "512@0", "1k", "-5"])
def test_a_length_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must look like"):
        Load.parse(text)


# --- order ------------------------------------------------------------------------------------------------------


def test_every_block_has_a_turn_before_any_has_its_second() -> None:
    tasks = [task for task in plan(SETTINGS) if task.part == "ttft"]
    assert [task.turn for task in tasks] == sorted(task.turn for task in tasks)
    assert {task.block for task in tasks if task.turn == 0} == {"ours", "pull", "push_quiet"}
    assert len(tasks) == 2 * 2 * 2 * 3


def test_each_turn_begins_with_another_block() -> None:
    first = [next(task.block for task in plan(SETTINGS) if task.turn == turn) for turn in range(2)]
    assert first == ["ours", "pull"]


def test_the_turns_share_the_rounds() -> None:
    tasks = [task for task in plan(SETTINGS) if (task.model, task.transport, task.block) == ("big", "tcp", "pull")]
    assert sorted(task.rounds for task in tasks) == [2, 3]


def test_a_load_with_fewer_rounds_has_its_share_in_every_turn() -> None:
    settings = changed(lengths=["512", "6000@2"])
    heard = [[str(each) for each in loads] for turn in range(2) for loads in loads_of(settings, turn)]
    assert heard == [["512", "6000"], ["512"], ["512", "6000"], ["512"], ["512"]]


def test_idle_engines_are_watched_on_the_last_model_and_only_in_blocks_asked_for() -> None:
    idle = [task for task in plan(SETTINGS) if task.part == "idle"]
    assert {(task.model, task.block) for task in idle} == {("small", "ours"), ("small", "pull")}


def test_every_task_has_a_key_of_its_own() -> None:
    keys = [task.key for task in plan(SETTINGS)]
    assert len(set(keys)) == len(keys)


# --- time left --------------------------------------------------------------------------------------------------


def test_nothing_is_known_before_the_first_task_has_ended() -> None:
    assert remaining_s(plan(SETTINGS), []) is None


def test_a_task_takes_as_long_as_its_like_did() -> None:
    tasks = plan(SETTINGS)
    pull = next(task for task in tasks if task.kind == "ttft big tcp pull")
    known = [
        Finished(key="ttft big tcp pull turn 0", seconds=100),
        Finished(key="ttft big tcp pull_quiet turn 0", seconds=7),
        Finished(key="raw shm reads turn 0", seconds=1),
    ]
    assert remaining_s([pull], known) == 100


def test_a_task_without_its_like_takes_as_long_as_others_of_its_model() -> None:
    ours = next(task for task in plan(SETTINGS) if task.kind == "ttft big tcp ours")
    known = [
        Finished(key="ttft big shm ours turn 0", seconds=100),
        Finished(key="ttft big tcp pull turn 0", seconds=200),
        Finished(key="ttft small tcp ours turn 0", seconds=5),
    ]
    assert remaining_s([ours], known) == 150


# --- going on ---------------------------------------------------------------------------------------------------


def test_results_come_back_as_they_were_saved(tmp_path: Path) -> None:
    results = Results(settings=SETTINGS, finished=[Finished(key="a", seconds=1.5)], versions={"vllm": "1"})
    save(results, tmp_path / "deep" / "pd.json")
    assert load(tmp_path / "deep" / "pd.json", SETTINGS) == results
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["pd.json"]


def test_results_of_other_settings_are_not_continued(tmp_path: Path) -> None:
    save(Results(settings=SETTINGS), tmp_path / "pd.json")
    with pytest.raises(ConfigError, match="other settings"):
        load(tmp_path / "pd.json", changed(rounds=6))


@pytest.mark.parametrize("content", ["", "{}", "[1"])
def test_a_file_that_holds_no_results_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "pd.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"pd\.json holds no results"):
        load(path, SETTINGS)


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to resume"):
        load(tmp_path / "pd.json", SETTINGS)


def test_what_half_a_task_has_measured_is_taken_back() -> None:
    results = Results(settings=SETTINGS, finished=[Finished(key="a", seconds=1)])
    kept = pd.Kept.of(results)
    results.finished.append(Finished(key="b", seconds=1))
    kept.restore(results)
    assert [each.key for each in results.finished] == ["a"]


# --- flags ------------------------------------------------------------------------------------------------------


def asked(*flags: str) -> Settings:
    parser = argparse.ArgumentParser()
    pd.add_arguments(parser)
    return pd.settings_from(parser.parse_args(flags))


def test_flags_win_over_the_preset() -> None:
    assert asked().rounds == 15
    assert asked("--quick").models == [".models/tiny"]
    assert asked("--quick", "--rounds", "3", "--arms", "pull").rounds == 3
    assert asked("--arms", "pull", "push").arms == ["pull", "push"]


def test_there_are_no_more_turns_than_rounds() -> None:
    assert asked("--rounds", "2").turns == 2


def test_an_unreadable_length_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="got 'long'"):
        asked("--lengths", "long")


# --- environment ------------------------------------------------------------------------------------------------


def test_a_transport_is_chosen_for_ucx_whatever_the_user_has_set() -> None:
    assert for_transport({}, "tcp")["UCX_TLS"] == "tcp"
    assert "UCX_TLS" not in for_transport({"UCX_TLS": "tcp"}, "shm")


def test_engines_find_this_folder_and_no_gpu() -> None:
    environ = for_transport({"PYTHONPATH": "/mine", "HOME": "/h"}, "shm")
    first, second = environ["PYTHONPATH"].split(":")
    assert (Path(first) / "quiet_nixl.py").is_file()
    assert (second, environ["CUDA_VISIBLE_DEVICES"], environ["HOME"]) == ("/mine", "", "/h")
