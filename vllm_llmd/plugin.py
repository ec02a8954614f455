"""The `vllm.general_plugins` entry. vLLM calls it in every process, sometimes more than once."""

CONNECTOR = "LlmdConnector"


def register() -> None:
    """Make `LlmdConnector` known to vLLM. Imports nothing heavy; calling it again does nothing."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "vllm_llmd.kv_connector.connector", CONNECTOR)
