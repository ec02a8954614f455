"""What is read of vLLM's command line and events, and what its releases differ in, without an engine."""

import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch deprecates as vLLM imports it is not ours to mend
    events = pytest.importorskip("vllm.distributed.kv_events")
    base = pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.base")
    from vllm_llmd.kv_connector import vllm_compat
    from vllm_llmd.kv_connector.connector import LlmdConnector
    from vllm_llmd.kv_connector.vllm_compat import BlockPoolView, to_block_events, to_offloaded
    from vllm_llmd.kv_connector.worker_side import Results

from vllm_llmd.kernels.block_names import Cleared, Removed, Stored
from vllm_llmd.kernels.offloaded_blocks import Dropped, Offloaded
from vllm_llmd.kv_connector.addresses import own_host, own_http
from vllm_llmd.kv_connector.command_line import adapter_names, server_options
from vllm_llmd.names import RequestId
from vllm_llmd.settings import EngineSettings


@pytest.mark.parametrize(
    ("argv", "url"),
    [
        ([], "http://127.0.0.1:8000"),
        (["vllm", "serve", "m", "--port", "9001"], "http://127.0.0.1:9001"),
        (["server", "--port=9002", "--host=10.1.2.3"], "http://10.1.2.3:9002"),
        (["server", "--port", "1", "--port", "9003"], "http://127.0.0.1:9003"),
        (["server", "--host", "0.0.0.0"], "http://127.0.0.1:8000"),
        (["server", "--ssl_keyfile", "k.pem"], "https://127.0.0.1:8000"),
    ],
)
def test_the_engine_finds_its_own_address_on_the_command_line(argv: list[str], url: str) -> None:
    assert own_http(EngineSettings(), argv) == url


