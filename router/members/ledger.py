"""Numbers of all engines of a fleet, in one piece of memory, so that those of many are read at once. Pure."""

from typing import Final

import numpy as np
import numpy.typing as npt

FIRST: Final = 64
"""Rows at first; there are twice as many whenever all are taken."""


class Ledger:
    """Rows of so many loads and so many rates."""

    def __init__(self, loads: int, rates: int) -> None:
        self._loads = np.zeros((0, loads))
        self._rates = np.zeros((0, rates))
        self._vacant: list[int] = []

    def entry(self) -> "Entry":
        """A row of its own for an engine, until it is closed."""
        if not self._vacant:
            known = len(self._loads)
            more = max(known, FIRST)
            self._loads = np.concatenate([self._loads, np.zeros((more, self._loads.shape[1]))])
            self._rates = np.concatenate([self._rates, np.zeros((more, self._rates.shape[1]))])
            self._vacant = list(range(known, known + more))
        return Entry(self, self._vacant.pop())

    def close(self, number: int) -> None:
        self._vacant.append(number)

    def write_load(self, number: int, load: bytes) -> None:
        """As float64, in the order of the columns."""
        self._loads[number] = np.frombuffer(load)

    def write_rates(self, number: int, rates: bytes) -> None:
        """As float64, in the order of the columns."""
        self._rates[number] = np.frombuffer(rates)

    def read(self, numbers: npt.NDArray[np.intp]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Loads and rates of these rows as they are now, shapes (rows, loads) and (rows, rates)."""
        return self._loads.take(numbers, 0), self._rates.take(numbers, 0)


class Entry:
    """The row `number` of a ledger. What is written after it is closed goes nowhere: the row may be another's."""

    def __init__(self, ledger: Ledger, number: int) -> None:
        self.ledger: Ledger | None = ledger
        self.number = number

    def write_load(self, load: bytes) -> None:
        if self.ledger is not None:
            self.ledger.write_load(self.number, load)

    def write_rates(self, rates: bytes) -> None:
        if self.ledger is not None:
            self.ledger.write_rates(self.number, rates)

    def close(self) -> None:
        if self.ledger is not None:
            self.ledger.close(self.number)
            self.ledger = None
