"""Plays a trace against a simulated fleet, once per policy, and reports. `vllm-llmd simulate`.

The table and the speed go to stdout; JSON and HTML to files, if asked for.
"""

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from vllm_llmd.errors import ConfigError
from vllm_llmd.kernels import hash_chain_cpu, prefix_table_cpu
from vllm_llmd.program import write_file
from vllm_llmd.router import policies
from vllm_llmd.router.index import evictions
from vllm_llmd.router.placement import plans_cpu
from vllm_llmd.router.policy import Policy, PolicySettings
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.simulate import traffic
from vllm_llmd.simulate.events import Events
from vllm_llmd.simulate.member import Member
from vllm_llmd.simulate.outcomes import Played
from vllm_llmd.simulate.page import Report, page
from vllm_llmd.simulate.report import Summary, summary
from vllm_llmd.simulate.routing import Routing
from vllm_llmd.simulate.settings import SimulateSettings
from vllm_llmd.simulate.simulation import Follow, Simulation, nothing_follows
from vllm_llmd.simulate.table import table
from vllm_llmd.simulate.trace import TraceRequest, read_trace

Say = Callable[[str], None]


def run(settings: SimulateSettings, say: Say) -> int:
    """Returns the exit status. Raises ConfigError for a trace or a policy that cannot be used."""
    names = settings.policy or (RouterSettings().policy,)
    for name in names:
        _policy(name, settings)
    compile_ahead()
    requests = traffic_of(settings)
    rate = len(requests) / max((requests[-1].at_ms - requests[0].at_ms) / 1000, 1e-9)
    runs = []
    for name in names:
        began_s = time.perf_counter()
        runs.append(summarised(name, settings, requests))
        took_s = time.perf_counter() - began_s
        say(f"{name}: {len(requests):,} requests in {took_s:.1f} s, {len(requests) / took_s:,.0f} a second")
    say(table(runs))
    trace = settings.trace or f"made-up chats, seed {settings.seed}"
    report = Report(trace=Path(trace).name, requests=len(requests), rate=round(rate, 4), settings=settings, runs=runs)
    write_file(settings.json, msgspec.json.format(msgspec.json.encode(report), indent=1))
    write_file(settings.html, page(report).encode())
    return 0


def compile_ahead() -> None:
    """So that the first run takes no longer than the others."""
    hash_chain_cpu.compile_ahead()
    prefix_table_cpu.compile_ahead()
    evictions.compile_ahead()
    plans_cpu.compile_ahead()


def traffic_of(settings: SimulateSettings) -> list[TraceRequest]:
    """The requests to play, in order of arrival. Raises ConfigError."""
    rng = random.Random(f"arrivals {settings.seed}")
    requests = _read(settings) if settings.trace else traffic.synthetic(settings.synthetic or 1, rng)
    requests = traffic.first(requests, settings.requests, settings.minutes)
    requests = traffic.copies(requests, settings.copies)
    if settings.arrivals == "spread":
        requests = traffic.spread(requests, rng)
    speedup = settings.speedup or 1.0
    if settings.rate is not None:
        speedup = settings.rate / traffic.rate_of(requests)
    return _with_objectives(traffic.hastened(requests, speedup), settings)


def _with_objectives(requests: list[TraceRequest], settings: SimulateSettings) -> list[TraceRequest]:
    if settings.tight_share > 0:
        rng = random.Random(f"objectives {settings.seed}")
        requests = traffic.tightened(requests, settings.tight_share, settings.tight_slo, rng)
    if settings.send_slo:
        requests = traffic.telling(requests, settings.slo)
    if settings.best_effort_share > 0:
        rng = random.Random(f"best effort {settings.seed}")
        requests = traffic.with_best_effort(requests, settings.best_effort_share, rng)
    return requests


def summarised(policy: str, settings: SimulateSettings, requests: Sequence[TraceRequest]) -> Summary:
    """One policy on these requests."""
    return summary(policy, played(policy, settings, requests), settings.slo)


def played(
    policy: str, settings: SimulateSettings, requests: Sequence[TraceRequest], follow: Follow = nothing_follows
) -> Played:
    """What became of each request. The same settings and requests give the same."""
    with _no_garbage_collection():
        return _played(policy, settings, requests, follow)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A simulation leaves no cycles behind; looking for some in all of a large fleet takes a good part of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _played(policy: str, settings: SimulateSettings, requests: Sequence[TraceRequest], follow: Follow) -> Played:
    events = Events()
    limits = settings.limits()
    members = [Member(engine, role, limits, settings.model.speeds()) for engine, role in settings.fleet()]
    routing = Routing(settings.router(), events, _policy(policy, settings))
    return Simulation(members, routing, events, settings.heartbeat_ms).run(requests, follow)


def _policy(name: str, settings: SimulateSettings) -> Policy:
    return policies.make(name, PolicySettings(settings.min_remote_tokens, random.Random(f"policy {settings.seed}")))


def _read(settings: SimulateSettings) -> list[TraceRequest]:
    path = Path(settings.trace or "")
    try:
        with path.open("rb") as lines:
            return read_trace(lines, path.name)
    except OSError as error:
        raise ConfigError(f"trace {path} cannot be read ({error.strerror}): give the path of a file") from None
