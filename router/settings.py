"""Everything that can be set on a router, read once from flags and environment, then passed down."""

import argparse
import os
from collections.abc import Mapping

import msgspec

from vllm_llmd.errors import ConfigError
from vllm_llmd.router import slo
from vllm_llmd.router.stock import settings as stock_settings
from vllm_llmd.router.stock.settings import StockEngine

API_KEY_VARIABLE = "VLLM_LLMD_API_KEY"


_AT_LEAST_1 = (
    "heartbeat_ms",
    "snapshot_retry_ms",
    "connect_timeout_ms",
    "attempts",
    "text_chunk_bytes",
    "text_chunks",
    "index_blocks",
    "tokenizer_wait_ms",
    "engine_requests",
    "engine_prefill_tokens",
    "queue_bytes",
    "bodies_bytes",
    "max_body_bytes",
    "queue_ttl_ms",
    "slo_ttft_ms",
    "slo_tpot_ms",
    "scaling_window_ms",
    "max_replicas",
)
_AT_LEAST_0 = (
    "engine_queue",
    "queue_requests",
    "retry_percent",
    "preemptions",
    "continuations",
    "decisions",
    "decision_bytes",
    "min_replicas",
)


class RouterSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A port of 0 takes any free one; the router prints the ports it took."""

    host: str = "127.0.0.1"
    port: int = 8000
    bind: str = "tcp://127.0.0.1:5557"
    heartbeat_ms: int = 500
    stale_after_ms: int = 3000
    gone_after_ms: int = 60_000
    snapshot_retry_ms: int = 2000
    policy: str = "cost"
    min_remote_tokens: int = 256
    connect_timeout_ms: int = 5000
    attempts: int = 3
    retry_percent: int = 50
    continuations: int = 2
    shutdown_ms: int = 5000
    max_body_bytes: int = 64 << 20
    bodies_bytes: int = 1 << 30
    text_chunk_bytes: int = 256
    text_chunks: int = 200_000
    index_blocks: int = 4_000_000
    tokenizer: str | None = None
    tokenizer_wait_ms: int = 100
    engine_queue: int = 8
    engine_requests: int = 256
    engine_prefill_tokens: int = 65_536
    queue_requests: int = 1024
    queue_bytes: int = 256 << 20
    queue_ttl_ms: int = 60_000
    preemptions: int = 2
    decisions: int = 4096
    decision_bytes: int = 16 << 20
    record_decisions: str | None = None
    objective: Mapping[str, int] | None = None
    tenant_weight: Mapping[str, float] | None = None
    slo_ttft_ms: int = 5000
    slo_tpot_ms: int = 100
    slo_percent: int = 90
    scaling_window_ms: int = 120_000
    min_replicas: int = 1
    max_replicas: int = 1000
    api_key: str | None = None
    stock_engine: tuple[StockEngine, ...] | None = None

    def __post_init__(self) -> None:
        for name in _AT_LEAST_1:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in _AT_LEAST_0:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0; got {getattr(self, name)}")
        if not 0 <= self.port < 65_536:
            raise ConfigError(f"port must be between 0 and 65535; got {self.port}")
        if self.stale_after_ms <= self.heartbeat_ms:
            raise ConfigError(
                f"stale_after_ms must be more than heartbeat_ms ({self.heartbeat_ms}); got {self.stale_after_ms}"
            )
        if self.gone_after_ms <= self.stale_after_ms:
            raise ConfigError(
                f"gone_after_ms must be more than stale_after_ms ({self.stale_after_ms}); got {self.gone_after_ms}"
            )
        if not 1 <= self.slo_percent <= 99:
            raise ConfigError(f"slo_percent must be between 1 and 99; got {self.slo_percent}")
        if self.max_replicas < self.min_replicas:
            raise ConfigError(f"max_replicas must be at least min_replicas; got {self.max_replicas}")
        ids = [rank.id for engine in self.stock_engine or () for rank in stock_settings.ranks(engine)]
        for engine in {each for each in ids if ids.count(each) > 1}:
            raise ConfigError(f"stock_engine has two engines called {engine}: give each an id of its own")


_FLAGS: Mapping[str, str] = {
    "host": "address of the OpenAI API",
    "port": "port of the OpenAI API; 0 takes a free one",
    "bind": "ZeroMQ endpoint that engines connect to; port 0 takes a free one",
    "heartbeat_ms": "how often engines report their load",
    "stale_after_ms": "an engine silent for this long gets no requests",
    "gone_after_ms": "an engine silent for this long is forgotten",
    "snapshot_retry_ms": "how long to wait for a snapshot before asking again",
    "policy": "how engines are chosen: see docs/policies.md",
    "min_remote_tokens": "prompt tokens from which it is worth while that another engine supplies their KV",
    "connect_timeout_ms": "how long to wait for an engine to accept a connection",
    "attempts": "how many engines a request is tried on before its first byte",
    "retry_percent": "retries there may be in 10 s, per hundred requests; 0 for none",
    "continuations": "how often a stream that breaks midway is continued on another engine, where that is exact",
    "shutdown_ms": "how long requests in flight may take to end when the router is told to stop",
    "max_body_bytes": "largest request body accepted",
    "bodies_bytes": "bytes of request bodies that the router holds at a time; more are refused",
    "text_chunk_bytes": "bytes of prompt text per entry of the text index",
    "text_chunks": "entries kept in the text index, about 150 bytes of memory each",
    "index_blocks": "different blocks that each 64 engines may hold in a tier, up to 40 bytes of memory each",
    "tokenizer": "model directory, or MODEL=DIR,MODEL=DIR, to tokenize prompts with; needs vllm-llmd[exact]",
    "tokenizer_wait_ms": "how long a request waits for its token ids before it does without",
    "engine_queue": "requests that may wait in an engine, beyond those it runs, before others wait in the router",
    "engine_requests": "requests that an engine is taken to run at a time, if it does not say",
    "engine_prefill_tokens": "prompt tokens that an engine may have to compute before requests wait in the router",
    "queue_requests": "requests that may wait in the router; more are refused",
    "queue_bytes": "bytes of bodies that may wait in the router; more are refused",
    "queue_ttl_ms": "how long a request may wait in the router; a client may ask for less",
    "preemptions": "how often an engine may be told to leave a request of negative priority for others; 0 for never",
    "decisions": "latest decisions kept for /admin/decisions; 0 for none",
    "decision_bytes": "bytes of memory that they may take, with the explanations that clients asked for",
    "record_decisions": "file to which every decision is appended, for `vllm-llmd replay`",
    "objective": "NAME=PRIORITY, for clients that send llm-d's x-llm-d-inference-objective; may be repeated",
    "tenant_weight": "TENANT=WEIGHT, its share among those that wait, 1 by default; may be repeated",
    "slo_ttft_ms": "objective for the first token of requests that name none, for autoscaling",
    "slo_tpot_ms": "objective for each further token of requests that name none, for autoscaling",
    "slo_percent": "share of requests that are to keep their objectives, for autoscaling",
    "scaling_window_ms": "autoscaling is by what was asked for in so much time",
    "min_replicas": "fewer engines of a kind are never desired",
    "max_replicas": "more engines of a kind are never desired",
    "api_key": f"clients must send it as bearer token; also read from {API_KEY_VARIABLE}",
    "stock_engine": "an engine without our plugin, as http=URL,events=tcp://HOST:PORT; may be repeated",
}


_REPEATED = ("stock_engine", "objective", "tenant_weight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per setting, such as `--min-remote-tokens`."""
    for setting in msgspec.structs.fields(RouterSettings):
        kind = int if setting.type is int else str
        text = _FLAGS[setting.name] + ("" if setting.default is None else " (default: %(default)s)")
        flag, action = "--" + setting.name.replace("_", "-"), "append" if setting.name in _REPEATED else "store"
        parser.add_argument(flag, type=kind, default=setting.default, help=text, action=action)


def from_args(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> RouterSettings:
    """The settings that parsed flags give. Raises ConfigError for one out of range."""
    values = {name: getattr(args, name) for name in _FLAGS}
    values["stock_engine"] = tuple(map(stock_settings.parse, values["stock_engine"] or ())) or None
    values["objective"] = slo.read_objectives(values["objective"] or ()) or None
    values["tenant_weight"] = slo.read_weights(values["tenant_weight"] or ()) or None
    values["api_key"] = values["api_key"] or environ.get(API_KEY_VARIABLE) or None
    return RouterSettings(**values)
