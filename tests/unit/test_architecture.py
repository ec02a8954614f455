"""The arrows between our files, and where each third party lives. Reads the source; imports nothing of it."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("vllm_llmd", "kv_connector", "router", "kernels")
TOP_LEVEL = ("kernels", "kv_connector", "router")
"""Folders that are packages inside `vllm_llmd`, and must not be imported by their bare names."""

VALUES = ("names", "labels", "wire", "wire_link", "wire_peer", "errors", "clock", "due", "settings")
"""Modules of `vllm_llmd` that everything may import, and that import nothing but each other."""

IO = {
    "socket", "select", "selectors", "zmq", "aiohttp", "asyncio", "threading", "multiprocessing", "subprocess", "time",
    "os", "signal", "queue", "secrets", "tempfile", "shutil", "urllib", "http", "ssl", "sched",
}  # fmt: skip

PURE = (
    "kv_connector/lifecycle.py",
    "kv_connector/lease.py",
    "kv_connector/layout.py",
    "kv_connector/bridge.py",
    "kv_connector/topology.py",
    "kv_connector/destination.py",
    "kv_connector/source.py",
    "kv_connector/delivery.py",
    "kv_connector/exchange.py",
    "kv_connector/hints.py",
    "kv_connector/inflight.py",
    "kv_connector/room.py",
    "kv_connector/quarantine.py",
    "kv_connector/reads.py",
    "kv_connector/metrics.py",
    "kv_connector/report.py",
    "kv_connector/steps.py",
    "kv_connector/stats.py",
    "kv_connector/load.py",
    "kv_connector/seal.py",
    "kv_connector/ticket.py",
    "kv_connector/transport.py",
    "kernels/block_copy.py",
    "kernels/block_names.py",
    "kernels/kv_events.py",
    "kernels/kv_events_plain.py",
    "kernels/block_loops.py",
    "router/index/evictions.py",
    "router/index/prefixes.py",
    "router/index/texts.py",
    "router/learning/averages.py",
    "router/learning/text_lengths.py",
    "router/index/under_way.py",
    "router/members/ledger.py",
    "router/members/membership.py",
    "router/index/cursor.py",
    "router/fleet.py",
    "router/autoscaling/demand.py",
    "router/autoscaling/replicas.py",
    "router/autoscaling/scaling.py",
    "router/autoscaling/traffic.py",
    "router/stock/members.py",
    "router/candidates.py",
    "router/learning/engine_model.py",
    "router/learning/least_squares.py",
    "router/upstream/seen.py",
    "router/picker.py",
    "router/placement/filters.py",
    "router/placement/prospects.py",
    "router/placement/rosters.py",
    "router/members/selector.py",
    "router/placement/pairs_cpu.py",
    "router/placement/plans.py",
    "router/placement/sides.py",
    "router/placement/plans_cpu.py",
    "router/policy.py",
    "router/policies/approximate_prefix.py",
    "router/policies/cost.py",
    "router/policies/plain.py",
    "router/policies/prefix_first.py",
    "router/policies/weighted.py",
    "router/costs.py",
    "router/placement/misses.py",
    "router/placement/work.py",
    "router/members/rates.py",
    "router/decide.py",
    "router/audit/decisions.py",
    "router/audit/recording.py",
    "router/audit/recorded.py",
    "router/audit/replay.py",
    "router/audit/explain.py",
    "router/audit/barred.py",
    "router/waiting/admission.py",
    "router/waiting/flow.py",
    "router/waiting/preemption.py",
    "router/waiting/bodies.py",
    "router/members/occupancy.py",
    "router/waiting/saturation.py",
    "router/slo.py",
    "router/upstream/turns.py",
    "router/request.py",
    "router/upstream/rewrite.py",
    "router/upstream/sse.py",
    "router/upstream/usage.py",
    "router/learning/truth.py",
    "router/upstream/failover.py",
    "router/members/health.py",
    "router/members/outliers.py",
    "router/upstream/retries.py",
    "router/index/sessions.py",
    "router/upstream/told.py",
    "router/stock/report.py",
    "router/stock/sequence.py",
    "router/stock/settings.py",
    "router/index/agreement.py",
    "router/serving/chat_template.py",
    "vllm_llmd/launch_spec.py",
    "vllm_llmd/sim/asks.py",
    "vllm_llmd/sim/batch.py",
    "vllm_llmd/sim/block_pool.py",
    "vllm_llmd/sim/cache_change.py",
    "vllm_llmd/sim/exposition.py",
    "vllm_llmd/sim/failures.py",
    "vllm_llmd/sim/limits.py",
    "vllm_llmd/sim/load.py",
    "vllm_llmd/sim/offload.py",
    "vllm_llmd/sim/replies.py",
    "vllm_llmd/sim/requests.py",
    "vllm_llmd/sim/runs.py",
    "vllm_llmd/sim/scheduler.py",
    "vllm_llmd/sim/speeds.py",
    "vllm_llmd/sim/supplies.py",
    "vllm_llmd/sim/text.py",
    "vllm_llmd/sim/transfer.py",
    "vllm_llmd/sim/turns.py",
    "vllm_llmd/simulate/events.py",
    "vllm_llmd/simulate/member.py",
    "vllm_llmd/simulate/outcomes.py",
    "vllm_llmd/simulate/page.py",
    "vllm_llmd/simulate/report.py",
    "vllm_llmd/simulate/routing.py",
    "vllm_llmd/simulate/settings.py",
    "vllm_llmd/simulate/simulation.py",
    "vllm_llmd/simulate/svg.py",
    "vllm_llmd/simulate/table.py",
    "vllm_llmd/simulate/trace.py",
    "vllm_llmd/simulate/traffic.py",
    "vllm_llmd/simulate/waiting.py",
    "vllm_llmd/names.py",
    "vllm_llmd/labels.py",
    "vllm_llmd/tables.py",
    "vllm_llmd/errors.py",
    "vllm_llmd/wire.py",
    "vllm_llmd/wire_link.py",
    "vllm_llmd/wire_peer.py",
)

HOMES: dict[str, tuple[str, ...]] = {
    "nixl": ("kv_connector/nixl_transport.py",),
    "zmq": (
        "kv_connector/link.py",
        "kv_connector/peer_io.py",
        "kv_connector/peer_sockets.py",
        "kv_connector/own_ranks.py",
        "router/ingest.py",
        "router/stock/events.py",
        "router/zmq_receive.py",
        "router/stock/stream.py",
        "vllm_llmd/sim/bad_wire.py",
        "vllm_llmd/sim/engine.py",
        "vllm_llmd/sim/kv_events.py",
        "vllm_llmd/sim/main.py",
    ),
    "vllm": ("kv_connector/connector.py", "kv_connector/vllm_", "vllm_llmd/plugin.py"),
    "torch": ("kv_connector/vllm_", "kv_connector/device_", "vllm_llmd/model.py", "kernels/"),
    "opentelemetry": ("kv_connector/spans.py", "vllm_llmd/testing/collector.py"),
    "transformers": ("vllm_llmd/model.py",),
    "triton": ("kernels/",),
    "numba": ("kernels/",),
    "aiohttp": (
        "kv_connector/orders.py",
        "router/serving/front.py",
        "router/waiting/intake.py",
        "router/upstream/begun.py",
        "router/serving/call.py",
        "router/serving/dispatch.py",
        "router/serving/relay.py",
        "router/serving/admin.py",
        "router/serving/replies.py",
        "router/upstream/attempt.py",
        "router/stock/poll.py",
        "router/index/verify.py",
        "router/main.py",
        "vllm_llmd/sim/main.py",
        "vllm_llmd/sim/misbehaviour.py",
        "vllm_llmd/sim/server.py",
    ),
    "rich": ("vllm_llmd/cli.py", "vllm_llmd/demo.py", "vllm_llmd/launch"),
    "prometheus_client": ("router/observe.py", "router/autoscaling/observe.py", "router/stock/observe.py"),
    "jinja2": ("router/serving/chat_template.py", "router/serving/tokenizing.py"),
    "tokenizers": ("router/serving/tokenizing.py",),
    "uvloop": ("router/main.py", "vllm_llmd/sim/main.py"),
}
"""Third party -> the files, or folders and beginnings of file names, that may import it."""

ROUTER = (
    "members", "zmq_receive", "stock/settings", "request", "candidates", "slo", "settings", "policy", "costs", "picker",
    "upstream", "decide", "index", "index/verify", "placement", "policies", "learning", "autoscaling", "fleet",
    "autoscaling/observe", "audit", "waiting", "observe", "waiting/room", "ingest", "stock", "serving", "main",
)  # fmt: skip
"""The router's folders and top modules in order: each imports only of those before it. Four modules have places of
their own: what flags say is read first of all, and metrics and commands look at what their folder's rest is part of."""

