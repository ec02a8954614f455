"""Whether the next message of a stock engine is the one that follows. Pure: who asks sends and receives.

A publisher numbers its messages from 0 in each life. It can be asked to repeat them from a number on, as far back as it
remembers. The numbers heard live only ever grow within a life, so one that does not tells of a new life.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

Live = Literal["take", "old", "gap", "restart"]
Replayed = Literal["take", "old", "hole"]


class Sequence:
    """`next` is the number that is to come. A follower that has just begun waits for 0."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Another life: nothing of it has been seen."""
        self.next = 0
        self._newest_live: int | None = None

    def live(self, number: int) -> Live:
        """A message heard live. What is to be done about a gap or a restart comes before the message itself."""
        if self._newest_live is not None and number <= self._newest_live:
            return "restart"
        if number < self.next:
            self._newest_live = number
            return "old"
        if number > self.next:
            return "gap"
        self._newest_live = number
        self.next += 1
        return "take"

    def live_run(self, numbers: npt.NDArray[np.int64]) -> bool:
        """Takes one or more messages heard live, if they are exactly those that come next. False: look at each."""
        last = self.next + len(numbers) - 1
        if numbers[0] != self.next or numbers[-1] != last or (np.diff(numbers) != 1).any():
            return False
        self._newest_live, self.next = last, last + 1
        return True

    def replayed(self, number: int) -> Replayed:
        """A repeated message. A hole says that what lies before it is not remembered."""
        if number < self.next:
            return "old"
        if number > self.next:
            return "hole"
        self.next += 1
        return "take"

    def pass_over(self, number: int) -> None:
        """What lies before this message will not come."""
        self.next = number
