"""The engines that every arm uses: started once, each on a core of its own, with caches that can be emptied.

They have our connector whatever is in front of them. To routers that are not ours they are plain vLLM servers.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pd_engines import Engine, await_all, fetched, free_port, started
from pd_environ import for_transport
from pd_requests import MODEL_NAME, BenchError
from routing_plan import BLOCK_TOKENS, CACHE_BLOCKS

from vllm_llmd.launch_process import Command
from vllm_llmd.launch_spec import HOST, EngineSpec, FleetSpec, engine_argv, engine_env

STEP_TOKENS: Final = 512
ENGINE_FLAGS: Final = (
    *("--served-model-name", MODEL_NAME, "--block-size", str(BLOCK_TOKENS)),
    *(
        "--max-model-len",
        "4096",
        "--max-num-batched-tokens",
        str(STEP_TOKENS),
        "--num-gpu-blocks-override",
        str(CACHE_BLOCKS),
    ),
    "--disable-uvicorn-access-log",
)
FAST_BFLOAT16: Final = {"avx512f", "bf16"}
EMPTYING_S: Final = 60.0
PROBE_BLOCKS: Final = 4
_SERVED: Final = re.compile(r"^vllm:request_success_total\{.*\} (\S+)$", re.MULTILINE)


def fast_dtype(cpuinfo: str) -> str:
    """What a processor multiplies fast, by what the kernel says of it. bfloat16 needs AVX-512, or ARM's own."""
    words = set(cpuinfo.split())
    return "bfloat16" if words & FAST_BFLOAT16 else "float32"


@dataclass(frozen=True)
class Site:
    """Where the engines run, and the endpoint at which they look for a router of ours, whenever there is one."""

    model: Path
    dtype: str
    log_dir: Path
    engines: int
    link: str

    @property
    def environ(self) -> dict[str, str]:
        return for_transport(os.environ, "shm") | {"VLLM_SERVER_DEV_MODE": "1"}

    @property
    def fleet(self) -> FleetSpec:
        specs = tuple(EngineSpec(id=f"engine-{number}") for number in range(self.engines))
        flags = (*ENGINE_FLAGS, "--dtype", self.dtype)
        return FleetSpec(model=self.model, engines=specs, log_dir=self.log_dir, engine_flags=flags)


@contextmanager
def engines(site: Site) -> Iterator[Sequence[Engine]]:
    """Ready to serve. Raises LaunchError."""
    site.log_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        running = [stack.enter_context(_engine(site, place)) for place in range(site.engines)]
        await_all(running, lambda engine: fetched(f"{engine.http}/health") is not None)
        yield running


@contextmanager
def _engine(site: Site, place: int) -> Iterator[Engine]:
    """As soon as it has been started, with all its threads on one core; with more engines than cores, they share."""
    spec = site.fleet.engines[place]
    cores = sorted(os.sched_getaffinity(0))
    with free_port() as http:
        argv = engine_argv(site.fleet, spec, http, site.link, gpus=0)
        env = engine_env(site.fleet, spec, site.environ, gpus=0)
        with ExitStack() as stack:
            os.sched_setaffinity(0, {cores[place % len(cores)]})  # inherited
            try:
                command = Command(spec.id, argv, env, site.log_dir / f"{spec.id}.log")
                process = stack.enter_context(started(command))
            finally:
                os.sched_setaffinity(0, cores)
            yield Engine(spec.id, f"http://{HOST}:{http}", process)


def empty(running: Sequence[Engine], indexed: Callable[[], int]) -> None:
    """Takes everything out of the engines' caches, and sees that it is gone, and `indexed` nowhere. Raises BenchError.

    vLLM refuses while blocks are in use, as they may be for a moment after the last answer. The question that sees
    whether it worked has the engine take a step, too, in which it tells our router that its cache is empty.
    """
    give_up = time.monotonic() + EMPTYING_S
    for engine in running:
        while _post(f"{engine.http}/reset_prefix_cache", {}) is None or _cached(engine):
            if time.monotonic() > give_up:
                raise BenchError(f"the cache of {engine.name} cannot be emptied: is something still running there?")
            time.sleep(0.2)
    while indexed() > len(running) * PROBE_BLOCKS:
        if time.monotonic() > give_up:
            raise BenchError(f"the router believes that {indexed()} blocks are cached in engines that are empty")
        time.sleep(0.2)


def _cached(engine: Engine) -> int:
    """Tokens that it has of a prompt that is asked every time."""
    body = {"model": MODEL_NAME, "prompt": [1000 + n for n in range(PROBE_BLOCKS * BLOCK_TOKENS)], "max_tokens": 1}
    answer = _post(f"{engine.http}/v1/completions", body)
    if answer is None:
        raise BenchError(f"{engine.name} does not answer")
    details = answer["usage"]["prompt_tokens_details"] or {}
    return int(details.get("cached_tokens") or 0)


def served(running: Sequence[Engine]) -> list[int]:
    """How many requests each has served so far."""
    pages = [(fetched(f"{engine.http}/metrics") or b"").decode() for engine in running]
    return [round(sum(map(float, _SERVED.findall(page)))) for page in pages]


def _post(url: str, body: Mapping[str, object]) -> dict[str, dict[str, dict[str, int] | None]] | None:
    """What is answered, {} if that is nothing; None for an error."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=EMPTYING_S) as response:
            return json.loads(response.read() or b"{}") or {}
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        raise BenchError(f"{url} did not answer: {error}") from error
