"""Under which addresses other engines reach this one. Reads the server's own command line; opens nothing."""

import socket
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from vllm_llmd.errors import ConfigError
from vllm_llmd.settings import EngineSettings

DEFAULT_PORT = 8000
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
    options = _server_options(list(sys.argv if argv is None else argv))
    host = options.get("host") or ""
    if host in ("", "0.0.0.0", "::"):
        host = own_host(settings)
    scheme = "https" if options.get("ssl-keyfile") else "http"
    return f"{scheme}://{host}:{options.get('port') or DEFAULT_PORT}"


def _server_options(argv: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    config_file = _option(argv, "config")
    if config_file is not None:
        import yaml

        loaded = yaml.safe_load(Path(config_file).read_text()) or {}
        options.update({str(k).replace("_", "-"): str(v) for k, v in loaded.items()})
    for name in ("host", "port", "ssl-keyfile"):
        value = _option(argv, name)
        if value is not None:
            options[name] = value
    return options


def _option(argv: list[str], name: str) -> str | None:
    """The last value of `--name VALUE` or `--name=VALUE`; vLLM takes underscores for dashes."""
    value = None
    for word, after in zip_longest(argv, argv[1:]):
        flag, equals, rest = word.partition("=")
        if flag.replace("_", "-") == f"--{name}":
            value = rest if equals else after
    return value
