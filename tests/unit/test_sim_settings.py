"""The page on simulated engines names every flag and failure with its default; a flag out of range is refused."""

import argparse
import re
from pathlib import Path

import msgspec
import pytest

from vllm_llmd.errors import ConfigError
from vllm_llmd.sim.failures import Failures, WireFaults
from vllm_llmd.sim.settings import SimSettings, add_arguments, from_args

PAGE = (Path(__file__).parents[2] / "docs/sim-engine.md").read_text()


def default_of(first_cell: str) -> str:
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| `{first_cell}` ")]
    return row.split("|")[2].strip()


@pytest.mark.parametrize("setting", msgspec.structs.fields(SimSettings), ids=lambda setting: setting.name)
def test_every_flag_is_described_with_its_default(setting: msgspec.structs.FieldInfo) -> None:
    default = setting.default
    if isinstance(default, tuple):
        default = default[0] if default else None
    assert default_of("--" + setting.name.replace("_", "-")) == ("none" if default is None else str(default))


@pytest.mark.parametrize("failure", msgspec.structs.fields(Failures), ids=lambda failure: failure.name)
def test_every_failure_is_described(failure: msgspec.structs.FieldInfo) -> None:
    default = "" if failure.name == "wire" else str(failure.default).lower()
    assert default_of(failure.name) == default


def test_every_fault_of_the_wire_is_described() -> None:
    assert [name for name in WireFaults.__struct_fields__ if f"`{name}`" not in PAGE] == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--blocks", "0"), "blocks must be at least 1; got 0"),
        (("--port", "70000"), "port must be between 0 and 65535; got 70000"),
        (("--speed-up", "0"), "speed_up must be more than 0"),
        (("--step-ms", "0"), "step_ms must be more than 0"),
        (("--failures", "{"), "failures must be a JSON object"),
        (("--failures", '{"answers": "x"}'), "failures: Invalid enum value 'x'"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(flags: tuple[str, ...], said: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ConfigError, match=re.escape(said)):
        from_args(parser.parse_args(flags), {})


def test_an_unknown_role_is_refused_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--role", "x"])
    assert "'prefill', 'decode', 'both'" in capsys.readouterr().err
