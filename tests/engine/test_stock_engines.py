"""Two real engines without our plugin, and a router that follows their KV events."""

import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vllm_llmd.kernels.hash_chain import ROOT, block_name, chain_names, salt_of
from vllm_llmd.launch_process import Command, GuardedProcess, reserve_port
from vllm_llmd.launch_spec import CPU_ENV, CPU_FLAGS, ROUTER, VLLM_SERVER

MODEL = ".models/tiny"
BLOCK = 32
DEADLINE_S = 240.0
WITHOUT_OUR_PLUGIN = {"VLLM_PLUGINS": ""}


@dataclass
class StockEngine:
    """Where it answers and publishes, and the process."""

    process: GuardedProcess
    port: int
    events: int
    replay: int

    @property
    def id(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def flag(self) -> str:
        return f"http=http://{self.id},events=tcp://127.0.0.1:{self.events},replay=tcp://127.0.0.1:{self.replay}"


class Stock:
    """A router and its engines."""

    def __init__(self, directory: Path, ends: ExitStack) -> None:
        self._ends = ends
        self._directory = directory
        self.random = random.Random(4)
        self.engines = [self._engine(number) for number in range(2)]
        flags = [word for engine in self.engines for word in ("--stock-engine", engine.flag)]
        port, bind = self._port(), self._port()
        argv = [*ROUTER, "--port", str(port), "--bind", f"tcp://127.0.0.1:{bind}", *flags]
        self.http = f"http://127.0.0.1:{port}"
        self._router = self._run("router", argv, {})
        self.until(lambda: self.states() == ["ready", "ready"], "the engines do not become ready")

    def _engine(self, number: int) -> StockEngine:
        port, events, replay = (self._port() for _ in range(3))
        config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{events}"}
        argv = [*VLLM_SERVER, "--model", MODEL, "--host", "127.0.0.1", "--port", str(port), *CPU_FLAGS]
        argv += ["--kv-events-config", json.dumps({**config, "replay_endpoint": f"tcp://*:{replay}"})]
        argv += ["--enable-prompt-tokens-details", "--max-model-len", "2048", "--dtype", "float32"]
        argv += ["--served-model-name", "m", "--enable-prefix-caching", "--num-gpu-blocks-override", "200"]
        process = self._run(f"stock-{number}", argv, CPU_ENV | WITHOUT_OUR_PLUGIN)
        return StockEngine(process, port, events, replay)

    def _run(self, name: str, argv: list[str], environ: dict[str, str]) -> GuardedProcess:
        command = Command(name, argv, os.environ | environ | {"PYTHONSAFEPATH": "1"}, self._directory / f"{name}.log")
        process = GuardedProcess(command)
        self._ends.callback(process.end)
        return process

    def _port(self) -> int:
        held = reserve_port()
        self._ends.callback(held.close)
        return int(held.getsockname()[1])

    def until(self, what: Callable[[], bool], why: str) -> None:
        give_up = time.monotonic() + DEADLINE_S
        while not what():
            for process in (self._router, *(engine.process for engine in self.engines)):
                assert process.running, process.failure()
            assert time.monotonic() < give_up, why
            time.sleep(0.05)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.http + path, timeout=DEADLINE_S) as response:
            return json.loads(response.read())

    def states(self) -> list[str]:
        try:
            return [engine["state"] for engine in self.get("/admin/engines")["engines"]]
        except urllib.error.URLError:
            return []

    def index(self, engine: StockEngine) -> set[int]:
        return {int(name) for name in self.get(f"/admin/index/{engine.id}")["names"]}

    def prompt(self, tokens: int) -> list[int]:
        return [self.random.randrange(300, 500) for _ in range(tokens)]

    def complete(self, prompt: list[int], base: str | None = None, **more: Any) -> int:
        """How many of the prompt's tokens were cached; at the router, or at one engine."""
        body = {"model": "m", "prompt": prompt, "max_tokens": 4, "temperature": 0, **more}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{base or self.http}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            usage = json.loads(response.read())["usage"]
        return (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    with ExitStack() as ends:
        yield Stock(tmp_path_factory.mktemp("stock"), ends)


def test_the_index_holds_what_a_second_request_finds_cached(stock: Stock) -> None:
    prompt = stock.prompt(10 * BLOCK + 5)
    first, names = stock.engines[0], set(chain_names(prompt, BLOCK))
    assert stock.complete(prompt, f"http://{first.id}") == 0
    stock.until(lambda: names <= stock.index(first), "the blocks are not indexed")
    assert not names & stock.index(stock.engines[1])
    assert stock.complete(prompt, f"http://{first.id}") == len(names) * BLOCK


def test_a_prompt_of_token_ids_goes_to_the_engine_that_has_it(stock: Stock) -> None:
    for engine in stock.engines:
        prompt = stock.prompt(8 * BLOCK + 1)
        stock.complete(prompt, f"http://{engine.id}")
        names = set(chain_names(prompt, BLOCK))
        stock.until(lambda e=engine, n=names: n <= stock.index(e), "the blocks are not indexed")
        assert [stock.complete(prompt) for _ in range(3)] == [8 * BLOCK] * 3


def test_a_salted_prompt_has_the_names_that_the_router_expects(stock: Stock) -> None:
    prompt, engine = stock.prompt(3 * BLOCK + 1), stock.engines[0]
    stock.complete(prompt, f"http://{engine.id}", cache_salt="tenant")
    names = [block_name(ROOT, prompt[:BLOCK], salt_of(["tenant"]))]
    for start in range(BLOCK, 3 * BLOCK, BLOCK):
        names.append(block_name(names[-1], prompt[start : start + BLOCK]))
    stock.until(lambda: set(names) <= stock.index(engine), "the salted blocks are named otherwise")
    assert stock.complete(prompt, cache_salt="tenant") == 3 * BLOCK


def test_blocks_that_an_engine_evicts_leave_the_index(stock: Stock) -> None:
    engine = stock.engines[1]
    old = set(chain_names(prompt := stock.prompt(40 * BLOCK + 1), BLOCK))
    stock.complete(prompt, f"http://{engine.id}")
    stock.until(lambda: old <= stock.index(engine), "the blocks are not indexed")
    while old & stock.index(engine):
        stock.complete(stock.prompt(40 * BLOCK), f"http://{engine.id}")
    assert len(stock.index(engine)) <= 200
    assert stock.complete(prompt, f"http://{engine.id}") == 0


def test_a_router_that_joins_late_learns_what_is_cached(stock: Stock) -> None:
    engine = stock.engines[0]
    port, bind = stock._port(), stock._port()
    argv = [*ROUTER, "--port", str(port), "--bind", f"tcp://127.0.0.1:{bind}", "--stock-engine", engine.flag]
    known = stock.index(engine)
    late = stock._run("late", argv, {})
    first, stock.http = stock.http, f"http://127.0.0.1:{port}"
    try:
        stock.until(lambda: stock.states() == ["ready"], "the engine does not become ready")
        stock.until(lambda: stock.index(engine) == known, "the late router knows something else")
    finally:
        stock.http = first
        late.end()
    assert known
