"""The engines of one block: started together, frozen while others are measured, gone without remains.

Ours come up with a router, as the launcher starts them; vLLM's own connectors, and the engine without any, as plain
servers. All have the same flags and environment but for the connector.
"""

import asyncio
import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pd_environ import for_transport
from pd_process import SessionProcess
from pd_requests import MODEL_NAME
from pd_values import Transport

from vllm_llmd.errors import LaunchError
from vllm_llmd.launch_process import Command, GuardedProcess, reserve_port
from vllm_llmd.launch_spec import (
    CPU_ENV,
    CPU_FLAGS,
    HOST,
    VLLM_SERVER,
    EngineSpec,
    FleetSpec,
    engine_argv,
    engine_env,
    router_argv,
    router_env,
)

ENGINE_FLAGS = (
    *("--served-model-name", MODEL_NAME, "--dtype", "float32"),
    *("--max-model-len", "8000", "--max-num-batched-tokens", "512", "--num-gpu-blocks-override", "256"),
)
"""256 blocks hold one prompt of 6,000 tokens or eight of 512. A small cache has been touched as a whole after two
prompts; in a large one every request of a run meets memory that the kernel has yet to provide."""

PATIENT_ROUTER = ("--stale-after-ms", "86400000", "--gone-after-ms", "172800000")
"""A frozen engine sends no heartbeats, which must not cost its membership."""

SETTLE_S = 0.3
"""After a thaw, for what has piled up: heartbeats, timers; after a request, for acknowledgements under way."""

_POLL_S = 0.2
_START_S = 600.0


@dataclass(frozen=True)
class InTree:
    """One of vLLM's own connectors: its class, and the module to load it from if it is not vLLM's."""

    connector: str
    module: str | None = None


IN_TREE: Mapping[str, InTree] = {
    "pull": InTree("NixlConnector"),
    "push": InTree("NixlPushConnector"),
    "pull_quiet": InTree("QuietPullConnector", "quiet_nixl"),
    "push_quiet": InTree("QuietPushConnector", "quiet_nixl"),
}

LAYER_SETTING = {"stream": "layers"}

OURS_ALONE = (EngineSpec(id="one"),)
OURS = (
    EngineSpec(id="chunk", role="prefill"),
    EngineSpec(id="layer", role="prefill", extra_config=LAYER_SETTING),
    EngineSpec(id="decode", role="decode"),
)
"""How a prefill is streamed is up to the engine that computes it: one for each of our arms."""


@dataclass(frozen=True)
class Engine:
    """A running engine."""

    name: str
    http: str
    process: GuardedProcess


@dataclass(frozen=True)
class Site:
    """What the engines of one block have in common."""

    model: Path
    transport: Transport
    log_dir: Path

    @property
    def environ(self) -> dict[str, str]:
        return for_transport(os.environ, self.transport)

    @property
    def fleet(self) -> FleetSpec:
        return FleetSpec(
            model=self.model,
            engines=OURS,
            log_dir=self.log_dir,
            router_flags=PATIENT_ROUTER,
            engine_flags=ENGINE_FLAGS,
        )


@dataclass(frozen=True)
class Router:
    """A running router's endpoints."""

    http: str
    zmq: str


@contextmanager
def running(site: Site, ours: Sequence[EngineSpec], theirs: Sequence[str]) -> Iterator[Mapping[str, Engine]]:
    """Engines by name, ready to serve: `ours`, and those of `theirs`.

    Each of `theirs` is a key of IN_TREE: a pair called `prefill` and `decode`; or `none`: one engine of that name
    without a connector. Raises LaunchError.
    """
    site.log_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        engines = [stack.enter_context(_server(site, *each)) for kind in theirs for each in _servers(kind)]
        if ours:
            router = stack.enter_context(_router(site))
            members = [stack.enter_context(_member(site, spec, router)) for spec in ours]
            await_all(members, lambda engine: is_ready(router, engine))
            engines += members
        await_all(engines, lambda engine: fetched(f"{engine.http}/health") is not None)
        yield {engine.name: engine for engine in engines}


def _servers(theirs: str) -> list[tuple[str, dict[str, Any] | None]]:
    """Name and transfer configuration of every engine of a kind."""
    if theirs == "none":
        return [("none", None)]
    kind = IN_TREE[theirs]
    transfer = {"kv_connector": kind.connector}
    if kind.module is not None:
        transfer["kv_connector_module_path"] = kind.module
    return [("prefill", {**transfer, "kv_role": "kv_producer"}), ("decode", {**transfer, "kv_role": "kv_consumer"})]


