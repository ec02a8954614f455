"""The page on simulated engines names every flag and every failure, with its default."""

from pathlib import Path

import msgspec
import pytest

from vllm_llmd.sim.failures import Failures, WireFaults
from vllm_llmd.sim.settings import SimSettings

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
