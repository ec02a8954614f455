"""The benchmark's last line and its table."""

import argparse
import json
import re
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import pd
import pd_report
from pd_values import Agreement, FirstOrder, Idle, RawRead, Results, Settings, Ttft

SETTINGS = Settings(
    models=["big", "small"],
    transports=["shm", "tcp"],
    lengths=["2048", "6000"],
    arms=["chunk", "layer", "pull", "push", "pull_quiet", "push_quiet"],
    parts=["ttft"],
    rounds=1,
    turns=1,
)

KEYS = [
    "ttft_ms",
    "vs_one_engine",
    "vs_intree_shipped",
    "extra_vs_intree_quiet_tcp",
    "arrived_before_prefill_end",
    "idle_cpu",
    "read_vs_contiguous",
    "first_request_penalty_ms",
]


def paired(block: str, arm: str, one_ms: float, arm_ms: float, **more: Any) -> list[Ttft]:
    """An arm and its yardstick in one round."""
    fixed = {"model": "big", "transport": "shm", "block": block, "turn": 0, "round": 0, "load": "6000"}
    bytes_ = {name: more.pop(name) for name in ("kv_bytes", "kv_early") if name in more}
    place = {**fixed, **more}
    return [Ttft(arm="one", ttft_ms=one_ms, **place), Ttft(arm=arm, ttft_ms=arm_ms, **place, **bytes_)]


def line(*samples: list[Ttft], **more: Any) -> dict[str, Any]:
    return pd_report.last_line(Results(settings=SETTINGS, ttft=[*chain(*samples)], **more))


def test_the_line_has_its_keys_even_when_nothing_was_measured() -> None:
    empty = line()
    assert list(empty) == KEYS
    assert empty["vs_one_engine"] == {"2048": None, "6000": None}
    assert list(empty["ttft_ms"]) == ["one", "pull", "push", "pull_quiet", "push_quiet", "chunk", "layer"]
    assert json.loads(json.dumps(empty)) == empty


def test_times_are_medians_by_arm_transport_and_load() -> None:
    shown = line(
        paired("ours", "chunk", 100, 110),
        paired("ours", "chunk", 120, 130, round=1),
        paired("pull", "pull", 140, 300),
        paired("ours", "chunk", 7, 8, transport="tcp", load="2048"),
    )["ttft_ms"]
    assert shown["one"] == {"shm": {"6000": 120}, "tcp": {"2048": 7}}
    assert shown["chunk"] == {"shm": {"6000": 120}, "tcp": {"2048": 8}}
    assert shown["pull"] == {"shm": {"6000": 300}}


def test_ours_is_compared_with_one_engine_over_the_worse_transport() -> None:
    shown = line(paired("ours", "chunk", 100, 105), paired("ours", "chunk", 100, 110, transport="tcp"))
    assert shown["vs_one_engine"]["6000"] == pytest.approx(1.10)


def test_only_the_first_model_is_in_the_headlines() -> None:
    shown = line(paired("ours", "chunk", 100, 105), paired("ours", "chunk", 100, 900, model="small"))
    assert shown["vs_one_engine"]["6000"] == pytest.approx(1.05)


def test_blocks_are_compared_by_their_yardsticks_and_against_the_better_of_both() -> None:
    shown = line(
        paired("ours", "chunk", 100, 110),
        paired("pull", "pull", 200, 400),
        paired("push", "push", 50, 150),
    )
    assert shown["vs_intree_shipped"]["6000"] == pytest.approx(1.1 / 2.0)


def test_what_is_beyond_one_engine_is_compared_over_tcp_with_the_better_quiet_one() -> None:
    shown = line(
        paired("ours", "chunk", 100, 110, transport="tcp"),
        paired("pull_quiet", "pull_quiet", 100, 160, transport="tcp"),
        paired("push_quiet", "push_quiet", 100, 140, transport="tcp"),
        paired("push_quiet", "push_quiet", 100, 101),
    )
    assert shown["extra_vs_intree_quiet_tcp"]["6000"] == pytest.approx(10 / 40)


def test_nothing_is_compared_with_what_took_no_longer_than_one_engine() -> None:
    shown = line(
        paired("ours", "chunk", 100, 110, transport="tcp"),
        paired("pull_quiet", "pull_quiet", 100, 99, transport="tcp"),
    )
    assert shown["extra_vs_intree_quiet_tcp"]["6000"] is None


