"""What a client asks of the service by headers: objectives, priority, tenant, time to wait, engines. Pure.

Ours come first, then llm-d's names for the same, then the names that llm-d had for them before.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from vllm_llmd.errors import ConfigError
from vllm_llmd.router.members.selector import Selector, SelectorError, read_selector
from vllm_llmd.router.request import Facts, RequestError

TTFT: Final = ("x-llmd-slo-ttft-ms", "x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TPOT: Final = ("x-llmd-slo-tpot-ms", "x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")
PRIORITY: Final = "x-llmd-priority"
OBJECTIVE: Final = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
TENANT: Final = ("x-llmd-tenant", "x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
TTL_MS: Final = "x-llmd-ttl-ms"
TTL: Final = "x-llm-d-inference-ttl"
LABELS: Final = "x-llmd-engine-labels"

MOST_MS: Final = 3_600_000
MOST_URGENT: Final = 1000
LONGEST_TENANT: Final = 256

Band = Literal["best_effort", "normal", "high"]
"""Priorities below, at and above 0: as many as clients may name would make too many series."""

_KNOWN: Final = frozenset((*TTFT, *TPOT, PRIORITY, *OBJECTIVE, *TENANT, TTL_MS, TTL, LABELS))
_NUMBER: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)
_WHOLE: Final = re.compile(r"[+-]?[0-9]{1,9}", re.ASCII)
_DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ns|us|µs|ms|s|m|h)", re.ASCII)
_UNIT_MS: Final = {"ns": 1e-6, "us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4, "h": 3.6e6}


@dataclass(frozen=True)
class Wish:
    """`ttft_ms` and `tpot_ms` are objectives; higher priorities go first, negative ones are best effort.

    `tenant` is empty for whoever names none. `ttl_ms` is how long the request may wait for an engine, `selector` which
    engines it may go to.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    priority: int = 0
    tenant: str = ""
    ttl_ms: float | None = None
    selector: Selector | None = None


NOTHING: Final = Wish()


def band(priority: int) -> Band:
    """How a priority is labelled."""
    return "normal" if not priority else "high" if priority > 0 else "best_effort"


def read_wish(headers: Iterable[tuple[str, str]], objectives: Mapping[str, int]) -> Wish:
    """`objectives` are priorities by name. Raises RequestError that names the header and says what it should be."""
    said: dict[str, str] = {}
    for name, value in headers:
        known = name.lower()
        if known in _KNOWN and said.setdefault(known, value.strip()) != value.strip():
            raise RequestError(f"{known} is there twice, with different values: send it once", known)
    if not said:
        return NOTHING
    return Wish(
        ttft_ms=_milliseconds(said, TTFT),
        tpot_ms=_milliseconds(said, TPOT),
        priority=_priority(said, objectives),
        tenant=_tenant(said),
        ttl_ms=_ttl_ms(said),
        selector=_selector(said),
    )


def with_wish(facts: Facts, wish: Wish) -> Facts:
    """The facts with what concerns the choice of an engine."""
    if wish.selector is None and wish.ttft_ms is None and wish.tpot_ms is None:
        return facts
    return replace(facts, selector=wish.selector, ttft_ms=wish.ttft_ms, tpot_ms=wish.tpot_ms)


def still_due(facts: Facts, age_ms: float) -> Facts:
    """The facts of a request that came so long ago: its first token is due so much sooner, or overdue."""
    return facts if facts.ttft_ms is None else replace(facts, ttft_ms=facts.ttft_ms - age_ms)


def begun(facts: Facts) -> Facts:
    """The facts of a request whose first token has come."""
    return facts if facts.ttft_ms is None else replace(facts, ttft_ms=None)


def read_objectives(texts: Iterable[str]) -> dict[str, int]:
    """`NAME=PRIORITY`, each. Raises ConfigError."""
    found: dict[str, int] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        if not name or not _WHOLE.fullmatch(value) or abs(int(value)) > MOST_URGENT:
            raise ConfigError(
                f"objective must look like NAME=PRIORITY, with a priority of at most {MOST_URGENT} either way; "
                f"got {text!r}"
            )
        found[name] = int(value)
    return found


def read_weights(texts: Iterable[str]) -> dict[str, float]:
    """`TENANT=WEIGHT`, each. Raises ConfigError."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        if not name or not _NUMBER.fullmatch(value) or not 0.001 <= float(value) <= 1000:
            raise ConfigError(
                f"tenant_weight must look like TENANT=WEIGHT, with a weight from 0.001 to 1000; got {text!r}"
            )
        found[name] = float(value)
    return found


def _first(said: Mapping[str, str], names: Iterable[str]) -> tuple[str, str] | None:
    return next(((name, said[name]) for name in names if name in said), None)


def _milliseconds(said: Mapping[str, str], names: Iterable[str]) -> float | None:
    found = _first(said, names)
    if found is None:
        return None
    name, text = found
    if not _NUMBER.fullmatch(text):
        raise RequestError(f"{name} must be a number of milliseconds, such as 250; got {_shown(text)}", name)
    return _bounded(name, float(text))


def _bounded(name: str, ms: float) -> float:
    if not 1 <= ms <= MOST_MS:
        raise RequestError(f"{name} must be from 1 ms to {MOST_MS} ms; got {ms:g} ms", name)
    return ms


def _ttl_ms(said: Mapping[str, str]) -> float | None:
    if TTL_MS in said:
        return _milliseconds(said, (TTL_MS,))
    if TTL not in said:
        return None
    text = said[TTL]
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text.removeprefix("+"):
        raise RequestError(f"{TTL} must be a duration, such as 1500ms or 2s; got {_shown(text)}", TTL)
    return _bounded(TTL, math.fsum(float(number) * _UNIT_MS[unit] for number, unit in parts))


def _priority(said: Mapping[str, str], objectives: Mapping[str, int]) -> int:
    if PRIORITY not in said:
        objective = _first(said, OBJECTIVE)
        return 0 if objective is None else objectives.get(objective[1], 0)
    text = said[PRIORITY]
    if not _WHOLE.fullmatch(text):
        raise RequestError(f"{PRIORITY} must be a whole number; got {_shown(text)}", PRIORITY)
    if abs(int(text)) > MOST_URGENT:
        raise RequestError(f"{PRIORITY} must be from -{MOST_URGENT} to {MOST_URGENT}; got {int(text)}", PRIORITY)
    return int(text)


def _tenant(said: Mapping[str, str]) -> str:
    found = _first(said, TENANT)
    if found is None:
        return ""
    name, text = found
    if len(text) > LONGEST_TENANT or not text.isprintable():
        raise RequestError(f"{name} must be at most {LONGEST_TENANT} printable characters; got {_shown(text)}", name)
    return text


def _selector(said: Mapping[str, str]) -> Selector | None:
    try:
        return read_selector(said.get(LABELS, ""))
    except SelectorError as error:
        raise RequestError(f"{LABELS} {error}", LABELS) from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")
