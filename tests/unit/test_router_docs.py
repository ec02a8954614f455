import argparse
import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from vllm_llmd import wire
from vllm_llmd.router import fleet, policies
from vllm_llmd.router.audit import replay_command
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.index import cursor
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.testing.clock import FakeClock

DOCS = Path(__file__).parents[2] / "docs"


def row(document: str, first_cell: str) -> str:
    [found] = [line for line in (DOCS / document).read_text().splitlines() if line.startswith(f"| `{first_cell}` ")]
    return found


@pytest.mark.parametrize("message", get_args(wire.LinkMessage), ids=lambda message: message.__name__)
def test_every_message_is_described_with_its_fields_in_order(message: type[msgspec.Struct]) -> None:
    described = re.findall(r"`(\w+)`", row("protocol.md", message.__name__).split("|")[2])
    assert tuple(name for name in described if name in message.__struct_fields__) == message.__struct_fields__


@pytest.mark.parametrize("setting", msgspec.structs.fields(RouterSettings), ids=lambda setting: setting.name)
def test_every_flag_is_described_with_its_default(setting: msgspec.structs.FieldInfo) -> None:
    default = "none" if setting.default is None else str(setting.default)
    assert f" {default} " in row("router.md", "--" + setting.name.replace("_", "-")).split("|")[2]


@pytest.mark.parametrize("policy", policies.BUILT_IN)
def test_every_policy_is_described(policy: str) -> None:
    row("policies.md", policy)


def test_every_metric_is_described() -> None:
    exposed = Metrics(Fleet(RouterSettings(), FakeClock(), "r")).exposition().decode()
    names = {line.split()[2] for line in exposed.splitlines() if line.startswith("# TYPE")}
    for name in names:
        if not name.endswith("_created"):
            row("router.md", name)


def test_every_reason_to_ask_for_a_snapshot_is_described() -> None:
    source = Path(cursor.__file__).read_text() + Path(fleet.__file__).read_text()
    reasons = set(re.findall(r'lose\("([^"]+)"', source))
    assert len(reasons) > 5
    for reason in reasons:
        row("protocol.md", reason)


def test_every_flag_of_a_replay_is_described_with_its_default() -> None:
    parser = argparse.ArgumentParser()
    replay_command.add_arguments(parser)
    flags = [action for action in parser._actions if action.option_strings and action.dest != "help"]
    assert len(flags) > 3
    said = {"policy": "all that there are", "limit": "all"}
    for action in flags:
        default = said.get(action.dest, "none" if action.default is None else str(action.default))
        assert row("policies.md", action.option_strings[0]).split("|")[2].strip() == default