def test_the_lesser_share_of_the_transports_is_told() -> None:
    shown = line(
        paired("ours", "chunk", 1, 1, kv_bytes=100, kv_early=95),
        paired("ours", "chunk", 1, 1, kv_bytes=100, kv_early=91, transport="tcp"),
        paired("ours", "layer", 1, 1, kv_bytes=100, kv_early=10, transport="tcp"),
    )
    assert shown["arrived_before_prefill_end"] == {"6000": 0.91}


def test_a_share_that_is_not_counted_is_none() -> None:
    assert line(paired("ours", "chunk", 1, 1))["arrived_before_prefill_end"] == {"6000": None}


def idle(connector: str, cores: float, round_: int = 0, block: str = "ours") -> Idle:
    return Idle(model="small", block=block, turn=0, round=round_, connector=connector, cores=cores)


def test_idle_cores_are_those_beyond_an_engine_without_a_connector() -> None:
    shown = line(idle=[idle("none", 0.02), idle("ours", 0.03), idle("none", 0.5, 1), idle("ours", 0.51, 1)])
    assert shown["idle_cpu"] == pytest.approx(0.01)


def test_other_connectors_are_left_out_of_ours() -> None:
    assert line(idle=[idle("none", 0.0, block="pull"), idle("pull", 1.0, block="pull")])["idle_cpu"] is None


def raw(transport: Any, layout: str, fragmented_ms: float) -> RawRead:
    return RawRead(transport=transport, layout=layout, turn=0, bytes=1, fragmented_ms=fragmented_ms, contiguous_ms=9.0)


def test_the_slower_transport_is_told_of_with_the_layout_that_engines_have() -> None:
    reads = [raw("shm", "layers", 90.0), raw("shm", "blocks", 10.0), raw("tcp", "blocks", 12.0)]
    assert line(raw_reads=reads)["read_vs_contiguous"] == 0.75


def first(first_ms: float, model: str = "small") -> FirstOrder:
    return FirstOrder(model=model, transport="shm", turn=0, arm="chunk", first_ms=first_ms, second_ms=50)


def test_the_penalty_is_the_median_of_what_first_orders_of_the_smallest_model_take_longer() -> None:
    assert line(first_orders=[first(55), first(60), first(90), first(500, "big")])["first_request_penalty_ms"] == 10


def agreement(alike: int) -> Agreement:
    return Agreement(model="big", transport="shm", block="ours", turn=0, arm="chunk", alike=alike, of=8)


def test_an_arm_disagrees_if_its_first_token_differs() -> None:
    results = Results(settings=SETTINGS, agreements=[agreement(8), agreement(3), agreement(0)])
    assert pd_report.disagreements(results) == ["chunk (big, shm)"]


def test_figures_are_rounded_wherever_they_are() -> None:
    assert pd_report.rounded({"a": {"b": 1.23456, "c": None, "d": 3}}) == {"a": {"b": 1.235, "c": None, "d": 3}}


def test_the_table_shows_medians_and_quartiles_in_aligned_columns() -> None:
    samples = [*paired("ours", "chunk", 100, 110, kv_bytes=10, kv_early=9), *paired("ours", "chunk", 100, 130, round=1)]
    text = pd_report.tables(Results(settings=SETTINGS, ttft=samples))
    assert text.splitlines() == [
        "big over shm",
        "tokens, arm  n         TTFT ms       over one engine  beyond it, ms         arrived early",
        "6000 one     2  100 [100, 100]                     -              -                     -",
        "6000 chunk   2  120 [115, 125]  1.200 [1.150, 1.250]    20 [15, 25]  0.900 [0.900, 0.900]",
    ]


def test_the_table_has_every_kind_of_figure() -> None:
    results = Results(
        settings=SETTINGS,
        ttft=paired("ours", "chunk", 100, 110),
        idle=[idle("none", 0.02), idle("ours", 0.03)],
        raw_reads=[raw("shm", "layers", 10.0)],
        first_orders=[first(55)],
        agreements=[agreement(8)],
    )
    text = pd_report.tables(results)
    for title in ("big over shm", "an idle engine", "64 MiB", "the first order", "answers compared"):
        assert title in text


# --- docs -------------------------------------------------------------------------------------------------------

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.parametrize("name", [*KEYS, *pd_report.ARMS])
def test_every_figure_and_every_arm_is_described(name: str) -> None:
    assert f"`{name}`" in (BENCH / "README.md").read_text()


def test_every_flag_is_described() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    pd.add_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    text = (BENCH / "README.md").read_text()
    assert [flag for flag in sorted(flags) if f"`{flag}`" not in text] == []


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"`(\w+\.py)`", (BENCH / "README.md").read_text()))
    assert named
    assert [name for name in named if not (BENCH / name).is_file()] == []
