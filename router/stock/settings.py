"""What a user says of an engine that runs without our plugin: `http=http://HOST:8000,events=tcp://HOST:5557`. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from vllm_llmd import labels
from vllm_llmd.errors import ConfigError
from vllm_llmd.names import EngineId

LARGEST_PORT: Final = 65_535

LABEL: Final = "label."
"""What stands before the key of a label."""


class StockEngine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`events` is where it publishes its KV events, `replay` where it repeats them: of rank 0, other ranks count up.

    `dp` data-parallel ranks share the API at `http`. `block_size` is told by the first event where it is not set.
    """

    http: str
    events: str
    replay: str | None = None
    id: str | None = None
    block_size: int | None = None
    dp: int = 1
    topic: str = ""
    labels: dict[str, str] = {}


@dataclass(frozen=True)
class Rank:
    """One rank of a stock engine: to the router an engine of its own. `number` is None where there is but one."""

    id: EngineId
    number: int | None
    http: str
    events: str
    replay: str | None
    topic: str
    block_size: int | None
    labels: Mapping[str, str] = field(default_factory=dict)


def parse(text: str) -> StockEngine:
    """Raises ConfigError that says what is wrong with which key."""
    said: dict[str, Any] = {}
    for part in text.split(","):
        key, found, value = part.partition("=")
        if not found or key in said:
            raise ConfigError(f"stock_engine must look like http=URL,events=tcp://HOST:PORT; got {text!r}")
        said[key] = value
    labelled = {key.removeprefix(LABEL): said.pop(key) for key in [*said] if key.startswith(LABEL)}
    known = [field for field in StockEngine.__struct_fields__ if field != "labels"]
    for key in said:
        if key not in known:
            raise ConfigError(f"stock_engine has an unknown key '{key}'; known are {', '.join(known)}, {LABEL}KEY")
    try:
        engine = msgspec.convert(said | {"labels": labelled}, StockEngine, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"stock_engine {text!r}: {error}") from None
    _check(engine)
    return engine


def ranks(engine: StockEngine) -> Iterator[Rank]:
    """The engine's ranks, each with endpoints of its own."""
    name = engine.id or _host(engine.http)
    for rank in range(engine.dp):
        yield Rank(
            id=EngineId(name if engine.dp == 1 else f"{name}-dp{rank}"),
            number=None if engine.dp == 1 else rank,
            http=engine.http.rstrip("/"),
            events=_moved(engine.events, rank),
            replay=None if engine.replay is None else _moved(engine.replay, rank),
            topic=engine.topic,
            block_size=engine.block_size,
            labels=engine.labels,
        )


def _check(engine: StockEngine) -> None:
    if not engine.http.startswith(("http://", "https://")) or not _host(engine.http):
        raise ConfigError(f"stock_engine 'http' must look like http://HOST:PORT; got {engine.http!r}")
    for key, endpoint in (("events", engine.events), ("replay", engine.replay or engine.events)):
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        is_port = port.isascii() and port.isdigit() and int(port) > 0 and int(port) + engine.dp - 1 <= LARGEST_PORT
        if not endpoint.startswith("tcp://") or not host or "*" in host or not is_port:
            raise ConfigError(f"stock_engine '{key}' must look like tcp://HOST:PORT; got {endpoint!r}")
    for key, number in (("dp", engine.dp), ("block_size", 1 if engine.block_size is None else engine.block_size)):
        if number < 1:
            raise ConfigError(f"stock_engine '{key}' must be at least 1; got {number}")
    if engine.id is not None and ("/" in engine.id or not engine.id):
        raise ConfigError(f"stock_engine 'id' must be a name without slashes; got {engine.id!r}")
    if objection := labels.objection(engine.labels):
        raise ConfigError(f"stock_engine labels {objection}")


def _host(url: str) -> str:
    return url.partition("://")[2].partition("/")[0]


def _moved(endpoint: str, by: int) -> str:
    base, _, port = endpoint.rpartition(":")
    return f"{base}:{int(port) + by}"