def test_a_config_file_counts_and_flags_override_it(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("port: 7001\nhost: 10.0.0.9\n")
    assert own_http(EngineSettings(), ["server", "--config", str(config)]) == "http://10.0.0.9:7001"
    assert own_http(EngineSettings(), ["server", "--config", str(config), "--port", "7"]) == "http://10.0.0.9:7"


@pytest.mark.parametrize(
    "words",
    [
        ["--lora-modules", "law=/a/law", '{"name":"tax","path":"/a/tax","base_model_name":"m"}', "-tp", "2"],
        ["--lora-modules=law=/a/law", "--lora_modules", "law=/b", '{"name": "tax", "path": "p"}', "--port", "1"],
        ["--config", "CONFIG"],
    ],
)
def test_adapters_are_read_off_the_command_line(tmp_path: Path, words: list[str]) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text('lora-modules: ["law=/a/law", {name: tax, path: /a/tax}]')
    argv = ["server", "--enable-lora", *(str(config) if word == "CONFIG" else word for word in words)]
    assert adapter_names(server_options(argv)) == ["law", "tax"]
    assert adapter_names(server_options(["server", "--lora-modules", "--port", "1"])) == []


def test_what_is_set_wins() -> None:
    assert own_http(EngineSettings(http="http://me:5/"), ["server", "--port", "1"]) == "http://me:5"
    assert own_host(EngineSettings(host="me")) == "me"


def test_the_address_is_the_one_that_leads_to_the_router() -> None:
    assert own_host(EngineSettings(router="tcp://127.0.0.1:5557")) == "127.0.0.1"


def test_vllms_events_become_ours() -> None:
    stored = events.BlockStored(
        block_hashes=[1, 2], parent_block_hash=None, token_ids=[5, 6], block_size=1, lora_id=None, medium="GPU",
        lora_name=None,
    )  # fmt: skip
    removed = events.BlockRemoved(block_hashes=[1], medium="GPU")
    of_another_group = events.BlockRemoved(block_hashes=[1], medium="GPU", group_idx=1)
    assert to_block_events([stored, of_another_group, removed, events.AllBlocksCleared()], group=0) == [
        Stored((1, 2), None, [5, 6], None),
        Removed((1,)),
        Cleared(),
    ]


def test_only_what_is_told_of_other_memory_counts_as_offloaded() -> None:
    def stored(medium: str | None, *hashes: int, group: int | None = None) -> Any:
        return events.BlockStored(
            block_hashes=list(hashes), parent_block_hash=None, token_ids=[], block_size=0, lora_id=None, medium=medium,
            lora_name=None, group_idx=group,
        )  # fmt: skip

    told = [stored("GPU", 1), stored(None, 2), stored("CPU", 3, 4), stored("CPU", 5, group=1), stored("STORAGE", 6)]
    told += [events.BlockRemoved(block_hashes=[3], medium="CPU"), events.AllBlocksCleared()]
    assert to_offloaded([*told, stored("MARS", 7)], group=0) == [
        Offloaded("cpu", (3, 4)),
        Offloaded("disk", (6,)),
        Dropped("cpu", (3,)),
    ]


def test_what_connectors_tell_together_is_heard_and_passed_on() -> None:
    multi = pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.multi_connector").MultiConnector
    heard: list[list[Any]] = []
    vllm_compat.on_connector_events(heard.append)
    try:
        together = multi.__new__(multi)
        together._connectors = [SimpleNamespace(take_events=lambda: ["a"]), SimpleNamespace(take_events=lambda: ["b"])]
        assert list(together.take_events()) == ["a", "b"]
        assert heard == [["a", "b"]]
    finally:
        vllm_compat.forget_connector_events(heard.append)


def test_loading_the_plugin_is_light_and_may_happen_twice() -> None:
    script = (
        "import sys; import vllm_llmd.plugin as plugin; assert not {'torch', 'vllm'} & set(sys.modules);"
        "plugin.register(); plugin.register();"
        "from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory as F;"
        "print(F.get_connector_class_by_name('LlmdConnector').__name__)"
    )
    result = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("LlmdConnector")


# --- what releases differ in ----------------------------------------------------------------------------------


class Manager:
    """vLLM's KV cache manager, as far as `remember_manager` and `BlockPoolView` go."""

    def __init__(self, blocks: int) -> None:
        self.block_pool = SimpleNamespace(num_gpu_blocks=blocks, enable_kv_cache_events=False)
        self.freed: list[str] = []

    def free(self, request: Any) -> None:
        self.freed.append(request.request_id)


@pytest.fixture
def managers(monkeypatch: pytest.MonkeyPatch) -> type[Manager]:
    """The class that vLLM makes its manager from; put back after the test."""
    monkeypatch.setattr(vllm_compat, "KVCacheManager", Manager)
    monkeypatch.setattr(Manager, "__init__", Manager.__init__)
    return Manager


def test_a_pool_leads_to_its_manager_where_vllm_hands_over_the_pool_alone(
    monkeypatch: pytest.MonkeyPatch, managers: type[Manager]
) -> None:
    monkeypatch.setattr(vllm_compat, "KVConnectorBase_V1", object)
    vllm_compat.remember_manager()
    changed = managers.__init__
    vllm_compat.remember_manager()
    assert managers.__init__ is changed, "it is not changed twice"
    one, other = managers(7), managers(blocks=8)
    assert vllm_compat.manager_of(one.block_pool) is one
    assert vllm_compat.manager_of(other.block_pool) is other


def test_nothing_is_changed_where_vllm_hands_over_its_manager(
    monkeypatch: pytest.MonkeyPatch, managers: type[Manager]
) -> None:
    monkeypatch.setattr(vllm_compat, "KVConnectorBase_V1", SimpleNamespace(bind_kv_cache_manager=None))
    theirs = managers.__init__
    vllm_compat.remember_manager()
    assert managers.__init__ is theirs


class Core:
    """vLLM's engine core, as far as `on_arrival` goes."""

    def preprocess_add_request(self, request: str) -> tuple[str, int]:
        return request.upper(), 3


def test_listeners_hear_of_each_request_until_they_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.v1.engine.core.EngineCore", Core)
    monkeypatch.setattr(vllm_compat, "_arrival_listeners", [])
    monkeypatch.setattr(Core, "preprocess_add_request", Core.preprocess_add_request)
    heard: list[str] = []

    def one() -> None:
        heard.append("one")

    def other() -> None:
        heard.append("other")

    assert vllm_compat.on_arrival(one)
    changed = Core.preprocess_add_request
    assert vllm_compat.on_arrival(other)
    assert Core.preprocess_add_request is changed, "it is not changed twice"
    assert Core().preprocess_add_request("r") == ("R", 3)
    vllm_compat.forget_arrivals(one)
    Core().preprocess_add_request("r")
    assert heard == ["one", "other", "other"]


def test_an_engine_core_of_an_unknown_kind_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.v1.engine.core.EngineCore", object)
    assert not vllm_compat.on_arrival(lambda: None)
    assert "does not tell of new requests" in log.text


@pytest.fixture
def sigterm() -> Iterator[list[str]]:
    """What handles SIGTERM notes it here."""
    heard: list[str] = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: heard.append("theirs"))
    yield heard
    signal.signal(signal.SIGTERM, former)