@contextmanager
def _server(site: Site, name: str, transfer: dict[str, Any] | None) -> Iterator[Engine]:
    """A vLLM server that is not ours, as soon as it has been started."""
    with free_port() as http, free_port() as side_channel:
        argv = [*VLLM_SERVER, "--model", str(site.model), "--host", HOST, "--port", str(http)]
        if transfer is not None:
            argv += ["--kv-transfer-config", json.dumps(transfer)]
        own = {"VLLM_NIXL_SIDE_CHANNEL_HOST": HOST, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel)}
        env = {**CPU_ENV, **site.environ, **own}
        argv += [*CPU_FLAGS, *ENGINE_FLAGS]
        with started(Command(name, argv, env, site.log_dir / f"{name}.log")) as process:
            yield Engine(name, f"http://{HOST}:{http}", process)


@contextmanager
def _member(site: Site, spec: EngineSpec, router: Router) -> Iterator[Engine]:
    """An engine of ours, as soon as it has been started."""
    with free_port() as http:
        argv = engine_argv(site.fleet, spec, http, router.zmq, gpus=0)
        env = engine_env(site.fleet, spec, site.environ, gpus=0)
        with started(Command(spec.id, argv, env, site.log_dir / f"{spec.id}.log")) as process:
            yield Engine(spec.id, f"http://{HOST}:{http}", process)


@contextmanager
def _router(site: Site) -> Iterator[Router]:
    argv = router_argv(site.fleet, 0, f"tcp://{HOST}:0")
    with started(Command("router", argv, router_env(site.environ), site.log_dir / "router.log")) as process:
        yield endpoints(process)


def endpoints(router: GuardedProcess) -> Router:
    """What a router of ours prints as soon as it listens. Raises LaunchError if it ends first."""
    while True:
        for line in router.output().splitlines(keepends=True):
            if line.startswith('{"http"') and line.endswith("\n"):
                told = json.loads(line)
                return Router(told["http"], told["router"])
        if not router.running:
            raise router.failure()
        time.sleep(_POLL_S)


@contextmanager
def started(command: Command) -> Iterator[GuardedProcess]:
    """The process, for as long as the context lasts. Raises LaunchError."""
    process = SessionProcess(command)
    try:
        yield process
    finally:
        process.end()


@contextmanager
def free_port() -> Iterator[int]:
    """A port that is kept for a server."""
    with reserve_port(HOST) as held:
        yield held.getsockname()[1]


def await_all(engines: Sequence[Engine], is_ready: Callable[[Engine], bool]) -> None:
    """Returns when all are. Raises LaunchError if one ends or takes too long."""
    give_up = time.monotonic() + _START_S
    for engine in engines:
        while not is_ready(engine):
            if not engine.process.running:
                raise engine.process.failure()
            if time.monotonic() > give_up:
                raise LaunchError(f"{engine.name} is not ready after {_START_S:.0f} s; see {engine.process.log}")
            time.sleep(_POLL_S)


def is_ready(router: Router, engine: Engine) -> bool:
    """Whether the router says so."""
    listed = fetched(f"{router.http}/admin/engines") or b'{"engines": []}'
    return any(each["id"] == engine.name and each["state"] == "ready" for each in json.loads(listed)["engines"])


def fetched(url: str) -> bytes | None:
    """What a server on this machine answers; None while it does not."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5.0) as response:
            answer: bytes = response.read()
    except OSError:
        return None
    return answer


class Freezer:
    """Lets only the engines run that take part in what is measured; stops the others, whole process groups.

    An idle engine of vLLM's own connectors keeps a core busy, and any engine answers timers.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines
        self._running = set(engines)

    async def only(self, *names: str) -> None:
        """Returns when these engines run and have settled."""
        await asyncio.sleep(SETTLE_S)
        for name in self._running - set(names):
            self._engines[name].process.signal(signal.SIGSTOP)
        thawed = set(names) - self._running
        for name in thawed:
            self._engines[name].process.signal(signal.SIGCONT)
        self._running = set(names)
        if thawed:
            await asyncio.sleep(SETTLE_S)
