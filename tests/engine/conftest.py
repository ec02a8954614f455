"""One real fleet for all engine tests: a router, a destination, a source, and a slow source that may be killed.

Set LLMD_TEST_MODEL to serve another model than the tiny one.
"""

import http.client
import json
import os
import random
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vllm_llmd.fleet import Fleet
from vllm_llmd.kv_connector.link import EngineLink, LinkSettings
from vllm_llmd.launch_spec import EngineSpec, FleetSpec
from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.wire import EngineInfo, Load

pytest.importorskip("vllm")

MODEL = Path(os.environ.get("LLMD_TEST_MODEL", ".models/tiny"))
BLOCK = 32
LEASE_MS = 2000
DEADLINE_S = 60.0
PROM_LINE = re.compile(r"^vllm:llmd_(\w+?)_total\{(.*)\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Client:
    """Speaks to one engine, or to the router."""

    http: str

    def post(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
        with self.open(path, body, headers) as response:
            answer: dict[str, Any] = json.loads(response.read())
        return answer

    def open(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Any:
        all_headers = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.http + path, json.dumps(body).encode(), all_headers)
        return urllib.request.urlopen(request, timeout=DEADLINE_S)

    def send(self, path: str, body: dict[str, Any]) -> http.client.HTTPConnection:
        """Send a request and read nothing of its answer; closing the connection is hanging up."""
        connection = http.client.HTTPConnection(self.http.removeprefix("http://"), timeout=DEADLINE_S)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.http + path, timeout=10) as response:
            text: str = response.read().decode()
        return text

    def complete(self, prompt: list[int], source: str | None = None, **more: Any) -> list[int]:
        """Greedy token ids. With a `source`, this engine orders its prefill there."""
        body = {"model": "m", "prompt": prompt, "max_tokens": 16, "temperature": 0, "return_token_ids": True, **more}
        if source is not None:
            body["kv_transfer_params"] = {"llmd": {"source": source, "request": f"test-{random.random()}"}}
        token_ids: list[int] = self.post("/v1/completions", body)["choices"][0]["token_ids"]
        return token_ids

    def alone(self, prompt: list[int], **more: Any) -> list[int]:
        """Greedy token ids that this engine computes from nothing, with no help and no cached prefix."""
        return self.complete(prompt, cache_salt=f"alone-{random.random()}", **more)

    def counts(self) -> dict[str, float]:
        """The connector's counters; fallbacks by reason."""
        found: dict[str, float] = {}
        for name, labels, value in PROM_LINE.findall(self.get("/metrics")):
            reason = re.search(r'reason="([^"]*)"', labels)
            found[f"{name} {reason.group(1)}" if reason else name] = float(value)
        return found


@dataclass(frozen=True)
class Gained:
    """What counters of one engine have gained since `since`."""

    client: Client
    since: dict[str, float]

    def __call__(self, name: str) -> float:
        return self.client.counts().get(name, 0.0) - self.since.get(name, 0.0)


class Lab:
    """The fleet and what tests do with it."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.random = random.Random(20)
        self.router = Client(fleet.router_http)
        self.decode = Client(fleet.engine("decode-0").http)
        self.prefill = Client(fleet.engine("prefill-0").http)
        self.slow = Client(fleet.engine("slow-0").http)

    def prompt(self, tokens: int) -> list[int]:
        """Random token ids that no test has sent before."""
        return [self.random.randrange(300, 500) for _ in range(tokens)]

    def gained(self, client: Client) -> Gained:
        return Gained(client, client.counts())

    def engines(self) -> dict[str, dict[str, Any]]:
        return {e["id"]: e for e in json.loads(self.router.get("/admin/engines"))["engines"]}

    def index(self, engine_id: str) -> set[int]:
        return {int(name) for name in json.loads(self.router.get(f"/admin/index/{engine_id}"))["names"]}

    def until(self, what: Callable[[], bool], why: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not what():
            self.fleet.raise_if_ended()
            assert time.monotonic() < deadline, why
            time.sleep(0.05)

    def at_rest(self) -> bool:
        """Whether no engine runs, waits, pins or withholds anything."""
        engines = self.engines()
        return all(engine_id in engines and self._rests(engines[engine_id]) for engine_id in self.all_blocks)

    def _rests(self, engine: dict[str, Any]) -> bool:
        load = engine["load"]
        if engine["state"] != "ready":
            return False
        busy = load["running"] + load["waiting"] + load["waiting_for_kv"] + load["pinned_blocks"]
        return not busy and load["free_blocks"] == self.all_blocks[engine["id"]]

    def start(self) -> None:
        """Note how many blocks an engine at rest has."""
        self.all_blocks = {engine_id: engine["load"]["free_blocks"] for engine_id, engine in self.engines().items()}
        assert all(count > 1000 for count in self.all_blocks.values())

    def members(self) -> dict[str, EngineInfo]:
        """What the router tells the engines of each other; asked by an engine that joins for a moment."""
        info = EngineInfo(EngineId("visitor"), Epoch(1), "prefill", "http://127.0.0.1:9", [], 1, 1, 1, "none", [""])
        link = EngineLink(LinkSettings(info, (self.fleet.router_zmq,), Load))
        link.start()
        try:
            self.until(lambda: set(self.all_blocks) <= set(link.members()), "the router tells of no members")
            return {str(engine_id): engine for engine_id, engine in link.members().items()}
        finally:
            link.close()

    def assert_recomputed(self, engine_id: str, tokens: float) -> None:
        """vLLM's own log says how many tokens the latest failed load left to compute."""
        log = self.fleet.engine(engine_id).log.read_text()
        assert int(re.findall(r"\((\d+) tokens affected\)", log)[-1]) == tokens

    def in_background(self, work: Callable[[], Any]) -> "Background":
        return Background(work)


class Background:
    """Work in a thread; `result` waits for it and raises what it raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(DEADLINE_S)
        assert self.done, "still running"
        if self._error is not None:
            raise self._error
        return self._result


def engine(engine_id: str, role: Any, chunk: int) -> EngineSpec:
    return EngineSpec(
        id=engine_id,
        role=role,
        flags=("--max-num-batched-tokens", str(chunk), "--max-num-seqs", "16"),
        extra_config={"lease_ms": LEASE_MS, "min_order_tokens": 1},
    )


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if not (MODEL / "config.json").exists():
        pytest.fail(f"{MODEL} is missing: run `make model`")
    spec = FleetSpec(
        model=MODEL,
        engines=(
            engine("prefill-0", "prefill", 256),
            engine("decode-0", "decode", 256),
            engine("slow-0", "prefill", 16),
        ),
        log_dir=tmp_path_factory.mktemp("fleet"),
        engine_flags=("--served-model-name", "m", "--dtype", "float32", "--max-model-len", "8192"),
    )
    with Fleet(spec) as fleet:
        lab = Lab(fleet)
        lab.until(lambda: all(e["load"]["free_blocks"] for e in lab.engines().values()), "no heartbeat")
        lab.start()
        yield lab


@pytest.fixture(autouse=True)
def nothing_is_left_behind(lab: Lab) -> Iterator[None]:
    """After every test, every engine's blocks are free again, on both sides."""
    yield
    lab.until(lab.at_rest, f"blocks or requests are left: {lab.engines()}")
