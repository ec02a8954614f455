"""What a simulated engine can be told to do wrong. Values."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from vllm_llmd.errors import ConfigError

AnswerFailure = Literal[
    "none", "error", "refuse", "reset", "reset-after-headers", "stall", "stall-midway", "die-midway"
]
"""`error` is status 500, `refuse` 503. `reset` closes the connection before the first byte, `stall` never answers;
`midway` is after the first chunk."""


class WireFaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shares, 0 to 1, of the messages between engine and router, in either direction, that meet with a fault.

    `delay` holds a message back until some more have passed, `reorder` until the next one has.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    reorder: float = 0.0


class Failures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`slow` multiplies the time of every step. `hang_metrics` lets `/metrics` never answer.

    `lies` is the share of evictions that the engine keeps to itself: it then has less than it says.
    """

    answers: AnswerFailure = "none"
    slow: float = 1.0
    hang_metrics: bool = False
    lies: float = 0.0
    wire: WireFaults = WireFaults()


def read_failures(raw: Mapping[str, Any], now: Failures) -> Failures:
    """`now` with what `raw` says in its place. Raises ConfigError that names what is wrong."""
    try:
        failures = msgspec.convert({**msgspec.to_builtins(now), **raw}, Failures)
    except (msgspec.ValidationError, TypeError) as error:
        raise ConfigError(f"failures: {error}") from None
    shares = {"lies": failures.lies} | msgspec.to_builtins(failures.wire)
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"failures: {name} must be between 0 and 1; got {share}")
    if not failures.slow > 0:
        raise ConfigError(f"failures: slow must be more than 0; got {failures.slow}")
    return failures
