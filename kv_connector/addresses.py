"""Under which addresses other engines reach this one. Sends nothing."""

import socket
from collections.abc import Sequence

from vllm_llmd.errors import ConfigError
from vllm_llmd.kv_connector.command_line import server_options
from vllm_llmd.settings import EngineSettings

DEFAULT_PORT = "8000"
"""vLLM's own."""


def own_host(settings: EngineSettings) -> str:
    """The address others reach this machine under: as set, or the one that leads to the router."""
    if settings.host is not None:
        return settings.host
    for endpoint in settings.routers:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        if not host:
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((host, int(port)))
            except OSError as error:
                raise ConfigError(f"the router's address {endpoint} cannot be resolved: {error}") from error
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def own_http(settings: EngineSettings, argv: Sequence[str] | None = None) -> str:
    """Base URL of this engine's API server: as set, or read from the server's own command line."""
    if settings.http is not None:
        return settings.http.rstrip("/")
    options = server_options(argv)
    host = options.get("host", [""])[-1]
    if host in ("", "0.0.0.0", "::"):
        host = own_host(settings)
    scheme = "https" if options.get("ssl-keyfile") else "http"
    return f"{scheme}://{host}:{options.get('port', [DEFAULT_PORT])[-1]}"
