"""What is in front of the engines, one at a time: our router with one policy or another, or vLLM's router."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pd_engines import Engine, Router, await_all, endpoints, fetched, free_port, is_ready, started

from vllm_llmd.launch_process import Command
from vllm_llmd.launch_spec import HOST, ROUTER, router_env

OURS: Final = "ours"
IN_TURN: Final = "rr"
ROUND_ROBINS: Final = (IN_TURN, "vllm-rr")
"""The yardsticks; the better one counts."""

POLICIES: Final[Mapping[str, Sequence[str]]] = {
    IN_TURN: ("--policy", "round_robin"),
    "approx": ("--policy", "approximate_prefix"),
    OURS: (),
}
"""Arms with our router: its flags beside the endpoints. Ours is what it does by itself."""

VLLM_POLICIES: Final = {"vllm-rr": "round_robin", "vllm-cache": "cache_aware"}
"""Arms with vLLM's router, with its own defaults otherwise."""

ARMS: Final = ("rr", "approx", "vllm-rr", "vllm-cache", OURS)
_COUNTED: Final = re.compile(r"^(vllm_llmd_\w+?(?:_total)?(?:\{[^}]*\})?) ([0-9.e+]+)$", re.MULTILINE)


@dataclass(frozen=True)
class Places:
    """Where routers are started: the command of vLLM's, the link at which engines look for ours, and the logs."""

    vllm_router: str
    link: str
    log_dir: Path


@dataclass(frozen=True)
class Front:
    """A running router. `told` is what it says of itself, `indexed` how many blocks it believes to be cached.

    For one that is not ours, that is {} and 0.
    """

    http: str
    told: Callable[[], dict[str, object]]
    indexed: Callable[[], int]


@contextmanager
def front(arm: str, running: Sequence[Engine], places: Places) -> Iterator[Front]:
    """A fresh router in front of these engines, ready to serve. Raises LaunchError."""
    with ExitStack() as stack:
        if arm in POLICIES:
            yield stack.enter_context(_ours(arm, running, places))
        else:
            yield stack.enter_context(_theirs(arm, running, places))


@contextmanager
def _ours(arm: str, running: Sequence[Engine], places: Places) -> Iterator[Front]:
    argv = [*ROUTER, "--host", HOST, "--port", "0", "--bind", places.link, *POLICIES[arm]]
    with started(Command(arm, argv, router_env(os.environ), places.log_dir / f"{arm}.log")) as process:
        router = endpoints(process)
        await_all(running, lambda engine: is_ready(router, engine))
        yield Front(router.http, lambda: _told(router), lambda: _indexed(router))


def _indexed(router: Router) -> int:
    listed = json.loads(fetched(f"{router.http}/admin/engines") or b'{"engines": []}')
    return sum(engine["blocks_indexed"] for engine in listed["engines"])


def _told(router: Router) -> dict[str, object]:
    """What it thinks of its engines, and the counters that it has moved."""
    listed = json.loads(fetched(f"{router.http}/admin/engines") or b"{}")
    page = (fetched(f"{router.http}/metrics") or b"").decode()
    counted = {name: float(value) for name, value in _COUNTED.findall(page) if float(value) and "bucket" not in name}
    return {**listed, "counted": counted}


@contextmanager
def _theirs(arm: str, running: Sequence[Engine], places: Places) -> Iterator[Front]:
    with free_port() as http, free_port() as metrics:
        workers = [engine.http for engine in running]
        argv = [places.vllm_router, "--host", HOST, "--port", str(http), "--policy", VLLM_POLICIES[arm]]
        argv += ["--prometheus-port", str(metrics), "--worker-urls", *workers]
        with started(Command(arm, argv, os.environ, places.log_dir / f"{arm}.log")) as process:
            url = f"http://{HOST}:{http}"
            await_all([Engine(arm, url, process)], lambda router: fetched(f"{router.http}/health") is not None)
            yield Front(url, dict, int)
