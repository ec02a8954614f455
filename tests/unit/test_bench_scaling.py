"""The bench of desired replicas: how a fleet follows what is wanted, and that it can be played."""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from scaling import LOOK_MS, STABLE_MS, START_MS, Autoscaled, Follow, Sizes, last_line

from vllm_llmd.simulate import main as simulate
from vllm_llmd.simulate.settings import SimulateSettings


def followed(*wanted: int) -> list[int]:
    """What takes requests after each look."""
    follow = Follow({"both": wanted[0]})
    return [follow(number * LOOK_MS, {"both": size})["both"] for number, size in enumerate(wanted)]


def test_more_are_there_once_they_have_started() -> None:
    looks = followed(2, *[5] * 10)
    assert looks.index(5) == 1 + START_MS / LOOK_MS


def test_fewer_are_there_only_when_fewer_were_wanted_for_a_while() -> None:
    looks = followed(5, *[2] * 30)
    assert looks.index(2) >= STABLE_MS / LOOK_MS
    assert sorted(looks, reverse=True) == looks


def test_engines_that_are_not_wanted_get_nothing() -> None:
    requests = simulate.traffic_of(SimulateSettings(synthetic=60, rate=4.0, seed=1))
    args = argparse.Namespace(trace=Path("none"), seed=1, policy="least_requests")
    one: Sizes = {"both": 1}
    run = Autoscaled(args, {"both": 3}).play(requests, one, lambda *_: one)
    assert {each["both"] for each in run.had} == {1}
    assert 0 < run.good_share <= 1


def test_the_last_line_is_the_worst_that_was_found() -> None:
    one = {"wanted": {"both": 6}, "smallest": {"both": 5}, "good_share": 0.95, "wanted_to_smallest": {"both": 1.2}}
    apart = {
        "wanted": {"prefill": 8, "decode": 4},
        "smallest": {"prefill": 7, "decode": 4},
        "good_share": 0.89,
        "wanted_to_smallest": {"prefill": 1.143, "decode": 1.0},
    }
    followed = [{"fleet": "wanted", "good_share": 0.93}, {"fleet": "0.7 of that", "good_share": 0.2}]
    assert last_line([one, apart], followed) == {
        "fleets": 2,
        "too_small": 1,
        "wanted_to_smallest": 1.2,
        "wanted_to_smallest_of_a_role": 1.2,
        "followed_good_share": 0.93,
    }
    assert set(last_line([], []).values()) == {0, None}
