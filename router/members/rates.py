"""How fast an engine is: the coefficients of cost terms, and what they are before anything is known.

Values only. The priors are guesses of the right order, for a model of some billion parameters on a GPU; what matters
until they are replaced is that they are the same for every engine.
"""

import struct
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Final


@dataclass(frozen=True, slots=True)
class Rates:
    """All in milliseconds.

    The first byte of an answer comes after `base_ms`, `token_ms` for each prompt token to compute, its own and those
    ahead of it, and `context_ms` for each of its own and 1,000 tokens before that, `running_ms` for each request that
    runs and `waiting_ms` for each that waits. Then a step takes `step_ms` and `step_running_ms` for each request in it.
    KV travels in `transfer_ms`, and `transfer_token_ms` for each token; `reload_token_ms` for each that is offloaded.
    The first answer of an engine's life takes `cold_ms` longer.
    """

    base_ms: float = 10.0
    """One step."""

    token_ms: float = 0.1
    """A GPU of today computes 25 prompt tokens a millisecond of a model of 8 billion parameters, a CPU about one of a
    model of 100 million: this lies between.
    """

    context_ms: float = 0.003
    """Attention to 1,000 tokens costs 3 % of what the rest of a token does, by the sizes of such a model."""

    running_ms: float = 0.1
    """As `step_running_ms`: the step to wait for is so much longer."""

    waiting_ms: float = 10.0
    """Whoever waits is let in no sooner than with the next step."""

    step_ms: float = 10.0
    """A hundred tokens a second, as people are used to."""

    step_running_ms: float = 0.1
    """Reading the KV of 2,000 tokens at 2.6 TB/s, 131 kB each."""

    transfer_ms: float = 2.0
    """An order over HTTP and an announcement over ZeroMQ, in one network."""

    transfer_token_ms: float = 0.01
    """131 kB over 100 Gbit/s."""

    reload_token_ms: float = 0.0066
    """131 kB over 20 GB/s of PCIe."""

    cold_ms: float = 0.0
    """Nothing until a first answer has been slow."""


PRIOR: Final = Rates()
RATE_COLUMNS: Final = len(fields(Rates))
_values: Final = attrgetter(*(each.name for each in fields(Rates)))
_ROW: Final = struct.Struct(f"{RATE_COLUMNS}d")


def packed(rates: Rates) -> bytes:
    """A row of the columns that `candidates.RateColumns` are made of."""
    return _ROW.pack(*_values(rates))


PRIOR_ROW: Final = packed(PRIOR)
