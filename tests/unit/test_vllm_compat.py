"""The little that is read of vLLM's command line and events, without an engine."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch deprecates as vLLM imports it is not ours to mend
    events = pytest.importorskip("vllm.distributed.kv_events")
    from vllm_llmd.kv_connector.vllm_compat import to_block_events

from vllm_llmd.kv_connector.addresses import own_host, own_http
from vllm_llmd.kv_connector.block_names import Cleared, Removed, Stored
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


def test_loading_the_plugin_is_light_and_may_happen_twice() -> None:
    script = (
        "import sys; import vllm_llmd.plugin as plugin; assert not {'torch', 'vllm'} & set(sys.modules);"
        "plugin.register(); plugin.register();"
        "from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory as F;"
        "print(F.get_connector_class_by_name('LlmdConnector').__name__)"
    )
    result = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("LlmdConnector")
