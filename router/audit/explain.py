"""Why a request went where it went, for whoever asks with `x-llmd-explain: 1`. Pure.

The answer's headers have the decision's id and a summary of bounded size; all of it is kept with the decision.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from vllm_llmd.names import EngineId, Role
from vllm_llmd.router.audit.barred import Barred
from vllm_llmd.router.audit.decisions import Made, Record
from vllm_llmd.router.candidates import Candidates, Column
from vllm_llmd.router.request import RequestError

ASK_HEADER: Final = "x-llmd-explain"
"""Of a request: whether to explain. Of its answer: the summary."""
ID_HEADER: Final = "x-llmd-decision"

SUMMARY_BYTES: Final = 2048
"""Proxies take headers of 4 KiB in all, by default, or 8."""

ALTERNATIVES: Final = 16

_YES_OR_NO: Final[Mapping[str, bool]] = {"1": True, "true": True, "0": False, "false": False}

LOADS: Final[Mapping[str, str]] = {
    "requests": "requests",
    "prefill_tokens": "tokens",
    "running": "running",
    "waiting": "waiting",
    "free_blocks": "free_blocks",
    "cached_blocks": "cached_blocks",
}
"""What is told of an engine's load, and which column it is."""


def wanted(value: str | None) -> bool:
    """Whether the header asks for an explanation. Raises RequestError for a value that says neither yes nor no."""
    if value is None:
        return False
    said = _YES_OR_NO.get(value.strip().lower())
    if said is None:
        raise RequestError(f"{ASK_HEADER} must be 1 or 0; got {value[:40]!r}", ASK_HEADER)
    return said


@dataclass(frozen=True, eq=False)
class Explanation:
    """All candidates as columns, what each would cost by term, and who was none.

    `prices` are of having a candidate do everything; empty where the policy does not reckon in milliseconds.
    """

    engines: Sequence[EngineId]
    roles: Sequence[Role]
    decodes: Sequence[bool]
    columns: Mapping[str, Column]
    prices: Mapping[str, Column]
    barred: Sequence[Barred]

    @property
    def size_bytes(self) -> int:
        arrays = (*self.columns.values(), *self.prices.values())
        return sum(each.nbytes for each in arrays) + 32 * len(self.engines) + 256 * len(self.barred)

    @property
    def totals_ms(self) -> Column | None:
        """Of each candidate that would do everything; None without prices."""
        return sum(self.prices.values(), np.zeros(len(self.engines))) if self.prices else None

    def cheapest(self, most: int) -> list[tuple[EngineId, float | None]]:
        """Those that may decode, by what it costs to have them do everything."""
        totals_ms = self.totals_ms
        if totals_ms is None:
            return []
        by_price = [place for place in np.argsort(totals_ms, kind="stable").tolist() if self.decodes[place]]
        return [(self.engines[place], _rounded(float(totals_ms[place]))) for place in by_price[:most]]

    def shown(self) -> dict[str, Any]:
        columns = {name: column.tolist() for name, column in self.columns.items()}
        prices = {name: np.round(price, 3).tolist() for name, price in self.prices.items()}
        totals_ms = None if self.totals_ms is None else np.round(self.totals_ms, 3).tolist()
        candidates = [
            {
                "engine": engine,
                "role": self.roles[place],
                "decodes": self.decodes[place],
                **{name: column[place] for name, column in columns.items() if name not in LOADS},
                "load": {name: columns[name][place] for name in LOADS},
                "prices": {name: price[place] for name, price in prices.items()},
                "total_ms": None if totals_ms is None else totals_ms[place],
            }
            for place, engine in enumerate(self.engines)
        ]
        return {"candidates": candidates, "barred": [each._asdict() for each in self.barred]}


def explanation(made: Made, barred: Sequence[Barred]) -> Explanation:
    """Of a decision just made: this is where prices are looked at."""
    candidates = made.candidates
    choice = None if made.decision is None else made.decision.choice
    decodes = np.zeros(len(candidates), bool)
    decodes[candidates.roster.decoders] = True
    engines = [engine.info.id for engine in candidates.roster.engines]
    kept_from_it = {each.engine for each in barred}
    return Explanation(
        engines=engines,
        roles=[engine.info.role for engine in candidates.roster.engines],
        decodes=[may and engine not in kept_from_it for may, engine in zip(decodes.tolist(), engines, strict=True)],
        columns=_columns(candidates),
        prices={} if choice is None else {name: np.asarray(price) for name, price in choice.prices.items()},
        barred=barred,
    )


def _columns(candidates: Candidates) -> dict[str, Column]:
    sizes = candidates.roster.block_sizes
    tokens = {
        "cached_tokens": candidates.prefix_blocks * sizes,
        "offloaded_tokens": candidates.offloaded_blocks * sizes,
        "coming_tokens": candidates.coming * sizes,
        "claimed_tokens": candidates.claimed_blocks * sizes,
    }
    load = {name: np.nan_to_num(getattr(candidates.loads, column)) for name, column in LOADS.items()}
    return {name: np.asarray(column).astype(np.int64) for name, column in (tokens | load).items()}


def headers(record: Record, why: Explanation) -> dict[str, str]:
    """Of the answer: the decision's id and a summary, the parts of it that fit."""
    said: dict[str, Any] = {}
    for part in (
        {"destination": record.destination, "source": record.source, "until": record.until},
        {"policy": record.policy, "cached_tokens": record.cached_tokens, "prompt_tokens": record.prompt_tokens},
        {"total_ms": _rounded(record.predicted_ms)},
        {"terms": {name: _rounded(value) for name, value in record.terms.items()}},
        {"waited_ms": _rounded(record.waited_ms), "decided_ms": _rounded(record.decided_ms)},
        {"candidates": record.candidates},
        {"barred": dict(Counter(each.why for each in why.barred))},
    ):
        said = _with(said, part)
    cheapest: list[tuple[EngineId, float | None]] = []
    for alternative in why.cheapest(ALTERNATIVES):
        more = _with(said, {"cheapest": [*cheapest, alternative]})
        if more is said:
            break
        cheapest.append(alternative)
    if cheapest:
        said = {**said, "cheapest": cheapest}
    return {ID_HEADER: record.id, ASK_HEADER: _spelled(said)}


def _with(said: dict[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """What is said and the part, or without it if that would be too long."""
    more = {**said, **part}
    return more if len(_spelled(more)) <= SUMMARY_BYTES else said


def _rounded(ms: float | None) -> float | None:
    return round(ms, 2) if ms is not None and math.isfinite(ms) else None


def _spelled(said: Mapping[str, Any]) -> str:
    return json.dumps(said, separators=(",", ":"))
