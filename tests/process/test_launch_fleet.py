"""A launcher, its guards and a real router over an engine that is not vLLM. Nothing may outlive the launcher."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_llmd.errors import LaunchError
from vllm_llmd.fleet import Fleet, Status
from vllm_llmd.launch_spec import FleetSpec, engines_by_role

DEADLINE_S = 280.0
MARK = "VLLM_LLMD_TEST_MARK"

ENGINE = """
import argparse, http.server, json, secrets, subprocess, sys
from vllm_llmd.kv_connector.link import EngineLink, LinkSettings
from vllm_llmd.wire import EngineInfo, Load

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--kv-transfer-config", type=json.loads)
parser.add_argument("--crash", action="store_true")
parser.add_argument("--never-ready", action="store_true")
args, rest = parser.parse_known_args()
print("started with", *rest, flush=True)
subprocess.Popen(["sleep", "600"])
subprocess.Popen(["sleep", "600"], start_new_session=True)
if args.crash:
    raise ValueError("the model has no weights")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

server = http.server.ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
config = args.kv_transfer_config
extra = config["kv_connector_extra_config"]
info = EngineInfo(config["engine_id"], secrets.randbits(63), extra["role"], f"http://127.0.0.1:{args.port}",
                  ["fake"], 16, 1000, 4096, "fake", [])
if not args.never_ready:
    EngineLink(LinkSettings(info, (extra["router"],), Load)).start()
server.serve_forever()
"""

LAUNCHER = """
import sys
from pathlib import Path
from rich.console import Console
from vllm_llmd import cli, launch, launch_spec

_, engine, *arguments = sys.argv
launch.FleetSpec = lambda **given: launch_spec.FleetSpec(engine_command=(sys.executable, engine), **given)
sys.argv = ["vllm-llmd", *arguments]
sys.exit(cli.main())
"""


@pytest.fixture
def mark() -> Iterator[str]:
    """Every process started with it in its environment is gone at the end, or the test has failed."""
    value = uuid.uuid4().hex
    yield value
    left = marked(value)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def engine_script(tmp_path: Path) -> Path:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    return script


@pytest.fixture
def spec(tmp_path: Path, model: Path, engine_script: Path) -> FleetSpec:
    return FleetSpec(
        model=model,
        engines=engines_by_role(1, 1, 0),
        log_dir=tmp_path / "logs",
        engine_command=(sys.executable, str(engine_script)),
        start_timeout_s=DEADLINE_S,
    )


@pytest.fixture
def environ(mark: str) -> dict[str, str]:
    return {**os.environ, MARK: mark}


def marked(value: str) -> list[int]:
    """Processes, zombies aside, that carry the mark."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={value}".encode() in (process / "environ").read_bytes():
                pids.append(int(process.name))
        except OSError:
            continue  # it has ended meanwhile, or is not ours
    return pids


def until(done: Callable[[], object], what: str) -> None:
    give_up = time.monotonic() + DEADLINE_S
    while not done():
        assert time.monotonic() < give_up, what
        time.sleep(0.05)


class Launcher:
    """`vllm-llmd up` with the engine script in vLLM's place."""

    def __init__(self, tmp_path: Path, environ: dict[str, str], *flags: str) -> None:
        script = tmp_path / "launcher.py"
        script.write_text(LAUNCHER)
        self.logs = tmp_path / "logs"
        self.output = tmp_path / "launcher.log"
        argv = [sys.executable, str(script), str(tmp_path / "engine.py"), "up", "--model", str(tmp_path / "model")]
        argv += ["--prefill", "1", "--decode", "1", "--log-dir", str(self.logs), *flags]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, env=environ)

    def said(self) -> str:
        return self.output.read_text()

    def ready(self) -> None:
        until(lambda: "Ready. Try it:" in self.said() or self.process.poll() is not None, "it was never ready")
        assert self.process.poll() is None, self.said()

    def logged(self, name: str, text: str) -> None:
        log = self.logs / f"{name}.log"
        until(lambda: log.exists() and text in log.read_text(), f"{log} never said {text!r}")


Up = Callable[..., Launcher]


@pytest.fixture
def up(tmp_path: Path, model: Path, engine_script: Path, environ: dict[str, str]) -> Iterator[Up]:
    """Starts launchers, with more flags; none of them outlives the test."""
    launchers: list[Launcher] = []

    def start(*flags: str) -> Launcher:
        launchers.append(Launcher(tmp_path, environ, *flags))
        return launchers[-1]

    yield start
    for launcher in launchers:
        launcher.process.kill()
        launcher.process.wait()
    until(lambda: not marked(environ[MARK]), "something was left behind")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_a_launcher_that_is_told_to_stop_or_killed_leaves_no_process(
    up: Up, environ: dict[str, str], number: signal.Signals, status: int
) -> None:
    launcher = up()
    launcher.ready()
    assert "/v1/chat/completions" in launcher.said()
    assert len(marked(environ[MARK])) >= 1 + 2 + 2 * 4  # launcher; router; engines: guard, server, two sleepers
    launcher.process.send_signal(number)
    assert launcher.process.wait(DEADLINE_S) == status
    until(lambda: not marked(environ[MARK]), "something was left behind")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_launcher_that_ends_while_engines_load_leaves_no_process(
    up: Up, environ: dict[str, str], number: signal.Signals, status: int
) -> None:
    launcher = up("--", "--never-ready")
    launcher.logged("decode-0", "started with")
    launcher.process.send_signal(number)
    assert launcher.process.wait(DEADLINE_S) == status
    until(lambda: not marked(environ[MARK]), "something was left behind")


