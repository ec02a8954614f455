import argparse

import pytest

from vllm_llmd.errors import ConfigError
from vllm_llmd.router.settings import add_arguments, from_args
from vllm_llmd.router.stock.settings import StockEngine, parse, ranks

NEEDED = "http=http://h:8000,events=tcp://h:5557"


def test_http_and_events_are_enough() -> None:
    engine = parse(NEEDED)
    assert engine == StockEngine(http="http://h:8000", events="tcp://h:5557")
    [rank] = ranks(engine)
    assert (rank.id, rank.number, rank.replay, rank.block_size) == ("h:8000", None, None, None)


def test_everything_can_be_said() -> None:
    engine = parse(f"{NEEDED},replay=tcp://h:5558,id=one,block_size=32,dp=2,topic=kv,label.gpu=h100,label.x.y/z=")
    assert engine == StockEngine(
        http="http://h:8000",
        events="tcp://h:5557",
        replay="tcp://h:5558",
        id="one",
        block_size=32,
        dp=2,
        topic="kv",
        labels={"gpu": "h100", "x.y/z": ""},
    )


def test_every_rank_is_an_engine_with_ports_of_its_own() -> None:
    first, second = ranks(parse("http=http://h:8000/,events=tcp://h:5557,replay=tcp://h:6557,dp=2"))
    assert (first.id, first.number, first.events, first.replay) == ("h:8000-dp0", 0, "tcp://h:5557", "tcp://h:6557")
    assert (second.id, second.number, second.events, second.replay) == ("h:8000-dp1", 1, "tcp://h:5558", "tcp://h:6558")
    assert {first.http, second.http} == {"http://h:8000"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must look like http=URL"),
        ("http://h:8000", "must look like http=URL"),
        (f"{NEEDED},dp=1,dp=2", "must look like http=URL"),
        ("events=tcp://h:5557", "missing required field `http`"),
        ("http=http://h:8000", "missing required field `events`"),
        (f"{NEEDED},color=red", "unknown key 'color'; known are http, events, replay"),
        (f"{NEEDED},label.gpu=a b", "labels must have values"),
        (f"{NEEDED},label.=a", "labels must have keys"),
        (f"{NEEDED},labels=a", "unknown key 'labels'"),
        (f"{NEEDED},dp=two", "Expected `int`"),
        (f"{NEEDED},dp=0", "'dp' must be at least 1; got 0"),
        (f"{NEEDED},block_size=0", "'block_size' must be at least 1; got 0"),
        (f"{NEEDED},id=a/b", "'id' must be a name without slashes"),
        ("http=h:8000,events=tcp://h:5557", "'http' must look like http://HOST:PORT"),
        ("http=http://h:8000,events=tcp://*:5557", "'events' must look like tcp://HOST:PORT"),
        ("http=http://h:8000,events=ipc://x", "'events' must look like tcp://HOST:PORT"),
        (f"{NEEDED},replay=tcp://h", "'replay' must look like tcp://HOST:PORT"),
        ("http=http://h:8000,events=tcp://h:65535,dp=2", "'events' must look like tcp://HOST:PORT"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match="stock_engine") as refusal:
        parse(text)
    assert complaint in str(refusal.value)


def test_the_flag_may_be_repeated_but_not_for_one_id() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    both = parser.parse_args(["--stock-engine", NEEDED, "--stock-engine", "http=http://i:8000,events=tcp://i:5557"])
    assert [engine.http for engine in from_args(both, {}).stock_engine or ()] == ["http://h:8000", "http://i:8000"]
    twice = parser.parse_args(["--stock-engine", NEEDED, "--stock-engine", NEEDED])
    with pytest.raises(ConfigError, match="two engines called h:8000"):
        from_args(twice, {})