SPEAKS_TO_A_PERSON = ("vllm_llmd/cli.py", "vllm_llmd/demo.py", "vllm_llmd/launch", "vllm_llmd/model.py")


@dataclass(frozen=True)
class Import:
    """`module` as it is written; `line` for the message."""

    module: str
    line: int

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def sources() -> list[str]:
    """Every source file, by its path from the root. The symlinks in `vllm_llmd` are not followed."""
    return sorted(
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    )


@cache
def tree(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text())


def imports(source: str) -> Iterator[Import]:
    for node in ast.walk(tree(source)):
        match node:
            case ast.Import(names=names):
                yield from (Import(alias.name, node.lineno) for alias in names)
            case ast.ImportFrom(module=str(module), level=0, names=names):
                yield from (Import(f"{module}.{alias.name}", node.lineno) for alias in names)
            case ast.ImportFrom(level=level) if level:
                pytest.fail(f"{source}:{node.lineno}: a relative import; write vllm_llmd.…")


def ours(source: str) -> list[Import]:
    return [each for each in imports(source) if each.top == "vllm_llmd"]


def in_folder(folder: str) -> list[str]:
    return [source for source in sources() if source.startswith(f"{folder}/")]


def offences(source: str, names: set[str]) -> list[str]:
    return [f"{source}:{each.line} imports {each.module}" for each in imports(source) if each.top in names]


