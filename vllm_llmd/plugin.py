"""The `vllm.general_plugins` entry. vLLM calls it in every process, sometimes more than once."""

import logging

CONNECTOR = "LlmdConnector"


def register() -> None:
    """Make `LlmdConnector` known to vLLM. Calling it again does nothing."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "vllm_llmd.kv_connector.connector", CONNECTOR)
        _prepare_for_layout()
    _log_as_vllm_does()


def _prepare_for_layout() -> None:
    """Workers say which cache layouts they support before they know of a connector."""
    from vllm_llmd.kv_connector.vllm_layouts import accept_block_outermost_layout

    accept_block_outermost_layout()


def _log_as_vllm_does() -> None:
    """vLLM configures its own logger alone: lend ours its handlers and level."""
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("vllm_llmd")
    if theirs.handlers and not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False
