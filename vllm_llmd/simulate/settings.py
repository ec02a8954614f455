"""Everything that can be set on a simulation, read once from flags, then passed down."""

import argparse
from collections.abc import Mapping
from typing import Final, Literal, get_args, get_origin

import msgspec

from vllm_llmd.errors import ConfigError
from vllm_llmd.names import EngineId, Role
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.sim import settings as sim_settings
from vllm_llmd.sim.limits import EnginePolicy, Limits
from vllm_llmd.sim.settings import SimSettings

BLOCK_SIZE: Final = 128
"""Prompts of a trace differ by whole blocks of 512 tokens: small blocks find no more, and take longer to simulate."""

BLOCKS: Final = 3072
"""48 GiB at 128 KiB a token: what an H100 of 80 GB has left for KV beside 8 billion parameters in 16 bits."""

WHOLE_RUN: Final = 10_000
"""Steps taken together: nobody looks at single tokens."""

ROUTER: Final = RouterSettings()

NEVER: Final = 1_000_000_000
"""No engine ever has so much to do: with this as its bounds, nobody waits in the router."""


Place = Literal["router", "engines"]
"""Where requests wait."""


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a request has to keep to count as good: time to the first token, and per token after it."""

    ttft_ms: float
    tpot_ms: float


class SimulateSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One trace, played once per policy. Of `engines`, `prefill` prefill and the others decode; 0: all do both.

    `model` describes one engine, but for its `engine_policy`; all are alike.
    """

    trace: str | None = None
    synthetic: int | None = None
    engines: int = 8
    prefill: int = 0
    policy: tuple[str, ...] = ()
    requests: int | None = None
    minutes: float | None = None
    copies: int = 1
    speedup: float | None = None
    rate: float | None = None
    arrivals: Literal["spread", "as-told"] = "spread"
    slo_ttft_ms: float = 5000.0
    slo_tpot_ms: float = 100.0
    tight_share: float = 0.0
    tight_ttft_ms: float = 1000.0
    tight_tpot_ms: float = 50.0
    best_effort_share: float = 0.0
    send_slo: bool = False
    heartbeat_ms: float = 500.0
    min_remote_tokens: int = 256
    engine_policy: EnginePolicy = "priority"
    waiting: Place = "router"
    engine_queue: int = ROUTER.engine_queue
    engine_prefill_tokens: int = ROUTER.engine_prefill_tokens
    queue_requests: int = ROUTER.queue_requests
    queue_ttl_ms: int = ROUTER.queue_ttl_ms
    preemptions: int = ROUTER.preemptions
    seed: int = 0
    json: str | None = None
    html: str | None = None
    model: SimSettings = SimSettings(block_size=BLOCK_SIZE, blocks=BLOCKS)

    def __post_init__(self) -> None:
        for name in ("synthetic", "engines", "requests", "copies"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1; got {value}")
        for name in (
            "minutes",
            "speedup",
            "rate",
            "slo_ttft_ms",
            "slo_tpot_ms",
            "tight_ttft_ms",
            "tight_tpot_ms",
            "heartbeat_ms",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be more than 0; got {value}")
        for name in ("tight_share", "best_effort_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be between 0 and 1; got {getattr(self, name)}")
        if (self.trace is None) == (self.synthetic is None):
            raise ConfigError("give either a trace, --trace FILE, or a number of made-up requests, --synthetic N")
        if self.speedup is not None and self.rate is not None:
            raise ConfigError("speedup and rate are two ways to say the same: give one")
        if not 0 <= self.prefill < self.engines:
            raise ConfigError(
                f"prefill must be between 0 and {self.engines - 1}, to leave one to decode; got {self.prefill}"
            )

    @property
    def slo(self) -> Slo:
        return Slo(ttft_ms=self.slo_ttft_ms, tpot_ms=self.slo_tpot_ms)

    @property
    def tight_slo(self) -> Slo:
        """Of those of `tight_share`."""
        return Slo(ttft_ms=self.tight_ttft_ms, tpot_ms=self.tight_tpot_ms)

    def limits(self) -> Limits:
        """Of every engine. Raises ConfigError for settings out of range."""
        return msgspec.structs.replace(self.model, chunk_tokens=WHOLE_RUN, policy=self.engine_policy).limits()

    def router(self) -> RouterSettings:
        """The router of the fleet. Raises ConfigError for settings out of range."""
        heartbeat_ms = max(round(self.heartbeat_ms), 1)
        in_router = self.waiting == "router"
        return RouterSettings(
            min_remote_tokens=self.min_remote_tokens,
            heartbeat_ms=heartbeat_ms,
            stale_after_ms=2 * heartbeat_ms,  # of no effect: engines fall silent only where nothing happens
            gone_after_ms=3 * heartbeat_ms,
            engine_queue=self.engine_queue if in_router else NEVER,
            engine_prefill_tokens=self.engine_prefill_tokens if in_router else NEVER,
            queue_requests=self.queue_requests,
            queue_ttl_ms=self.queue_ttl_ms,
            preemptions=self.preemptions,
        )

    def fleet(self) -> list[tuple[EngineId, Role]]:
        """Every engine by name, with its role."""
        if not self.prefill:
            return [(EngineId(f"engine-{n}"), "both") for n in range(self.engines)]
        prefill: list[tuple[EngineId, Role]] = [(EngineId(f"prefill-{n}"), "prefill") for n in range(self.prefill)]
        return prefill + [(EngineId(f"decode-{n}"), "decode") for n in range(self.engines - self.prefill)]


_FLAGS: Mapping[str, str] = {
    "trace": "file of requests, one JSON object a line, as the Mooncake project publishes them",
    "synthetic": "how many requests of made-up chats to play instead of a trace",
    "engines": "how many engines",
    "prefill": "how many of them prefill for the others, which decode; 0: all do both",
    "policy": "how the router chooses engines; may be repeated (default: the router's)",
    "requests": "how many requests of the trace to take (default: all)",
    "minutes": "how many minutes of the trace to take (default: all)",
    "copies": "how many times as many users, who share no prompts with those of another copy",
    "speedup": "how much faster than in the trace requests come (default: 1)",
    "rate": "how many requests come per second, instead of --speedup",
    "arrivals": "as-told, or spread: those of one timestamp come at random times between it and the next",
    "slo_ttft_ms": "time to the first token that a good request keeps",
    "slo_tpot_ms": "time per token after the first that a good request keeps",
    "tight_share": "share of the requests, by chance, that have tighter ones to keep",
    "tight_ttft_ms": "time to the first token that these have to keep",
    "tight_tpot_ms": "time per token after the first that these have to keep",
    "best_effort_share": "share of the requests, by chance, that are best effort: of priority -1, without objectives",
    "send_slo": "clients send the router the objectives that their requests have to keep",
    "heartbeat_ms": "how often engines report their load",
    "min_remote_tokens": "uncached prompt tokens from which another engine supplies the KV",
    "engine_policy": "priority: engines serve by when the router says that a request is due; fcfs: in order of arrival",
    "waiting": "where requests wait while engines have enough to do: in the router, by its rules, or in the engines",
    "engine_queue": "as the router's flag",
    "engine_prefill_tokens": "as the router's flag",
    "queue_requests": "as the router's flag",
    "queue_ttl_ms": "as the router's flag",
    "preemptions": "as the router's flag",
    "seed": "decides what is left to chance",
    "json": "file to write the report to, as JSON",
    "html": "file to write the report to, as a page with plots",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per setting, such as `--slo-ttft-ms`, and those that describe an engine."""
    for setting in msgspec.structs.fields(SimulateSettings):
        if setting.name == "model":
            continue
        flag, text = "--" + setting.name.replace("_", "-"), _FLAGS[setting.name]
        if isinstance(setting.default, tuple):
            parser.add_argument(flag, action="append", help=text)
            continue
        if setting.default is False:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        kind = {int: int, int | None: int, float: float, float | None: float}.get(setting.type, str)
        shown = "" if setting.default is None else " (default: %(default)s)"
        choices = get_args(setting.type) if get_origin(setting.type) is Literal else None
        parser.add_argument(flag, type=kind, choices=choices, default=setting.default, help=text + shown)
    sim_settings.add_arguments(parser, sim_settings.MODEL)
    parser.set_defaults(block_size=BLOCK_SIZE, blocks=BLOCKS)


def from_args(args: argparse.Namespace) -> SimulateSettings:
    """The settings that parsed flags give. Raises ConfigError for one out of range."""
    values = {name: getattr(args, name) for name in _FLAGS if getattr(args, name) is not None}
    model = {name: getattr(args, name) for name in sim_settings.MODEL}
    try:
        settings = msgspec.convert({**values, "model": model}, SimulateSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from None
    settings.limits()
    settings.model.speeds()
    settings.router()
    return settings
