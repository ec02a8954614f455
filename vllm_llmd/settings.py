"""The engine's settings: what stands under `kv_connector_extra_config`. Read once, then passed down."""

import os
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from vllm_llmd import labels
from vllm_llmd.errors import ConfigError
from vllm_llmd.names import Role
from vllm_llmd.wire import EngineInfo

LEASE_MS_RANGE = (200, 60_000)
"""Shorter leases expire under load; longer ones let a destination that died hold memory for too long."""


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one engine; every one has a default, so that `{}` is a working stand-alone engine."""

    router: str | list[str] = []
    """ZeroMQ endpoint of the router, or of several: `tcp://HOST:PORT`."""

    role: Role | None = None
    """What the router may use this engine for. By default what `kv_role` says: producer is prefill, consumer decode."""

    host: str | None = None
    """Address under which other engines reach this one. By default the one this machine uses to reach the router."""

    http: str | None = None
    """Base URL of this engine's OpenAI API for other engines. By default `host` and the server's `--port`."""

    peers: list[EngineInfo] = []
    """Engines known without a router."""

    model_id: str | None = None
    """Name of the weights, equal on every engine that serves them. By default the `--model` argument."""

    min_order_tokens: int = 64
    """Prompts with fewer uncached tokens than this are prefilled here, whatever the router hints."""

    lease_ms: int = 5000
    """How long blocks announced to another engine stay pinned unless it renews; also how long silence may last."""

    stream: Literal["chunks", "layers"] = "chunks"
    """How the last chunk of a prompt is announced to the engine that ordered it: when it is done, or layer by layer."""

    layout: Literal["BLHNC", "any"] = "BLHNC"
    """How vLLM lays the KV cache out: blocks outermost, which are fastest to read, or as it or another connector likes.

    OffloadingConnector insists on layers outermost: beside it, `any` is needed.
    """

    secret: str | None = None
    """Shared by the fleet: orders are signed with it, and unsigned ones refused. By default `VLLM_LLMD_SECRET`."""

    api_key: str | None = None
    """Bearer token for the other engines' API. By default `VLLM_API_KEY`."""

    labels: dict[str, str] = {}
    """Labels that requests can select engines by, of the shapes that Kubernetes gives them: `{"zone": "a"}`."""

    @property
    def routers(self) -> tuple[str, ...]:
        return (self.router,) if isinstance(self.router, str) else tuple(self.router)


def read_engine_settings(extra_config: Mapping[str, Any]) -> EngineSettings:
    """Settings from `kv_connector_extra_config`.

    Raises ConfigError that names the key, what it should be and what it is.
    """
    known = {field.name for field in msgspec.structs.fields(EngineSettings)}
    for key in extra_config:
        if key not in known:
            raise ConfigError(f"kv_connector_extra_config has an unknown key '{key}'; known are {sorted(known)}")
    try:
        settings = msgspec.convert(dict(extra_config), EngineSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"kv_connector_extra_config: {error}") from error
    for endpoint in settings.routers:
        if not endpoint.startswith(("tcp://", "ipc://")):
            raise ConfigError(f"kv_connector_extra_config 'router' must look like tcp://HOST:PORT; got '{endpoint}'")
    shortest, longest = LEASE_MS_RANGE
    if not shortest <= settings.lease_ms <= longest:
        raise ConfigError(
            f"kv_connector_extra_config 'lease_ms' must be at least {shortest} and at most {longest}; "
            f"got {settings.lease_ms}"
        )
    if settings.min_order_tokens < 1:
        raise ConfigError(
            f"kv_connector_extra_config 'min_order_tokens' must be at least 1; got {settings.min_order_tokens}"
        )
    if objection := labels.objection(settings.labels):
        raise ConfigError(f"kv_connector_extra_config 'labels' {objection}")
    return msgspec.structs.replace(
        settings,
        secret=settings.secret or os.environ.get("VLLM_LLMD_SECRET"),
        api_key=settings.api_key or os.environ.get("VLLM_API_KEY"),
    )
