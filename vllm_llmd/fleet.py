"""A router and its engines on this machine, as one object: up when entered, gone without remains when left.

Owns the processes and their ports. Engines are ready when the router says so and their own server answers.
"""

import json
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from vllm_llmd.errors import LaunchError
from vllm_llmd.launch_process import Command, GuardedProcess, bare, reserve_port
from vllm_llmd.launch_spec import HOST, EngineSpec, FleetSpec, engine_argv, engine_env, router_argv, router_env
from vllm_llmd.router.settings import API_KEY_VARIABLE

_POLL_S = 0.2
_ANSWER_S = 5.0
_ROUTER_S = 300.0
"""A router that starts for the first time compiles its kernels, which takes minutes on a busy machine."""

Stage = Literal["loading", "ready", "ended"]


@dataclass(frozen=True)
class Status:
    """How one engine stands while a fleet starts; `note` is the last line of its log."""

    id: str
    role: str
    stage: Stage
    note: str


Progress = Callable[[Sequence[Status]], None]
"""Told several times a second, while engines start, how those that start stand."""


@dataclass
class Engine:
    """One engine of a running fleet; `process` changes when it is started again, the address does not."""

    spec: EngineSpec
    http: str
    process: GuardedProcess
    former_epoch: int | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def pgid(self) -> int:
        return self.process.pgid

    @property
    def log(self) -> Path:
        return self.process.log