def test_when_the_engine_is_told_to_stop_the_listener_hears_of_it_first(sigterm: list[str]) -> None:
    vllm_compat.on_told_to_stop(lambda: sigterm.append("ours"))
    signal.raise_signal(signal.SIGTERM)
    assert sigterm == ["ours", "theirs"]


def test_a_sigterm_that_is_not_handled_by_vllm_is_left_alone(sigterm: list[str]) -> None:
    theirs = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=vllm_compat.on_told_to_stop, args=(lambda: None,))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is theirs
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    vllm_compat.on_told_to_stop(lambda: None)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def connector(groups: int, results: Results) -> tuple[LlmdConnector, list[BlockPoolView]]:
    """A connector as it is once started, between sides that do as little as possible; and the pools it has bound."""
    pools: list[BlockPoolView] = []
    made = LlmdConnector.__new__(LlmdConnector)
    made._one_group = groups == 1
    made._scheduler = SimpleNamespace(bind=pools.append)  # type: ignore[assignment]
    made._worker = SimpleNamespace(end_step=lambda: results)  # type: ignore[assignment]
    return made, pools


def test_the_pool_alone_serves_as_well_as_its_manager() -> None:
    manager = Manager(9)
    manager.block_pool.llmd_manager = manager
    made, pools = connector(1, Results())
    made.bind_gpu_block_pool(manager.block_pool)
    made.bind_kv_cache_manager(manager)
    assert [pool.capacity for pool in pools] == [8, 8]


@pytest.mark.parametrize(("groups", "failed", "blocks"), [(1, set(), {4}), (2, {"b"}, set())])
def test_a_failed_load_is_told_of_in_the_way_that_vllm_takes(groups: int, failed: set[str], blocks: set[int]) -> None:
    received = {RequestId("a"), RequestId("b")}
    made, _ = connector(groups, Results(received, failed={RequestId("b")}, missing_blocks={4}))
    assert made.get_finished(set()) == (None, {"a", "b"})
    assert made.get_block_ids_with_load_errors() == blocks
    if hasattr(base, "KVConnectorTransferResults"):
        told = made.get_transfer_results(set())
        assert (told.finished_sending, told.finished_recving, told.failed_recving) == (set(), {"a", "b"}, failed)


def test_giving_up_a_load_returns_its_blocks_and_its_tokens() -> None:
    manager, request = Manager(9), SimpleNamespace(request_id="r", num_computed_tokens=64)
    BlockPoolView(manager).forget_load(request)
    assert (manager.freed, request.num_computed_tokens) == (["r"], 0)


@pytest.mark.parametrize(("idle_s", "ms"), [(0.0, 2), (0.05, 2), (1.0, 20), (5.0, 100), (3600.0, 100)])
def test_the_longer_a_queue_is_idle_the_longer_it_blocks(idle_s: float, ms: int) -> None:
    assert vllm_compat.block_ms(idle_s) == ms


def test_message_queues_of_an_unknown_kind_are_warned_of_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    name = "vllm.distributed.device_communicators.shm_broadcast"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: True))
    vllm_compat.spin_briefly()
    assert "message queues are unknown" in log.text
