"""Recursive least squares with forgetting: coefficients that follow measurements, and never leave their bounds. Pure.

Coefficients are kept as multiples of their priors, and errors are relative to what was expected, so that one long
measurement does not outweigh many short ones and nothing has a unit to be tuned to.
"""

import math
from collections.abc import Sequence
from typing import Final

FORGETTING: Final = 0.99
"""The last 100 measurements count: traffic and with it an engine's speed change within minutes."""

SPREAD: Final = 40.0
"""Variance of a coefficient that nothing is known of, over that of a measurement: priors may well be off by twice, what
is measured once by a third.
"""

MOST_FORGOTTEN: Final = 4.0
"""Where nothing new is measured of a coefficient, forgetting makes its variance no greater than by this factor: in
multiples of the prior, or of what the coefficient is now if that is more.
"""

SURPRISE: Final = 2.0
"""What is off by more than twice of what was expected counts as off by so much, and makes nothing more certain."""

NEW_START: Final = 2.0
"""After a measurement by which so many times as much is expected, as little is known as before, relative to what is
expected now: an engine of another order than its priors is known as soon as one that is near them.
"""

FACTOR: Final = 1000.0
"""No coefficient is further from its prior than by this factor: processors without instructions for a model's type have
been seen at fifty times. What is odd is kept out by comparing with the priors.
"""


class LeastSquares:
    """`expected(x)` is the sum of `x[i] * coefficients[i]`. `count` measurements were learned from.

    `spreads` are how uncertain the priors are, each as a variance over that of a measurement; `SPREAD` if not told.
    """

    def __init__(self, priors: Sequence[float], spreads: Sequence[float] | None = None) -> None:
        self._priors = tuple(priors)
        self._factors = [1.0] * len(priors)
        spreads = [SPREAD] * len(priors) if spreads is None else spreads
        self._spread = [[each * (row == column) for column in range(len(priors))] for row, each in enumerate(spreads)]
        self._most_spread = [MOST_FORGOTTEN * each for each in spreads]
        self.count = 0
        self.coefficients = list(priors)

    def expected(self, x: Sequence[float]) -> float:
        return sum(each * factor * prior for each, factor, prior in zip(x, self._factors, self._priors, strict=True))

    def learn(self, x: Sequence[float], y: float) -> None:
        """Takes one measurement in. One that is no number, or not positive, is none."""
        scale = self.expected(x)
        if not (math.isfinite(y) and y > 0 and 0 < scale < math.inf):
            return
        scaled = [each * prior / scale for each, prior in zip(x, self._priors, strict=True)]
        gained = [sum(p * s for p, s in zip(row, scaled, strict=True)) for row in self._spread]
        certainty = FORGETTING + sum(s * g for s, g in zip(scaled, gained, strict=True))
        surprise = y / scale - 1
        counted = min(surprise, SURPRISE)
        self._factors = [
            max(1 / FACTOR, min(factor + gain / certainty * counted, FACTOR))
            for factor, gain in zip(self._factors, gained, strict=True)
        ]
        self.coefficients = [factor * prior for factor, prior in zip(self._factors, self._priors, strict=True)]
        grown = self.expected(x) / scale
        self._tighten(gained, certainty * max(surprise / SURPRISE, 1.0), grown if grown > NEW_START else 1.0)
        self.count += 1

    def _tighten(self, gained: Sequence[float], certainty: float, grown: float) -> None:
        """What is known after a measurement, and a little less of what was known before, in multiples of priors. After
        a new start, by which so much more is expected, as many more of these are uncertain.
        """
        size, times = range(len(gained)), grown**2 / FORGETTING
        spread = [[(self._spread[i][j] - gained[i] * gained[j] / certainty) * times for j in size] for i in size]
        most = [each * max(factor, 1.0) ** 2 for each, factor in zip(self._most_spread, self._factors, strict=True)]
        over = [min(1.0, math.sqrt(most[i] / spread[i][i])) if spread[i][i] > 0 else 0.0 for i in size]
        self._spread = [[spread[i][j] * over[i] * over[j] for j in size] for i in size]
