"""Command lines and environments of a fleet."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from vllm_llmd.errors import ConfigError
from vllm_llmd.launch_spec import (
    CPU_ENV,
    CPU_FLAGS,
    EngineSpec,
    FleetSpec,
    engine_argv,
    engine_env,
    engines_by_role,
    router_argv,
)

ROUTER = "tcp://127.0.0.1:5"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def fleet(model: Path, *engines: EngineSpec, **more: Any) -> FleetSpec:
    return FleetSpec(model=model, engines=engines or (EngineSpec(id="a"),), log_dir=model, **more)


def test_engines_are_named_by_their_role() -> None:
    named = [(engine.id, engine.role) for engine in engines_by_role(1, 2, 1)]
    assert named == [("prefill-0", "prefill"), ("decode-0", "decode"), ("decode-1", "decode"), ("engine-0", "both")]


def test_an_engine_is_told_of_router_role_and_its_own_extra_config(model: Path) -> None:
    engine = EngineSpec(id="a", role="decode", extra_config={"lease_ms": 900})
    argv = engine_argv(fleet(model, engine), engine, 7, ROUTER, gpus=0)
    assert json.loads(argv[argv.index("--kv-transfer-config") + 1]) == {
        "kv_connector": "LlmdConnector",
        "kv_role": "kv_both",
        "engine_id": "a",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"router": ROUTER, "role": "decode", "lease_ms": 900},
    }
    assert argv[argv.index("--port") + 1] == "7"
    assert argv[argv.index("--model") + 1] == str(model)


def test_connectors_beside_ours_come_after_it_in_any_layout(model: Path) -> None:
    other = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    engine = EngineSpec(id="a", beside=(other,))
    argv = engine_argv(fleet(model, engine), engine, 7, ROUTER, gpus=0)
    transfer = json.loads(argv[argv.index("--kv-transfer-config") + 1])
    assert (transfer["kv_connector"], transfer["engine_id"]) == ("MultiConnector", "a")
    ours, beside = transfer["kv_connector_extra_config"]["connectors"]
    assert (ours["kv_connector"], ours["kv_connector_extra_config"]["layout"]) == ("LlmdConnector", "any")
    assert beside == other


def test_the_engines_flags_follow_the_fleets_which_follow_the_defaults(model: Path) -> None:
    engine = EngineSpec(id="a", flags=("--block-size", "96"))
    spec = fleet(model, engine, engine_flags=("--block-size", "64"))
    sizes = [after for flag, after in pairs(engine_argv(spec, engine, 7, ROUTER, gpus=0)) if flag == "--block-size"]
    assert sizes == ["32", "64", "96"]


def test_defaults_for_cpus_stay_away_from_gpus(model: Path) -> None:
    engine = EngineSpec(id="a")
    spec = fleet(model, engine)
    assert not set(CPU_FLAGS) & set(engine_argv(spec, engine, 7, ROUTER, gpus=1))
    assert not set(CPU_ENV) & set(engine_env(spec, engine, {}, gpus=1))


def test_the_users_environment_wins_over_defaults_and_the_spec_over_it(model: Path) -> None:
    engine = EngineSpec(id="a", env={"C": "engine"})
    spec = fleet(model, engine, engine_env={"B": "fleet", "C": "fleet"})
    env = engine_env(spec, engine, {"OMP_NUM_THREADS": "8", "B": "user", "PYTHONSAFEPATH": ""}, gpus=0)
    assert env["OMP_NUM_THREADS"] == "8"
    assert env["VLLM_CPU_KVCACHE_SPACE"] == CPU_ENV["VLLM_CPU_KVCACHE_SPACE"]
    assert (env["B"], env["C"]) == ("fleet", "engine")
    assert env["PYTHONSAFEPATH"] == "1"


@pytest.mark.parametrize(
    ("flags", "gpus", "shares"),
    [
        ((), 2, ["0", "1"]),
        (("-tp", "2"), 4, ["0,1", "2,3"]),
        (("--tensor-parallel-size=2",), 3, ["0,1", "2,0"]),
        ((), 1, ["0", "0"]),
    ],
)
def test_engines_take_gpus_in_turn(model: Path, flags: tuple[str, ...], gpus: int, shares: list[str]) -> None:
    spec = fleet(model, *engines_by_role(0, 0, 2), engine_flags=flags)
    assert [engine_env(spec, each, {}, gpus)["CUDA_VISIBLE_DEVICES"] for each in spec.engines] == shares


def test_the_users_choice_of_gpus_stands(model: Path) -> None:
    spec = fleet(model)
    assert engine_env(spec, spec.engines[0], {"CUDA_VISIBLE_DEVICES": "3"}, gpus=4)["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize("flags", [("-tp", "two"), ("-tp",), ("--tensor-parallel-size=0",)])
def test_an_impossible_tensor_parallelism_is_refused(model: Path, flags: tuple[str, ...]) -> None:
    spec = fleet(model, engine_flags=flags)
    with pytest.raises(ConfigError, match="must be a positive number"):
        engine_env(spec, spec.engines[0], {}, gpus=2)


@pytest.mark.parametrize("flag", ["--port", "--model=x", "--kv-transfer-config", "--host"])
def test_flags_that_are_the_launchers_are_refused_by_name(model: Path, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag.partition("=")[0]):
        fleet(model, engine_flags=(flag,))
    with pytest.raises(ConfigError, match=flag.partition("=")[0]):
        fleet(model, EngineSpec(id="a", flags=(flag,)))


def test_a_fleet_needs_engines_with_names_of_their_own(model: Path) -> None:
    for engines in ((EngineSpec(id="a"), EngineSpec(id="a")), (EngineSpec(id="router"),)):
        with pytest.raises(ConfigError, match="must differ"):
            fleet(model, *engines)
    with pytest.raises(ConfigError, match="at least one"):
        FleetSpec(model=model, engines=(), log_dir=model)


def test_a_model_must_be_a_directory_with_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model must be a directory with a config\.json"):
        fleet(tmp_path / "nothing")


def test_the_routers_own_flags_come_last(model: Path) -> None:
    spec = fleet(model, router_flags=("--port", "8000"))
    ports = [after for flag, after in pairs(router_argv(spec, 0, ROUTER)) if flag == "--port"]
    assert ports == ["0", "8000"]


def pairs(argv: list[str]) -> list[tuple[str, str]]:
    return list(pairwise(argv))
