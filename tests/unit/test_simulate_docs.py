"""The page on simulation names every flag, with its default."""

from pathlib import Path

import msgspec
import pytest

from vllm_llmd.sim.settings import MODEL
from vllm_llmd.simulate.settings import SimulateSettings

PAGE = (Path(__file__).parents[2] / "docs/simulate.md").read_text()

SAID = {"policy": "the router's", "requests": "all", "minutes": "all", "speedup": "1"}
"""What stands for a default of None."""


def default_of(setting: str) -> str:
    flag = "--" + setting.replace("_", "-")
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| `{flag}` ")]
    return row.split("|")[2].strip()


@pytest.mark.parametrize(
    "setting",
    [field for field in msgspec.structs.fields(SimulateSettings) if field.name != "model"],
    ids=lambda setting: setting.name,
)
def test_every_flag_is_described_with_its_default(setting: msgspec.structs.FieldInfo) -> None:
    default = None if setting.default == () else setting.default
    assert default_of(setting.name) == (SAID.get(setting.name, "none") if default is None else str(default))


@pytest.mark.parametrize("name", MODEL)
def test_what_describes_an_engine_is_told_with_its_default(name: str) -> None:
    assert default_of(name) == str(getattr(SimulateSettings(synthetic=1).model, name))
