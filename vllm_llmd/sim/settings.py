"""Everything that can be set on simulated engines, read once from flags, then passed down."""

import argparse
import json
import os
from collections.abc import Collection, Mapping
from typing import Final, Literal, get_args, get_origin

import msgspec

from vllm_llmd.errors import ConfigError
from vllm_llmd.names import Role
from vllm_llmd.sim.failures import Failures, read_failures
from vllm_llmd.sim.limits import EnginePolicy, Limits
from vllm_llmd.sim.speeds import Speeds

SECRET_VARIABLE = "VLLM_LLMD_SECRET"

HashForm = Literal["int", "bytes"]
EventForm = Literal["map", "array"]


class SimSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`count` engines of a kind, in one process. A port of 0 takes any free one; others count up from it.

    Times are those of the simulated engine; on a real clock they pass `speed_up` times as fast.
    """

    id: str = "sim"
    count: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    router: tuple[str, ...] = ()
    role: Role = "both"
    model: tuple[str, ...] = ("sim",)
    max_model_len: int = 131_072
    answer_tokens: int = 128
    block_size: int = 16
    blocks: int = 8192
    cpu_blocks: int = 0
    max_sequences: int = 256
    token_budget: int = 8192
    policy: EnginePolicy = "fcfs"
    min_order_tokens: int = 64
    chunk_tokens: int = 1
    step_ms: float = Speeds().step_ms
    prefill_us: float = Speeds().prefill_us_per_token
    prefill_context_us: float = Speeds().prefill_us_per_token_per_1k_context
    decode_us: float = Speeds().decode_us_per_sequence
    decode_context_us: float = Speeds().decode_us_per_1k_context
    request_ms: float = Speeds().request_ms
    kv_bytes: int = Speeds().kv_bytes_per_token
    transfer_gbps: float = Speeds().transfer_gb_per_s
    cpu_gbps: float = Speeds().offload_gb_per_s
    speed_up: float = 1.0
    drain_ms: int = 0
    seed: int = 0
    kv_events_port: int | None = None
    kv_events_form: EventForm = "map"
    kv_events_hashes: HashForm = "int"
    secret: str | None = None
    failures: str = "{}"

    def __post_init__(self) -> None:
        for name in ("count", "answer_tokens", "chunk_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("port", "kv_events_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port < 65_536:
                raise ConfigError(f"{name} must be between 0 and 65535; got {port}")
        if self.drain_ms < 0:
            raise ConfigError(f"drain_ms must be at least 0; got {self.drain_ms}")
        if not self.speed_up > 0:
            raise ConfigError(f"speed_up must be more than 0; got {self.speed_up}")
        if not self.model:
            raise ConfigError("model must name at least one model")

    def limits(self) -> Limits:
        """Raises ConfigError for what is out of range."""
        return Limits(
            block_size=self.block_size,
            blocks=self.blocks,
            offload_blocks=self.cpu_blocks,
            max_sequences=self.max_sequences,
            token_budget=self.token_budget,
            policy=self.policy,
            run_steps=self.chunk_tokens,
            min_order_tokens=self.min_order_tokens,
        )

    def speeds(self) -> Speeds:
        """Raises ConfigError for what is out of range."""
        return Speeds(
            step_ms=self.step_ms,
            prefill_us_per_token=self.prefill_us,
            prefill_us_per_token_per_1k_context=self.prefill_context_us,
            decode_us_per_sequence=self.decode_us,
            decode_us_per_1k_context=self.decode_context_us,
            request_ms=self.request_ms,
            kv_bytes_per_token=self.kv_bytes,
            transfer_gb_per_s=self.transfer_gbps,
            offload_gb_per_s=self.cpu_gbps,
        )

    def first_failures(self) -> Failures:
        """What the engines do wrong from the start. Raises ConfigError if it cannot be read."""
        try:
            raw = json.loads(self.failures)
        except ValueError as error:
            raise ConfigError(f"failures must be a JSON object; got {self.failures!r} ({error})") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"failures must be a JSON object; got {self.failures!r}")
        return read_failures(raw, Failures())


_FLAGS: Mapping[str, str] = {
    "id": "name of the engine; of several, ID-0, ID-1 and so on",
    "count": "how many engines to run in this process",
    "host": "address of the OpenAI API",
    "port": "port of the first engine's API; 0 takes free ones",
    "router": "ZeroMQ endpoint of a router; may be repeated (default: none)",
    "role": "prefill, decode or both",
    "model": "name to serve; may be repeated, then all but the first are adapters (default: sim)",
    "max_model_len": "tokens of prompt and answer together, if as many fit into the blocks",
    "answer_tokens": "how long answers are on average, where the client sets no bound",
    "block_size": "tokens per KV block",
    "blocks": "KV blocks",
    "cpu_blocks": "blocks of a second, slower tier",
    "max_sequences": "requests that run at a time",
    "token_budget": "tokens per step",
    "policy": "fcfs or priority",
    "min_order_tokens": "prompts with fewer uncached tokens are computed here, whatever the router hints",
    "chunk_tokens": "tokens per piece of a stream; more are less work for this machine",
    "step_ms": "time of a step that does nothing",
    "prefill_us": "time per prompt token",
    "prefill_context_us": "time per prompt token and 1,000 tokens before it",
    "decode_us": "time per sequence that decodes",
    "decode_context_us": "time per sequence that decodes and 1,000 tokens before it",
    "request_ms": "time that a request takes of the engine beside its tokens, in the step that admits it",
    "kv_bytes": "bytes of KV cache per token",
    "transfer_gbps": "GB/s from engine to engine",
    "cpu_gbps": "GB/s from the second tier",
    "speed_up": "how much faster than a real engine's time passes",
    "drain_ms": "how long requests may take to end on SIGTERM or SIGINT; meanwhile new ones are refused",
    "seed": "decides which messages meet with faults",
    "kv_events_port": "publish vLLM's own KV events on this port, and replay them on the next (default: do not)",
    "kv_events_form": "map as of vLLM 0.32, or array as of releases before",
    "kv_events_hashes": "int or bytes",
    "secret": f"the fleet's secret, which orders are signed with; also read from {SECRET_VARIABLE}",
    "failures": "what to do wrong from the start, as JSON; see POST /sim/failures",
}


MODEL: Final = (
    "block_size",
    "blocks",
    "cpu_blocks",
    "max_sequences",
    "token_budget",
    "min_order_tokens",
    "step_ms",
    "prefill_us",
    "prefill_context_us",
    "decode_us",
    "decode_context_us",
    "request_ms",
    "kv_bytes",
    "transfer_gbps",
    "cpu_gbps",
)
"""The settings that describe the model alone."""


def add_arguments(parser: argparse.ArgumentParser, names: Collection[str] = tuple(_FLAGS)) -> None:
    """Adds one flag per setting of those named, such as `--block-size`."""
    for setting in msgspec.structs.fields(SimSettings):
        if setting.name not in names:
            continue
        flag, text = "--" + setting.name.replace("_", "-"), _FLAGS[setting.name]
        if isinstance(setting.default, tuple):
            parser.add_argument(flag, action="append", help=text)
            continue
        kind = {int: int, float: float, int | None: int}.get(setting.type, str)
        shown = "" if setting.default is None else " (default: %(default)s)"
        choices = get_args(setting.type) if get_origin(setting.type) is Literal else None
        parser.add_argument(flag, type=kind, choices=choices, default=setting.default, help=text + shown)


def from_args(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> SimSettings:
    """The settings that parsed flags give. Raises ConfigError for one out of range."""
    values = {name: getattr(args, name) for name in _FLAGS if getattr(args, name) is not None}
    if environ.get(SECRET_VARIABLE):
        values.setdefault("secret", environ[SECRET_VARIABLE])
    try:
        settings = msgspec.convert(values, SimSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from None
    settings.limits()
    settings.speeds()
    settings.first_failures()
    return settings
