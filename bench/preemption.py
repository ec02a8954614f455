"""What it costs to find who is to give way (docs/decisions/0030-preemption.md): one thread, without an event loop.

    python bench/preemption.py

512 engines have 32 requests each, half of them best effort. Prints a line of JSON: microseconds per search, median and
99th percentile; first the case.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router.candidates import Roster
from vllm_llmd.router.members.membership import Engine, Placed, State
from vllm_llmd.router.placement.rosters import Wanted
from vllm_llmd.router.slo import Wish
from vllm_llmd.router.waiting.flow import Arrival, Flow, Item, Pool, QueueLimits, to_wait
from vllm_llmd.router.waiting.preemption import Preemption, Running
from vllm_llmd.router.waiting.saturation import Limits
from vllm_llmd.wire import EngineInfo, Load

ENGINES, PER_ENGINE = 512, 32
SEARCHES = 1000
NOW_MS = 1000.0
TTL_MS = 60_000.0
LIMITS = Limits(engine_queue=8, engine_requests=256, prefill_tokens=65_536, fresh_ms=2000)
POOL = Pool(Wanted("m"), False)


@dataclass(frozen=True)
class Case:
    """Engines run `slots` at a time; every request has `prompt_tokens` to compute and came at `arrived_ms`."""

    slots: int = PER_ENGINE - LIMITS.engine_queue
    prompt_tokens: int = 100
    arrived_ms: float = 0.0
    claims: int = 0
    goes: int = 1
    """So many are given up."""


CASES = {
    "one_goes": Case(),
    "five_go": Case(slots=256, prompt_tokens=2400, goes=5),
    "in_vain": Case(slots=16, goes=0),
    "all_too_old": Case(arrived_ms=NOW_MS - TTL_MS, goes=0),
    "one_goes_64_wait": Case(claims=64),
}
"""`in_vain`: all eight that may go would not make room."""


def item(request: str, priority: int, arrived_ms: float) -> Item:
    return to_wait(Arrival(request, POOL, 1000, 200, 4096, arrived_ms), Wish(priority=priority), TTL_MS)


def busy(case: Case) -> tuple[Preemption, Roster]:
    """Requests come to the engines in turn."""
    preemption = Preemption(LIMITS, Flow(QueueLimits(1024, 1 << 28, {})), 2)
    engines = []
    for number in range(ENGINES):
        info = EngineInfo(
            EngineId(f"e{number}"), Epoch(1), "both", "", ["m"], 16, 99_999, 131_072, "f", [], max_sequences=case.slots
        )
        engines.append(Engine(info, State.READY, 0.0))
    for place in range(PER_ENGINE):
        for engine in engines:
            request, priority = f"{engine.info.id} {place}", -(place % 2)
            engine.place(request, Placed(float(place), case.prompt_tokens))
            waiting = item(request, priority, case.arrived_ms)
            preemption.began(Running(waiting, (engine.info.id,), float(place), 0))
    running = min(case.slots, PER_ENGINE)
    tokens = case.prompt_tokens * PER_ENGINE
    for engine in engines:
        load = Load(running=running, waiting=PER_ENGINE - running, prefill_tokens=tokens, free_blocks=90_000)
        engine.reported(load, NOW_MS - 100)
    return preemption, Roster.of(engines, "m")


def searched_us(case: Case) -> dict[str, float]:
    preemption, roster = busy(case)
    for number in range(case.claims):
        assert preemption.victims([(item(f"claim {number}", 0, NOW_MS), roster)], NOW_MS)
    waiter = item("urgent", 0, NOW_MS)
    assert len(preemption.victims([(waiter, roster)], NOW_MS)) == case.goes
    preemption.waits_no_more("urgent")

    def search() -> None:
        preemption.victims([(waiter, roster)], NOW_MS)

    took = sorted(timed_us(search, lambda: preemption.waits_no_more("urgent")) for _ in range(SEARCHES))
    return {"p50_us": round(median(took), 1), "p99_us": round(took[int(0.99 * SEARCHES)], 1)}


def timed_us(act: Callable[[], None], undo: Callable[[], None]) -> float:
    began_ns = time.thread_time_ns()
    act()
    took_ns = time.thread_time_ns() - began_ns
    undo()
    return took_ns / 1000


def main() -> None:
    for name, case in CASES.items():
        sys.stdout.write(json.dumps({"case": name, **searched_us(case)}) + "\n")


if __name__ == "__main__":
    main()
