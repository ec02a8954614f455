"""The parts of `make bench-index`, what each measures, and the line and file that come of it. Pure."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from index_values import Found, Settings

PARTS: dict[str, tuple[str, ...]] = {
    "table": (
        "apply512_vs_dynamo",
        "apply1_vs_dynamo",
        "match512_vs_dynamo",
        "hash512_vs_dynamo",
        "bytes_per_block",
    ),
    "zmq": ("zmq_vs_dynamo",),
    "select": ("select_vs_dynamo",),
    "route": ("route_100k_tokens_p50_ms",),
    "lag": ("lag_p99_ms",),
    "join": ("join_exact_s",),
    "publish": ("publish_cost_pct",),
}
"""A part is a module `index_<part>` with `measure(settings: Settings) -> Found`; these are its figures."""

KEYS = (
    "apply512_vs_dynamo",
    "apply1_vs_dynamo",
    "match512_vs_dynamo",
    "hash512_vs_dynamo",
    "zmq_vs_dynamo",
    "select_vs_dynamo",
    "bytes_per_block",
    "route_100k_tokens_p50_ms",
    "lag_p99_ms",
    "join_exact_s",
    "publish_cost_pct",
)
"""The figures of the last line, in order."""

Parts = dict[str, dict[str, Any]]
"""What is kept of each part that was measured, by its name."""


def kept(found: Found, settings: Settings, measured_at: str) -> dict[str, Any]:
    """A part as it stands in the results file."""
    return {"measured_at": measured_at, "settings": asdict(settings), **asdict(found)}


def last_line(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Every figure; null where its part was not measured."""
    figures = {key: value for part in parts.values() for key, value in part["figures"].items()}
    return {key: None if figures.get(key) is None else float(f"{figures[key]:.4g}") for key in KEYS}
