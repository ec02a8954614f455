"""Averages of what was lately told. Pure."""

from dataclasses import dataclass
from typing import Final

KEPT: Final = 1 - 1 / 64
"""Of what was told before, whenever something is: traffic changes."""


@dataclass(slots=True)
class Ratio:
    """`part` of `whole`, both summed up over what was told; they begin with what the prior is worth."""

    part: float
    whole: float

    def told(self, part: float, whole: float) -> None:
        self.part = KEPT * self.part + part
        self.whole = KEPT * self.whole + whole

    @property
    def value(self) -> float:
        return self.part / self.whole
