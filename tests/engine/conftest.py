"""Real fleets for the engine tests, one alive at a time, each started once: tests are sorted by the fleet they use.

On a machine with GPUs the engines take those. LLMD_TEST_MODEL serves another model than the tiny one in the main
fleet, LLMD_TEST_DTYPE sets another dtype than float32.
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
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from vllm_llmd.fleet import Fleet
from vllm_llmd.kv_connector.link import EngineLink, LinkSettings
from vllm_llmd.launch_spec import EngineSpec, FleetSpec
from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.testing.collector import Collector
from vllm_llmd.wire import EngineInfo, Load

pytest.importorskip("vllm")

MODELS = Path(".models")
MODEL = Path(os.environ.get("LLMD_TEST_MODEL", MODELS / "tiny"))
DTYPE = os.environ.get("LLMD_TEST_DTYPE", "float32")
BLOCK = 32
LEASE_MS = 2000
OFFLOADED_BYTES = 8 << 20
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
        with urllib.request.urlopen(self.http + path, timeout=DEADLINE_S) as response:
            text: str = response.read().decode()
        return text

    def complete(self, prompt: list[int], source: str | None = None, **more: Any) -> list[int]:
        """Greedy token ids. With a `source`, this engine orders its prefill there."""
        return self.answer(prompt, {} if source is None else {"source": source}, **more).tokens

    def answer(self, prompt: list[int], hint: dict[str, Any], headers: Any = None, **more: Any) -> "Answer":
        """As `complete`, with all that a hint may say."""
        body = {"model": "m", "prompt": prompt, "max_tokens": 16, "temperature": 0, "return_token_ids": True, **more}
        if hint:
            body["kv_transfer_params"] = {"llmd": {"request": f"test-{random.random()}", **hint}}
        response = self.post("/v1/completions", body, headers)
        details = response["usage"].get("prompt_tokens_details") or {}
        return Answer(response["choices"][0]["token_ids"], details.get("cached_tokens") or 0)

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
class Answer:
    """Token ids, and how many of the prompt's tokens vLLM says were cached."""

    tokens: list[int]
    cached: int


@dataclass(frozen=True)
class Gained:
    """What counters of one engine have gained since `since`."""

    client: Client
    since: dict[str, float]

    def __call__(self, name: str) -> float:
        return self.client.counts().get(name, 0.0) - self.since.get(name, 0.0)


# --- what stands beside the engines ---------------------------------------------------------------------------


def make_adapter(directory: Path, seed: int) -> Path:
    """A random LoRA adapter of the tiny model, wide enough to change its answers."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    torch.manual_seed(seed)
    weights = {}
    for layer in range(4):
        for name in ("k_proj", "v_proj"):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"], weights[f"{at}.lora_B.weight"] = torch.randn(8, 64), torch.randn(64, 8)
    save_file(weights, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["k_proj", "v_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


class Lab:
    """A fleet and what tests do with it."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.random = random.Random(20)
        self.router = Client(fleet.router_http)

    def engine(self, engine_id: str) -> Client:
        return Client(self.fleet.engine(engine_id).http)

    @property
    def decode(self) -> Client:
        return self.engine("decode-0")

    @property
    def prefill(self) -> Client:
        return self.engine("prefill-0")

    @property
    def slow(self) -> Client:
        return self.engine("slow-0")

    def prompt(self, tokens: int) -> list[int]:
        """Random token ids that no test has sent before."""
        return [self.random.randrange(300, 500) for _ in range(tokens)]

    def gained(self, client: Client) -> Gained:
        return Gained(client, client.counts())

    def engines(self) -> dict[str, dict[str, Any]]:
        return {e["id"]: e for e in json.loads(self.router.get("/admin/engines"))["engines"]}

    def index(self, engine_id: str) -> set[int]:
        return {int(name) for name in json.loads(self.router.get(f"/admin/index/{engine_id}"))["names"]}

    def offloaded(self, engine_id: str) -> dict[str, set[int]]:
        """Names in the index by tier, but for the GPU's."""
        tiers = json.loads(self.router.get(f"/admin/index/{engine_id}"))["offloaded"]
        return {tier: set(map(int, names)) for tier, names in tiers.items()}

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
        self.until(lambda: all(e["load"]["free_blocks"] for e in self.engines().values()), "no heartbeat")
        self.all_blocks = {engine_id: engine["load"]["free_blocks"] for engine_id, engine in self.engines().items()}

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


# --- the fleets -----------------------------------------------------------------------------------------------


def engine(engine_id: str, *flags: str, role: Any = "both", **settings: Any) -> EngineSpec:
    return EngineSpec(
        id=engine_id,
        role=role,
        flags=("--max-num-seqs", "16", "--max-num-batched-tokens", "256", *flags),
        extra_config={"lease_ms": LEASE_MS, "min_order_tokens": 1, **settings},
    )