class Fleet:
    """`with Fleet(spec) as fleet:` starts everything and waits until every engine is ready.

    Raises LaunchError, naming the log file, if a process ends or is not ready in time.
    """

    def __init__(self, spec: FleetSpec, progress: Progress | None = None, environ: Mapping[str, str] = os.environ):
        self.spec = spec
        self.router_http = ""
        self.router_zmq = ""
        self._progress = progress or (lambda _: None)
        self._environ = environ
        self._gpus = count_gpus(environ)
        self._router: GuardedProcess | None = None
        self._engines: dict[str, Engine] = {}
        self._ports: dict[str, socket.socket] = {}
        # Servers on this machine: a proxy must have no part in it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the router and every engine, and waits until they are ready."""
        self.spec.log_dir.mkdir(parents=True, exist_ok=True)
        self.start_router()
        for engine in self.spec.engines:
            self._spawn_engine(engine)
        self.await_ready()

    def stop(self) -> None:
        """Ends every process; returns when nothing is left of any."""
        processes = [*(engine.process for engine in self._engines.values()), *([self._router] if self._router else [])]
        for process in processes:
            process.ask_to_end()
        for process in processes:
            process.end()
        for port in self._ports.values():
            port.close()

    # --- engines ----------------------------------------------------------------------------------------------------

    @property
    def engines(self) -> tuple[Engine, ...]:
        return tuple(self._engines.values())

    def engine(self, engine_id: str) -> Engine:
        return self._engines[engine_id]

    def kill_engine(self, engine_id: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Signals the engine's whole process group. After SIGKILL, returns when nothing is left of it."""
        self._engines[engine_id].process.signal(number)

    def start_engine(self, engine_id: str) -> None:
        """Starts an ended engine again, under the same address, and waits until it is ready."""
        self._spawn_engine(self._engines[engine_id].spec)
        self.await_ready(engine_id)

    def await_ready(self, *engine_ids: str) -> None:
        """Returns when these engines, by default all, are ready."""
        waiting = engine_ids or tuple(self._engines)
        give_up = time.monotonic() + self.spec.start_timeout_s
        while True:
            statuses = self._statuses(waiting)
            self._progress(statuses)
            self.raise_if_ended(*waiting)
            if all(status.stage == "ready" for status in statuses):
                return
            if time.monotonic() > give_up:
                late = [str(self._engines[each.id].log) for each in statuses if each.stage != "ready"]
                raise LaunchError(f"not ready after {self.spec.start_timeout_s:.0f} s; see {', '.join(late)}")
            time.sleep(_POLL_S)

    def raise_if_ended(self, *engine_ids: str) -> None:
        """Raises LaunchError if the router or one of these engines, by default any, has ended."""
        engines = [self._engines[each] for each in (engine_ids or self._engines)]
        for process in (*(engine.process for engine in engines), *([self._router] if self._router else [])):
            if not process.running:
                raise process.failure()

    def wait(self) -> None:
        """Waits until a process ends, which raises LaunchError."""
        while True:
            self.raise_if_ended()
            time.sleep(_POLL_S)

    def _spawn_engine(self, spec: EngineSpec) -> None:
        """Starts an engine and returns at once."""
        former = self._engines.get(spec.id)
        if former is not None:
            former.process.end()
        if spec.id not in self._ports:
            self._ports[spec.id] = reserve_port(HOST)
        port = self._ports[spec.id].getsockname()[1]
        command = Command(
            name=f"engine {spec.id}",
            argv=engine_argv(self.spec, spec, port, self.router_zmq, self._gpus),
            env=engine_env(self.spec, spec, self._environ, self._gpus),
            log=self.spec.log_dir / f"{spec.id}.log",
        )
        epoch = self._listed().get(spec.id, {}).get("epoch")
        self._engines[spec.id] = Engine(spec, f"http://{HOST}:{port}", GuardedProcess(command), epoch)

    def _statuses(self, engine_ids: Sequence[str]) -> list[Status]:
        listed = self._listed()
        return [self._status(self._engines[each], listed.get(each, {})) for each in engine_ids]

    def _status(self, engine: Engine, listed: Mapping[str, Any]) -> Status:
        stage: Stage = "loading"
        if not engine.process.running:
            stage = "ended"
        elif listed.get("state") == "ready" and listed["epoch"] != engine.former_epoch and self._answers(engine):
            stage = "ready"
        lines = [line for line in map(bare, engine.process.output().splitlines()) if line]
        return Status(engine.spec.id, engine.spec.role, stage, lines[-1] if lines else "")

    def _answers(self, engine: Engine) -> bool:
        try:
            self._get(f"{engine.http}/health")
        except (OSError, ValueError):
            return False
        return True

    # --- router -----------------------------------------------------------------------------------------------------

    @property
    def router(self) -> GuardedProcess:
        assert self._router is not None, "the fleet has been started"
        return self._router

    def start_router(self) -> None:
        """Starts the router, under the address it had if it ran before; returns when it listens."""
        port = self.router_http.rpartition(":")[2] or "0"
        argv = router_argv(self.spec, int(port), self.router_zmq or f"tcp://{HOST}:0")
        log = self.spec.log_dir / "router.log"
        self._router = GuardedProcess(Command("router", argv, router_env(self._environ), log))
        endpoints = self._router_endpoints(self._router)
        self.router_http, self.router_zmq = endpoints["http"], endpoints["router"]

    def kill_router(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Signals the router. After SIGKILL, returns when nothing is left of it."""
        self.router.signal(number)

    def restart_router(self) -> None:
        """Kills the router and starts it again under the same address; engines find it by themselves."""
        self.kill_router()
        self.start_router()

    def models(self) -> list[str]:
        """The names under which the fleet serves its model."""
        return sorted({model for engine in self._listed().values() for model in engine["models"]})

    def _router_endpoints(self, router: GuardedProcess) -> dict[str, str]:
        give_up = time.monotonic() + _ROUTER_S
        while time.monotonic() < give_up:
            for line in router.output().splitlines(keepends=True):
                if line.startswith('{"http"') and line.endswith("\n"):
                    endpoints: dict[str, str] = json.loads(line)
                    return endpoints
            if not router.running:
                raise router.failure()
            time.sleep(0.02)
        raise LaunchError(f"the router does not listen after {_ROUTER_S:.0f} s; see {router.log}")

    def _listed(self) -> dict[str, dict[str, Any]]:
        """What the router says of its engines, by id; nothing while it cannot be asked."""
        try:
            engines = json.loads(self._get(f"{self.router_http}/admin/engines"))["engines"]
        except (OSError, ValueError):
            return {}
        return {engine["id"]: engine for engine in engines}

    def _get(self, url: str) -> bytes:
        request = urllib.request.Request(url)
        if key := self._environ.get(API_KEY_VARIABLE):
            request.add_header("Authorization", f"Bearer {key}")
        with self._opener.open(request, timeout=_ANSWER_S) as response:
            answer: bytes = response.read()
        return answer


def count_gpus(environ: Mapping[str, str]) -> int:
    """How many NVIDIA GPUs this machine has, without importing torch; 0 if the user hides them."""
    if environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    return sum(path.name.removeprefix("nvidia").isdecimal() for path in Path("/dev").glob("nvidia*"))
