"""From the bytes of a request body to a ranked list of engines: 100,000 tokens of text, 64 engines, a million blocks.

Learned mode, on one core, in this process: no tokenizer, no network. The prompt's whole chain is cached on every
engine, which is the longest way through every stage.
"""

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from index_values import Found, Settings

from vllm_llmd import wire
from vllm_llmd.kernels import hash_chain_cpu, json_strings_cpu, prefix_table_cpu, text_table_cpu
from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.hash_chain_cpu import chain_names
from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router import policies
from vllm_llmd.router.decide import Decision, decide
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.request import Kind, read_facts, skim
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.router.upstream import rewrite
from vllm_llmd.testing.clock import FakeClock

ENGINES = 64
BLOCK_SIZE = 16
TOKENS = 100_000
TEXT_BYTES = 450_000
TURNS = 11
HINT = {"llmd": {"request": "r-1", "source": "engine-1"}}
POLICY = policies.make(RouterSettings().policy, PolicySettings(256, random.Random(0)))
WORDS = ("the", "of", "prefix", "and", "cache", "a", "request", "holds", "engine", "to", "block,", "which", "router.")


@dataclass(frozen=True)
class Case:
    """A request body and the chain of blocks that its tokens would have."""

    name: str
    kind: Kind
    raw: bytes
    chain: Names


def english(rng: random.Random, size: int) -> str:
    """Words of English length, with a line break every dozen words and a quotation now and then."""
    words: list[str] = []
    length = 0
    while length < size:
        word = rng.choice(WORDS) + str(rng.randrange(100)) * (rng.random() < 0.1)
        word = f'"{word}"' if rng.random() < 0.01 else word
        words.append(word + ("\n" if len(words) % 12 == 11 else " "))
        length += len(words[-1])
    return "".join(words)[:size]


def cases(rng: random.Random) -> list[Case]:
    """The same text as one prompt, and as a chat of a long system prompt and many turns."""
    text = english(rng, TEXT_BYTES)
    each = len(text) // TURNS
    messages = [
        {"role": "system" if turn == 0 else ("assistant", "user")[turn % 2], "content": text[turn * each :][:each]}
        for turn in range(TURNS)
    ]
    shapes: list[tuple[str, Kind, dict[str, object]]] = [
        ("completion", "completion", {"model": "m", "prompt": text, "max_tokens": 100}),
        ("chat", "chat", {"model": "m", "messages": messages, "max_tokens": 100, "stream": True}),
    ]
    tokens = np.array([rng.randrange(150_000) for _ in range(TOKENS)], np.uint32)
    return [
        Case(name, kind, json.dumps(body).encode(), chain_names(tokens + number, BLOCK_SIZE))
        for number, (name, kind, body) in enumerate(shapes)
    ]


def fleet_of(found: list[Case], resident: int) -> Fleet:
    """Engines that hold `resident` blocks between them and the cases' chains, each; the router has seen the cases."""
    fleet = Fleet(RouterSettings(index_blocks=4 * resident), FakeClock(), "bench")
    numbers = np.random.default_rng(0)
    for number in range(ENGINES):
        engine, epoch = EngineId(f"engine-{number}"), Epoch(1)
        info = wire.EngineInfo(engine, epoch, "both", "http://e", ["m"], BLOCK_SIZE, resident, 131_072, "f", [])
        fleet.on_message(engine.encode(), wire.Hello(info))
        own = numbers.integers(1, 2**63, resident // ENGINES, np.uint64)
        names = np.concatenate([own, *(case.chain for case in found)])
        fleet.on_message(engine.encode(), wire.Snapshot(engine, epoch, 0, 0, 1, names.tobytes()))
    for case in found:
        decision = route(fleet, case, "r-1")
        names_told = wire.RequestSeen(EngineId("engine-0"), Epoch(1), "r-1", TOKENS, case.chain.tobytes())
        fleet.on_message(b"engine-0", names_told)
        fleet.done("r-1", decision)
    return fleet


def route(fleet: Fleet, case: Case, request: str | None = None) -> Decision:
    """The whole path; with a `request`, the fleet waits for its blocks."""
    facts = read_facts(case.kind, *skim(case.raw))
    chunks = fleet.cut(facts)
    decision = decide(facts, fleet.candidates(facts, chunks), POLICY)
    assert decision is not None
    if request is not None:
        fleet.place(request, decision, facts, chunks)
    return decision


def stages(fleet: Fleet, case: Case) -> dict[str, Callable[[], object]]:
    """Each part of the path by itself, and what comes after the decision."""
    body, long = skim(case.raw)
    facts = read_facts(case.kind, body, long)
    chunks = fleet.cut(facts)
    chain = fleet.texts.predict(BLOCK_SIZE, chunks)
    candidates = fleet.candidates(facts, chunks)
    return {
        "skim the body": lambda: skim(case.raw),
        "read the facts": lambda: read_facts(case.kind, body, long),
        "cut into chunks": lambda: fleet.cut(facts),
        "predict the chain": lambda: fleet.texts.predict(BLOCK_SIZE, chunks),
        "match the chain": lambda: fleet.index.match(chain),
        "list candidates, with the two above": lambda: fleet.candidates(facts, chunks),
        "decide": lambda: decide(facts, candidates, POLICY),
        "(afterwards) write the hint": lambda: rewrite.with_hint(case.raw, body, HINT),
    }


def cpu_us(call: Callable[[], object], calls: int) -> float:
    """What a call costs this thread, which on a busy machine is less than what it takes."""
    began = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - began) / calls * 1e6


def timed_us(call: Callable[[], object], calls: int) -> list[float]:
    values = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        values.append((time.perf_counter() - began) * 1e6)
    return sorted(values)


def measure(settings: Settings) -> Found:
    """A line per stage, and `route_100k_tokens_p50_ms`: that of the slower shape."""
    for kernels in (hash_chain_cpu, json_strings_cpu, prefix_table_cpu, text_table_cpu):
        kernels.compile_ahead()
    found = cases(random.Random(0))
    fleet = fleet_of(found, settings.resident)
    lines, medians_ms = [], []
    for case in found:
        decision = route(fleet, case)
        assert decision.predicted_blocks == TOKENS // BLOCK_SIZE, "the whole prompt is cached, and the router knows it"
        for name, call in {**stages(fleet, case), "body to ranked list": lambda c=case: route(fleet, c)}.items():
            values = timed_us(call, settings.calls)
            p50, p99 = statistics.median(values), values[int(len(values) * 0.99)]
            lines.append(f"{case.name:12s} {name:38s} {p50:9.0f} us p50 {p99:9.0f} us p99")
        medians_ms.append(p50 / 1000)
        used_us = cpu_us(lambda c=case: route(fleet, c), settings.calls)
        lines.append(f"{case.name:12s} {used_us:.0f} us of CPU time: {used_us / 100:.1f} % of a core at 100 a second")
    return Found({"route_100k_tokens_p50_ms": max(medians_ms)}, lines=lines)