def test_all_four_folders_are_read() -> None:
    assert {source.partition("/")[0] for source in sources()} == set(FOLDERS)


@pytest.mark.parametrize("name", VALUES)
def test_values_import_nothing_of_ours_but_values(name: str) -> None:
    allowed = {f"vllm_llmd.{value}" for value in VALUES}
    strange = [each for each in ours(f"vllm_llmd/{name}.py") if ".".join(each.module.split(".")[:2]) not in allowed]
    assert strange == []
    assert offences(f"vllm_llmd/{name}.py", {"torch", "vllm", "zmq", "nixl", "aiohttp"}) == []


@pytest.mark.parametrize("source", in_folder("router"))
def test_the_router_imports_neither_vllm_nor_torch_nor_the_connector(source: str) -> None:
    assert offences(source, {"vllm", "torch", "nixl", "transformers"}) == []
    assert [each for each in ours(source) if each.module.startswith("vllm_llmd.kv_connector")] == []


def part_of_router(path: str) -> str:
    """Where a module of the router, or what is imported from one, stands in ROUTER."""
    return max((part for part in ROUTER if f"{path}/".startswith(f"{part}/")), key=len, default=path)


def inside_router(source: str) -> str:
    return source.removeprefix("router/").removesuffix(".py").removesuffix("/__init__")


def test_every_module_of_the_router_has_its_place() -> None:
    modules = [inside_router(source) for source in in_folder("router") if source != "router/__init__.py"]
    assert {part_of_router(module) for module in modules} == {*ROUTER}


@pytest.mark.parametrize("source", sorted({*in_folder("router")} - {"router/__init__.py"}))
def test_no_part_of_the_router_imports_what_comes_after_it(source: str) -> None:
    place = ROUTER.index(part_of_router(inside_router(source)))
    of_router = [each.module for each in ours(source) if each.module.startswith("vllm_llmd.router.")]
    parts = [part_of_router(module.removeprefix("vllm_llmd.router.").replace(".", "/")) for module in of_router]
    assert [part for part in parts if ROUTER.index(part) > place] == []


@pytest.mark.parametrize("source", in_folder("kv_connector"))
def test_the_connector_does_not_import_the_router(source: str) -> None:
    assert [each for each in ours(source) if each.module.startswith("vllm_llmd.router")] == []


@pytest.mark.parametrize("source", in_folder("kernels"))
def test_kernels_import_only_names_and_errors(source: str) -> None:
    allowed = ("vllm_llmd.names", "vllm_llmd.errors", "vllm_llmd.kernels")
    assert [each for each in ours(source) if not each.module.startswith(allowed)] == []


@pytest.mark.parametrize("third_party", HOMES)
def test_a_third_party_lives_in_few_files(third_party: str) -> None:
    homes = (*HOMES[third_party], "vllm_llmd/testing/")
    strangers = [source for source in sources() if not source.startswith(homes)]
    assert [offence for source in strangers for offence in offences(source, {third_party})] == []


@pytest.mark.parametrize("source", PURE)
def test_a_pure_file_imports_no_io(source: str) -> None:
    assert offences(source, IO) == []


@pytest.mark.parametrize("source", PURE)
def test_a_pure_file_takes_chance_as_an_argument(source: str) -> None:
    """`random.Random` may be named as a type; the module's own generator may not be called."""
    calls = [
        f"{source}:{node.lineno} calls {ast.unparse(node.func)}"
        for node in ast.walk(tree(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("random.", "uuid."))
    ]
    assert calls == []


@pytest.mark.parametrize("source", sources())
def test_no_folder_is_imported_by_its_bare_name(source: str) -> None:
    assert offences(source, set(TOP_LEVEL)) == []


@pytest.mark.parametrize("source", sources())
def test_only_what_speaks_to_a_person_prints(source: str) -> None:
    if source.startswith(SPEAKS_TO_A_PERSON):
        return
    prints = [
        f"{source}:{node.lineno}"
        for node in ast.walk(tree(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert prints == []


@pytest.mark.parametrize("source", sources())
def test_a_file_is_named_for_what_it_does(source: str) -> None:
    assert Path(source).stem not in {"utils", "util", "common", "base", "helpers", "helper", "misc"}


@pytest.mark.parametrize("source", sources())
def test_a_module_says_in_at_most_eight_lines_what_it_owns(source: str) -> None:
    docstring = ast.get_docstring(tree(source))
    assert docstring, f"{source} has no docstring"
    assert len(docstring.splitlines()) <= 8
