"""What an operator gets wrong is said at start-up, by name."""

from pathlib import Path

import pytest

from vllm_llmd.errors import LaunchError
from vllm_llmd.fleet import Fleet
from vllm_llmd.launch_spec import EngineSpec, FleetSpec


def test_an_unknown_setting_stops_the_engine_and_is_named(lab, tmp_path: Path) -> None:
    spec = FleetSpec(
        model=lab.fleet.spec.model,
        engines=(EngineSpec(id="wrong", extra_config={"ruoter": "tcp://127.0.0.1:1"}),),
        log_dir=tmp_path,
        engine_flags=lab.fleet.spec.engine_flags,
    )
    with pytest.raises(LaunchError), Fleet(spec):
        pass
    assert "unknown key 'ruoter'" in (tmp_path / "wrong.log").read_text()


def test_an_engine_says_who_it_is_and_joins_once(lab) -> None:
    log = lab.fleet.engine("decode-0").log.read_text()
    assert "llmd engine decode-0 (decode) at http://127.0.0.1:" in log
    assert "kv_load_failure_policy is" not in log


def test_the_connector_finds_all_that_it_looks_for_in_vllm(lab) -> None:
    log = lab.fleet.engine("decode-0").log.read_text()
    assert "vllm-llmd: waiting for KV may cost a core" not in log
    assert "does not tell of new requests" not in log
