"""`kv_connector_extra_config`: every mistake is named at the door."""

import pytest

from vllm_llmd.errors import ConfigError
from vllm_llmd.settings import read_engine_settings


def test_nothing_at_all_is_a_working_engine() -> None:
    assert read_engine_settings({}).routers == ()


def test_one_router_or_several() -> None:
    assert read_engine_settings({"router": "tcp://a:1"}).routers == ("tcp://a:1",)
    assert read_engine_settings({"router": ["tcp://a:1", "tcp://b:1"]}).routers == ("tcp://a:1", "tcp://b:1")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"ruoter": "tcp://a:1"}, "unknown key 'ruoter'"),
        ({"router": 7}, "router"),
        ({"router": "http://a:1"}, "tcp://HOST:PORT"),
        ({"role": "boss"}, "role"),
        ({"lease_ms": "long"}, "lease_ms"),
        ({"lease_ms": 10}, "at least 200"),
        ({"lease_ms": 10**6}, "at most 60000"),
        ({"min_order_tokens": 0}, "at least 1"),
        ({"labels": {"zone": 1}}, "labels"),
        ({"labels": {"zone": "a b"}}, "labels.*values"),
        ({"peers": [{"id": "x"}]}, "peers"),
    ],
)
def test_a_mistake_is_named(extra: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_engine_settings(extra)


def test_secrets_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LLMD_SECRET", "s")
    monkeypatch.setenv("VLLM_API_KEY", "k")
    settings = read_engine_settings({})
    assert (settings.secret, settings.api_key) == ("s", "k")
    assert read_engine_settings({"secret": "own"}).secret == "own"
