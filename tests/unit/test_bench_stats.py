"""The benchmark's pairs, spreads and shares."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from pd_stats import Pair, Spread, early_share, median_of, pairs
from pd_values import Ttft


def sample(arm: str, ttft_ms: float, **more: object) -> Ttft:
    fixed = {"model": "m", "transport": "shm", "block": "ours", "turn": 0, "round": 0, "load": "512"}
    return Ttft(arm=arm, ttft_ms=ttft_ms, **{**fixed, **more})  # type: ignore[arg-type]


def test_a_spread_is_the_median_between_the_quartiles() -> None:
    assert Spread.of([5, 1, 4, 2, 3]) == Spread(2, 3, 4, 5)


def test_one_value_is_its_own_spread_and_none_has_none() -> None:
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    assert Spread.of([]) is None


def test_a_pair_tells_ratio_and_difference() -> None:
    assert Pair(arm=30, one=20).ratio == 1.5
    assert Pair(arm=30, one=20).extra == 10


def test_an_arm_is_paired_with_the_yardstick_of_its_own_round() -> None:
    samples = [sample("one", 10), sample("chunk", 11), sample("chunk", 22, round=1), sample("one", 20, round=1)]
    assert pairs(samples, "chunk") == [Pair(11, 10), Pair(22, 20)]


@pytest.mark.parametrize(
    "other", [{"block": "pull"}, {"turn": 1}, {"round": 1}, {"load": "2048"}, {"transport": "tcp"}, {"model": "n"}]
)
def test_a_yardstick_of_elsewhere_pairs_with_nothing(other: dict[str, object]) -> None:
    assert pairs([sample("chunk", 11), sample("one", 10, **other)], "chunk") == []


def test_the_median_of_no_pairs_is_none() -> None:
    assert median_of(lambda pair: pair.ratio, []) is None
    assert median_of(lambda pair: pair.ratio, [Pair(2, 1), Pair(3, 1), Pair(9, 1)]) == 3


def test_shares_are_of_what_was_counted() -> None:
    counted = sample("chunk", 1, kv_bytes=100, kv_early=90)
    nothing_read = sample("chunk", 1, kv_bytes=0, kv_early=0)
    not_counted = sample("chunk", 1, kv_bytes=100)
    assert early_share([counted, nothing_read, not_counted]) == [0.9]