def test_a_crashing_engine_ends_the_launcher_with_one_error_that_names_its_log(up: Up, environ: dict[str, str]) -> None:
    launcher = up("--", "--crash")
    assert launcher.process.wait(DEADLINE_S) == 1
    said = launcher.said()
    assert "error: engine " in said
    assert "has ended with exit status 1; its log is" in said
    assert "-0.log\n  ValueError: the model has no weights" in said
    assert "Traceback" not in said


def test_an_engine_that_dies_later_ends_the_launcher_and_everything_else(up: Up, environ: dict[str, str]) -> None:
    launcher = up()
    launcher.ready()
    servers = [pid for pid in marked(environ[MARK]) if arguments(pid)[1].endswith("/engine.py")]
    os.kill(servers[0], signal.SIGKILL)
    assert launcher.process.wait(DEADLINE_S) == 1
    assert "has ended with signal SIGKILL" in launcher.said()


def test_flags_after_two_dashes_reach_every_engine(up: Up, environ: dict[str, str]) -> None:
    launcher = up("--", "--max-model-len", "4096")
    launcher.ready()
    for name in ("prefill-0", "decode-0"):
        assert "--max-model-len 4096" in (launcher.logs / f"{name}.log").read_text()
    launcher.process.terminate()
    assert launcher.process.wait(DEADLINE_S) == 0


def test_progress_ends_with_every_engine_ready(spec: FleetSpec, environ: dict[str, str]) -> None:
    seen: list[list[Status]] = []
    with Fleet(spec, lambda statuses: seen.append(list(statuses)), environ) as fleet:
        assert [(status.id, status.stage) for status in seen[-1]] == [("prefill-0", "ready"), ("decode-0", "ready")]
        assert fleet.models() == ["fake"]
        assert {engine.log.name for engine in fleet.engines} == {"prefill-0.log", "decode-0.log"}


def test_a_killed_engine_is_started_again_under_its_address(spec: FleetSpec, environ: dict[str, str]) -> None:
    with Fleet(spec, environ=environ) as fleet:
        engine = fleet.engine("prefill-0")
        pid, http = engine.pid, engine.http
        fleet.kill_engine("prefill-0")
        assert not engine.process.running
        with pytest.raises(LaunchError, match="engine prefill-0 has ended with signal SIGKILL"):
            fleet.raise_if_ended()
        fleet.raise_if_ended("decode-0")
        fleet.start_engine("prefill-0")
        assert fleet.engine("prefill-0").http == http
        assert fleet.engine("prefill-0").pid != pid
        fleet.raise_if_ended()


def test_a_stopped_engine_is_not_taken_for_a_dead_one(spec: FleetSpec, environ: dict[str, str]) -> None:
    with Fleet(spec, environ=environ) as fleet:
        engine = fleet.engine("decode-0")
        fleet.kill_engine("decode-0", signal.SIGSTOP)
        until(lambda: state(engine.pid) == "T", "the engine was not stopped")
        fleet.raise_if_ended()
        fleet.kill_engine("decode-0", signal.SIGCONT)
        until(lambda: state(engine.pid) != "T", "the engine was not continued")
        fleet.kill_engine("decode-0", signal.SIGSTOP)  # a fleet with a stopped engine ends all the same


def test_a_restarted_router_has_the_address_it_had(spec: FleetSpec, environ: dict[str, str]) -> None:
    with Fleet(spec, environ=environ) as fleet:
        before = fleet.router_http, fleet.router_zmq, fleet.router.pid
        fleet.restart_router()
        fleet.await_ready()
        assert (fleet.router_http, fleet.router_zmq) == before[:2]
        assert fleet.router.pid != before[2]


def test_a_router_that_cannot_listen_is_reported_with_its_log(spec: FleetSpec, environ: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = ("--port", str(taken.getsockname()[1]))
        fleet = Fleet(replaced(spec, router_flags=flags), environ=environ)
        with pytest.raises(LaunchError, match=r"router has ended with exit status 2(.|\n)*must be free"), fleet:
            pass


def test_an_engine_that_is_never_ready_is_given_up_with_its_log(spec: FleetSpec, environ: dict[str, str]) -> None:
    fleet = Fleet(replaced(spec, engine_flags=("--never-ready",), start_timeout_s=1.0), environ=environ)
    with pytest.raises(LaunchError, match=r"not ready after 1 s; see .*prefill-0.log, .*decode-0.log"), fleet:
        pass


def test_a_command_that_does_not_exist_is_an_error(spec: FleetSpec, environ: dict[str, str]) -> None:
    fleet = Fleet(replaced(spec, engine_command=("/nonexistent/server",)), environ=environ)
    with pytest.raises(LaunchError, match="cannot run /nonexistent/server"), fleet:
        pass


def replaced(spec: FleetSpec, **changes: object) -> FleetSpec:
    return FleetSpec(**{**{name: getattr(spec, name) for name in spec.__dataclass_fields__}, **changes})  # type: ignore[arg-type]


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
