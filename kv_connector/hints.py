"""Pure: what a router says of a request, and which engine is to supply which part of its prompt."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_llmd.names import EngineId
from vllm_llmd.wire import EngineInfo

HINT_KEY = "llmd"
"""Where the hint stands in a request's `kv_transfer_params`."""

MAX_SOURCES = 64
"""More than any prompt has; what is hinted beyond counts as unsaid."""

MAX_NAME_CHARS = 256
MAX_COUNT = 2**53
"""Up to here a float is exact."""

TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True)
class HintedSource:
    """An engine that should supply the prompt's KV up to token `until` (exclusive), or to its end.

    It serves the order by `priority`, as vLLM understands it, if that is told; else by that of the request. It is not
    to be asked for fewer tokens than `least`.
    """

    engine: EngineId
    until: int | None = None
    priority: int | None = None
    least: int | None = None


@dataclass(frozen=True)
class Hint:
    """What the router says of a request.

    `sources` supply successive parts of the prompt; `request` is what the router calls it; the answer is worth waiting
    for `deadline_ms` at most; `trace` is a W3C `traceparent`.
    """

    sources: tuple[HintedSource, ...] = ()
    request: str | None = None
    deadline_ms: int | None = None
    trace: str | None = None

    def supplied(self, prompt_tokens: int) -> int:
        """How many tokens of a prompt of so many are to come from other engines: never its last."""
        if not self.sources:
            return 0
        until = self.sources[-1].until
        return max(prompt_tokens - 1, 0) if until is None else min(until, max(prompt_tokens - 1, 0))


def read_hint(kv_transfer_params: Any) -> Hint:
    """The hint of a request. What has the wrong shape counts as unsaid."""
    raw = kv_transfer_params.get(HINT_KEY) if isinstance(kv_transfer_params, Mapping) else None
    if not isinstance(raw, Mapping):
        return Hint()
    sources = raw.get("sources")
    if not isinstance(sources, Sequence) or isinstance(sources, str):
        sources = [{"engine": raw.get("source")}]
    name, deadline, trace = raw.get("request"), raw.get("deadline_ms"), raw.get("trace")
    return Hint(
        sources=tuple(source for source in map(_source, sources[:MAX_SOURCES]) if source is not None),
        request=name if _is_name(name) else None,
        deadline_ms=deadline if _is_count(deadline) else None,
        trace=trace if isinstance(trace, str) and TRACEPARENT.fullmatch(trace) else None,
    )


@dataclass(frozen=True)
class Part:
    """Prompt tokens `first_token` to `end_token` (exclusive), to come from `source`, which serves it by `priority`."""

    source: EngineInfo
    first_token: int
    end_token: int
    priority: int | None = None

    @property
    def tokens(self) -> int:
        return self.end_token - self.first_token


@dataclass(frozen=True)
class Need:
    """Prompt tokens `first_token` to `end_token` lack their KV; a part must be of `min_tokens`, and end at a block."""

    first_token: int
    end_token: int
    min_tokens: int
    block_size: int


def split(need: Need, sources: Sequence[tuple[EngineInfo, HintedSource]]) -> list[Part]:
    """Deal the need out to sources, in order, each as hinted. A part too small goes to whoever comes next.

    Example: 1000 to 6000 from A until 4100 and then B, in blocks of 32: A supplies 1000 to 4096, B 4096 to 6000.
    """
    parts: list[Part] = []
    first = need.first_token
    for source, hinted in sources:
        end, until = need.end_token, hinted.until
        if until is not None and until < end:
            unit = max(need.block_size, source.geometry.groups[0].block_size if source.geometry.groups else 1)
            end = until // unit * unit
        if end - first >= max(need.min_tokens, hinted.least or 0):
            parts.append(Part(source, first, end, hinted.priority))
            first = end
    return parts


def _source(raw: Any) -> HintedSource | None:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("engine"), str):
        return None
    until, priority, least = raw.get("until"), raw.get("priority"), raw.get("least")
    return HintedSource(
        EngineId(raw["engine"]),
        until if _is_count(until) else None,
        priority if _is_priority(priority) else None,
        least if _is_count(least) else None,
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARS and value.isprintable()


def _is_priority(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_COUNT


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_COUNT
