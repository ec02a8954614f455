"""What the benchmark is asked for and what it measures, as the values that stand in `results/pd.json`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import msgspec
from resumable import as_json, check_settings, read_results, replace_file

from vllm_llmd.errors import ConfigError

Transport = Literal["shm", "tcp"]
Part = Literal["ttft", "idle", "raw"]

_LOAD = re.compile(r"(?:(\d+)x)?(\d+)(?:@(\d+))?")


@dataclass(frozen=True)
class Load:
    """So many requests at once, each with a prompt of so many tokens; written `2048` or `8x512`.

    `6000@5` is measured in 5 rounds at most, however many there are: long prompts take their time.
    """

    tokens: int
    at_once: int = 1
    at_most: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        match = _LOAD.fullmatch(text)
        if match is None or "0" in (match[1], match[2], match[3]):
            raise ConfigError(f"a length must look like 2048, 8x512 or 6000@5; got '{text}'")
        return cls(int(match[2]), int(match[1] or 1), None if match[3] is None else int(match[3]))

    def __str__(self) -> str:
        return str(self.tokens) if self.at_once == 1 else f"{self.at_once}x{self.tokens}"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. Results of other settings cannot be continued."""

    models: list[str]
    transports: list[Transport]
    lengths: list[str]
    arms: list[str]
    parts: list[Part]
    rounds: int
    turns: int


class Ttft(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement of one arm: milliseconds to the first token, the mean of those that were sent at once.

    `turn` and `round` pair it with the other arms of its block. `kv_bytes` were read by the destination, `kv_early` of
    them before the source's prefill ended; both are None where the engine does not count them.
    """

    model: str
    transport: Transport
    block: str
    turn: int
    round: int
    load: str
    arm: str
    ttft_ms: float
    kv_bytes: int | None = None
    kv_early: int | None = None


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """The same prompt answered by an arm and by one engine alone: `alike` leading tokens of `of` are the same."""

    model: str
    transport: Transport
    block: str
    turn: int
    arm: str
    alike: int
    of: int


class FirstOrder(msgspec.Struct, frozen=True, kw_only=True):
    """The first and the second order between two engines that were both warm by themselves."""

    model: str
    transport: Transport
    turn: int
    arm: str
    first_ms: float
    second_ms: float


class Idle(msgspec.Struct, frozen=True, kw_only=True):
    """Cores that one engine's processes use when it has had no request for a while. `connector` may be `none`."""

    model: str
    block: str
    turn: int
    round: int
    connector: str
    cores: float


class RawRead(msgspec.Struct, frozen=True, kw_only=True):
    """The same number of bytes read as scattered KV blocks and as one run, one after the other."""

    transport: Transport
    layout: str
    turn: int
    bytes: int
    fragmented_ms: float
    contiguous_ms: float


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """A task that need not be done again, and how long it took, engines' starts included."""

    key: str
    seconds: float


class Results(msgspec.Struct, kw_only=True):
    """Everything measured so far."""

    settings: Settings
    versions: dict[str, str] = {}
    finished: list[Finished] = []
    ttft: list[Ttft] = []
    agreements: list[Agreement] = []
    first_orders: list[FirstOrder] = []
    idle: list[Idle] = []
    raw_reads: list[RawRead] = []
    summary: dict[str, object] = {}


def save(results: Results, path: Path) -> None:
    """Replaces the file in one step: an interrupted run leaves the former one."""
    replace_file(path, as_json(results))


def load(path: Path, settings: Settings) -> Results:
    """Results of a run that was interrupted. Raises ConfigError if there are none, or of other settings."""
    results = read_results(path, Results, f"nothing to resume: there is no {path}")
    check_settings(path, results.settings, settings)
    return results
