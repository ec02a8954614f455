import argparse

import msgspec
import pytest

from vllm_llmd.errors import ConfigError
from vllm_llmd.router.settings import API_KEY_VARIABLE, RouterSettings, add_arguments, from_args


def parsed(*flags: str, **environ: str) -> RouterSettings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_args(parser.parse_args(flags), environ)


def test_no_flags_give_the_defaults() -> None:
    assert parsed() == RouterSettings()


@pytest.mark.parametrize("setting", msgspec.structs.fields(RouterSettings), ids=lambda setting: setting.name)
def test_every_setting_has_a_flag(setting: msgspec.structs.FieldInfo) -> None:
    if setting.name in ("stock_engine", "objective", "tenant_weight"):
        pytest.skip("is not taken as it comes")
    value = setting.default + 1 if setting.type is int else "x"
    flag = "--" + setting.name.replace("_", "-")
    assert getattr(parsed(flag, str(value)), setting.name) == value


def test_the_api_key_comes_from_the_environment_unless_a_flag_gives_it() -> None:
    assert parsed(**{API_KEY_VARIABLE: "env"}).api_key == "env"
    assert parsed("--api-key", "flag", **{API_KEY_VARIABLE: "env"}).api_key == "flag"
    assert parsed(**{API_KEY_VARIABLE: ""}).api_key is None


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--port", "70000"), "port"),
        (("--heartbeat-ms", "0"), "heartbeat_ms"),
        (("--stale-after-ms", "500"), "stale_after_ms"),
        (("--gone-after-ms", "3000"), "gone_after_ms"),
        (("--engine-queue", "-1"), "engine_queue"),
        (("--queue-bytes", "0"), "queue_bytes"),
        (("--objective", "batch"), "objective"),
        (("--tenant-weight", "gold=0"), "tenant_weight"),
    ],
)
def test_a_setting_out_of_range_is_named(flags: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named} "):
        parsed(*flags)


def test_objectives_and_weights_may_be_repeated() -> None:
    settings = parsed("--objective", "batch=-1", "--objective", "live=5", "--tenant-weight", "gold=2")
    assert (settings.objective, settings.tenant_weight) == ({"batch": -1, "live": 5}, {"gold": 2.0})
