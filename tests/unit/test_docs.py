"""What the docs must name, and that what they name exists. The router's own are in test_router_docs.py."""

import ast
import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from vllm_llmd import wire
from vllm_llmd.kv_connector.metrics import COUNTERS, FALLBACKS, METRICS, REFUSED, MetricSpec
from vllm_llmd.kv_connector.ticket import Ticket
from vllm_llmd.settings import EngineSettings

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
MENTION = re.compile(r"`((?:vllm_llmd|kv_connector|router|kernels)/[\w/]+\.py)(?::(\w+))?`")


def row(document: Path, first_cell: str) -> list[str]:
    """The cells of the one table row that begins with `first_cell`."""
    lines = document.read_text().splitlines()
    rows = [line for line in lines if line.startswith(f"| `{first_cell}` ")]
    assert len(rows) == 1, f"{document.name} has {len(rows)} rows of `{first_cell}`"
    return [cell.strip() for cell in rows[0].split("|")[1:-1]]


def code(text: str) -> list[str]:
    return re.findall(r"`([\w-]+)`", text)


# --- what must be named ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", msgspec.structs.fields(EngineSettings), ids=lambda field: field.name)
def test_every_setting_of_an_engine_is_described(field: msgspec.structs.FieldInfo) -> None:
    default = row(README, field.name)[1]
    if isinstance(field.default, int):
        assert default == str(field.default)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_metric_of_an_engine_is_described(metric: MetricSpec) -> None:
    counter = metric in (*COUNTERS, FALLBACKS, REFUSED)
    row(README, f"{metric.name}_total" if counter else metric.name)


@pytest.mark.parametrize(
    "message",
    sorted({*get_args(wire.PeerMessage)} - {*get_args(wire.LinkMessage)}, key=lambda message: message.__name__),
    ids=lambda message: message.__name__,
)
def test_every_message_between_workers_is_described_with_its_fields_in_order(message: type[msgspec.Struct]) -> None:
    assert tuple(code(row(ROOT / "docs/protocol.md", message.__name__)[1])) == message.__struct_fields__


RECORDS = (
    wire.EngineInfo, wire.Geometry, wire.GroupShape, wire.Load, wire.Strip, wire.Regions, wire.Interior, wire.Component,
    Ticket,
)  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.__name__)
def test_every_field_of_a_value_on_the_wire_is_described(record: type[msgspec.Struct]) -> None:
    text = (ROOT / "docs/protocol.md").read_text()
    assert [field for field in record.__struct_fields__ if f"`{field}" not in text] == []


def test_every_message_of_the_wire_module_belongs_to_a_union() -> None:
    """So that none escapes the tests above."""
    messages = {
        value for value in vars(wire).values() if isinstance(value, type) and issubclass(value, wire.Message)
    } - {wire.Message}
    assert messages == {*get_args(wire.LinkMessage), *get_args(wire.PeerMessage)}


def flags_of(source: Path) -> set[str]:
    """Every long flag that a file adds to a parser by its name."""
    return {
        argument.value
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
        for argument in node.args
        if isinstance(argument, ast.Constant) and str(argument.value).startswith("--")
    }


@pytest.mark.parametrize("source", sorted((ROOT / "vllm_llmd").glob("*.py")), ids=lambda source: source.name)
def test_every_flag_of_the_command_line_is_described(source: Path) -> None:
    texts = "\n".join(document.read_text() for document in DOCUMENTS)
    assert [flag for flag in sorted(flags_of(source)) if not re.search(rf"[` ]{flag}\b", texts)] == []


# --- what is named must exist -----------------------------------------------------------------------------------


def test_the_readme_names_exactly_the_two_commands() -> None:
    assert set(commands(README)) == {"demo", "test"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_relative_link_resolves(document: Path) -> None:
    targets = [target.partition("#")[0] for target in LINK.findall(document.read_text()) if "://" not in target]
    assert [target for target in targets if target and not (document.parent / target).exists()] == []


def defined(source: Path) -> set[str]:
    """Every function, method and class in a file."""
    nodes = ast.walk(ast.parse(source.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_function_that_is_named_exists(document: Path) -> None:
    for path, name in MENTION.findall(document.read_text()):
        assert (ROOT / path).is_file(), path
        assert not name or name in defined(ROOT / path), f"{path}:{name}"


@pytest.mark.parametrize("folder", ["kv_connector", "router"])
def test_every_file_is_on_the_map(folder: str) -> None:
    maps = (ROOT / "docs/structure.md").read_text().partition("## A map of")[2]
    on_the_map = {path for path, _ in MENTION.findall(maps)}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py") if path.stem != "__init__"}
    assert files - on_the_map == set()


def test_every_folder_of_the_router_is_on_the_map() -> None:
    on_the_map = re.findall(r"^\| \[`(\w+)/`\]", (ROOT / "docs/structure.md").read_text(), flags=re.M)
    assert sorted(on_the_map) == sorted(path.parent.name for path in (ROOT / "router").glob("*/__init__.py"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_make_target_that_is_named_exists(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(commands(document)) <= targets


def commands(document: Path) -> list[str]:
    """Make targets in what stands in backticks or is indented as code."""
    return re.findall(r"^(?: {4}|.*?`)make ([a-z-]+)", document.read_text(), flags=re.M)