def main_fleet(directory: Path, collector: Collector) -> dict[str, Any]:
    """A destination, a source, and a slow source that may be killed; its adapter is another than theirs."""
    ours, other = (make_adapter(directory / name, seed) for seed, name in enumerate(("ours", "other"), start=1))
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules")
    return {
        "model": MODEL,
        "engines": (
            engine("prefill-0", *lora, f"law={ours}", role="prefill"),
            engine("decode-0", *lora, f"law={ours}", role="decode"),
            engine("slow-0", *lora, f"law={other}", "--max-num-batched-tokens", "16", role="prefill"),
        ),
        "engine_flags": (
            *("--max-model-len", "8192", "--scheduling-policy", "priority"),
            *("--otlp-traces-endpoint", collector.endpoint),
        ),
        "engine_env": {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"},
    }


def cuts_fleet(directory: Path, collector: Collector) -> dict[str, Any]:
    """Engines that cut the same cache up differently; two of them have little room."""
    little = ("--max-model-len", "2048", "--num-gpu-blocks-override", "65")
    return {
        "model": MODELS / "tiny",
        "engines": (
            engine("one", *little),
            engine("two", "--tensor-parallel-size", "2", "--block-size", "64"),
            engine("pair", "--tensor-parallel-size", "2", *little),
        ),
    }


def windows_fleet(directory: Path, collector: Collector) -> dict[str, Any]:
    """Sliding windows beside full attention; one engine announces layer by layer."""
    engines = engine("prefill-0", stream="layers", role="prefill"), engine("decode-0", role="decode")
    return {"model": MODELS / "tiny-gemma3", "engines": engines}


def latent_fleet(directory: Path, collector: Collector) -> dict[str, Any]:
    """MLA, of which every tensor-parallel rank holds all.

    vLLM's CPU kernel for rotary embedding gives other values to some tokens of a prompt than to the same tokens of a
    longer one when they have many heads, so that not even one engine agrees with itself: torch's own is used. Its
    kernel of MLA for CPUs with AMX takes 16 bits only: the one for all CPUs is used.
    """
    return {
        "model": MODELS / "tiny-deepseek",
        "engines": (engine("prefill-0"), engine("decode-0", "--tensor-parallel-size", "2")),
        "engine_flags": (
            "--compilation-config",
            '{"custom_ops":["-rotary_embedding"]}',
            "--attention-backend",
            "CPU_MLA",
        ),
    }


def tiers_fleet(directory: Path, collector: Collector) -> dict[str, Any]:
    """An engine with little room that offloads blocks to other memory, which has not much more."""
    offloading = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "HostOffloadingSpec",
            "spec_module_path": "vllm_llmd.testing.offloading",
            "cpu_bytes_to_use": OFFLOADED_BYTES,
        },
    }
    little = engine(
        "little",
        *("--max-model-len", "2048", "--num-gpu-blocks-override", "65", "--enable-prompt-tokens-details"),
        *("--kv-events-config", '{"enable_kv_cache_events":true,"publisher":"null"}'),
    )
    return {"model": MODELS / "tiny", "engines": (replace(little, beside=(offloading,)), engine("large"))}


def texts_fleet(directory: Path, collector: Collector) -> dict[str, Any]:
    """A router that tokenizes, before a model with a tokenizer and a template of the real world if there is one."""
    model = MODELS / "smollm2" if (MODELS / "smollm2").exists() else MODELS / "tiny"
    return {"model": model, "engines": (engine("one"),), "router_flags": ("--tokenizer", str(model.resolve()))}


def twins_fleet(directory: Path, collector: Collector) -> dict[str, Any]:
    """Two engines that do the same, have two seats each, and finish what they have when they are told to stop.

    Their router gives them no more than they run.
    """
    return {
        "model": MODELS / "tiny",
        "engines": tuple(engine(name, "--max-num-seqs", "2") for name in ("left", "right")),
        "engine_flags": ("--shutdown-timeout", "60"),
        "router_flags": ("--engine-queue", "0"),
    }


FLEETS = {
    "lab": main_fleet,
    "cuts": cuts_fleet,
    "windows": windows_fleet,
    "latent": latent_fleet,
    "tiers": tiers_fleet,
    "texts": texts_fleet,
    "twins": twins_fleet,
}
"""By the name of the fixture that gives it."""


class Labs:
    """Keeps one fleet alive at a time."""

    def __init__(self, directory: Path, collector: Collector) -> None:
        self._directory = directory
        self._collector = collector
        self._open = ExitStack()
        self._name = ""
        self._lab: Lab | None = None

    def open(self, name: str) -> Lab:
        if name != self._name or self._lab is None:
            self.close()
            facts = FLEETS[name](self._directory, self._collector)
            if not (facts["model"] / "config.json").exists():
                pytest.fail(f"{facts['model']} is missing: run `make model`")
            flags = ("--served-model-name", "m", "--dtype", DTYPE, "--max-model-len", "4096")
            facts["engine_flags"] = (*flags, *facts.get("engine_flags", ()))
            spec = FleetSpec(log_dir=self._directory / name, **facts)
            self._lab = Lab(self._open.enter_context(Fleet(spec)))
            self._lab.start()
            self._name = name
        return self._lab

    def close(self) -> None:
        self._name, self._lab = "", None
        self._open.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of one fleet in a row."""
    names = list(FLEETS)
    items.sort(key=lambda item: next((i for i, n in enumerate(names, 1) if n in getattr(item, "fixturenames", ())), 0))


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="session")
def labs(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Labs]:
    labs = Labs(tmp_path_factory.mktemp("fleets"), collector)
    yield labs
    labs.close()


@pytest.fixture
def lab(labs: Labs) -> Lab:
    return labs.open("lab")


@pytest.fixture
def cuts(labs: Labs) -> Lab:
    return labs.open("cuts")


@pytest.fixture
def windows(labs: Labs) -> Lab:
    return labs.open("windows")


@pytest.fixture
def latent(labs: Labs) -> Lab:
    return labs.open("latent")


@pytest.fixture
def tiers(labs: Labs) -> Lab:
    return labs.open("tiers")


@pytest.fixture
def twins(labs: Labs) -> Lab:
    return labs.open("twins")


@pytest.fixture
def texts(labs: Labs) -> Lab:
    return labs.open("texts")


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test, every engine's blocks are free again, on both sides."""
    used = [request.getfixturevalue(name) for name in FLEETS if name in request.fixturenames]
    yield
    for lab in used:
        lab.until(lab.at_rest, f"blocks or requests are left: {lab.engines()}")
