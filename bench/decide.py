"""How long a choice among many engines takes, by policy: one thread, in this process, without the index.

    .venv/bin/python bench/decide.py

Prints microseconds, median and 99th percentile. The engines are busy at random; their cached prefixes are none, or
any length up to the prompt's.
"""

import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from vllm_llmd import wire
from vllm_llmd.names import EngineId, Epoch, Role
from vllm_llmd.router import policies
from vllm_llmd.router.candidates import Candidates
from vllm_llmd.router.decide import decide
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.placement import plans_cpu
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.request import Facts
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.testing.clock import FakeClock

ENGINES = 512
PROMPT_TOKENS = 8192
BLOCK_SIZE = 16
CALLS = 1000
FACTS = Facts("m", array("I", range(PROMPT_TOKENS)), b"", b"", PROMPT_TOKENS, None)
URGENT = replace(FACTS, ttft_ms=1000.0, tpot_ms=50.0)


def fleet(roles: list[Role]) -> Fleet:
    made, chance = Fleet(RouterSettings(), FakeClock(), "bench"), random.Random(0)
    for number, role in enumerate(roles):
        engine, epoch, sender = EngineId(f"e{number}"), Epoch(1), b"%d" % number
        load = wire.Load(
            running=chance.randrange(50), prefill_tokens=chance.randrange(9000), free_blocks=chance.randrange(10_000)
        )
        info = wire.EngineInfo(engine, epoch, role, "http://e", ["m"], BLOCK_SIZE, 10_000, 100_000, "f", [])
        made.on_message(sender, wire.Hello(info))
        made.on_message(sender, wire.Snapshot(engine, epoch, 0, 0, 1, b""))
        made.on_message(sender, wire.Heartbeat(engine, epoch, 0, 0, 0, load))
    return made


def timed_us(call: Callable[[], object]) -> str:
    values = []
    for _ in range(CALLS):
        began = time.perf_counter()
        call()
        values.append((time.perf_counter() - began) * 1e6)
    values.sort()
    return f"{statistics.median(values):6.0f} p50 {values[int(CALLS * 0.99)]:6.0f} p99"


def cached_somewhere(candidates: Candidates) -> Candidates:
    prefix = np.random.default_rng(0).integers(0, PROMPT_TOKENS // BLOCK_SIZE, len(candidates))
    return replace(candidates, prefix_blocks=prefix, claimed_blocks=prefix)


def main() -> int:
    plans_cpu.compile_ahead()
    both: list[Role] = ["both"] * ENGINES
    split: list[Role] = ["prefill", "decode"] * (ENGINES // 2)
    for shape, roles in (("both", both), ("split", split)):
        made = fleet(roles)
        chunks = made.cut(FACTS)
        empty = made.candidates(FACTS, chunks)
        sys.stdout.write(f"{shape:6s} candidates         {timed_us(lambda m=made, c=chunks: m.candidates(FACTS, c))}\n")
        asked = dict.fromkeys(policies.BUILT_IN, FACTS) | {"cost, objectives": URGENT}
        for name, facts in asked.items():
            policy = policies.make(name.partition(",")[0], PolicySettings(256, random.Random(0)))
            for what, given in (("nothing cached", empty), ("prefixes cached", cached_somewhere(empty))):
                took = timed_us(lambda f=facts, g=given, p=policy: decide(f, g, p))
                sys.stdout.write(f"{shape:6s} {name:18s} {took}  {what}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
