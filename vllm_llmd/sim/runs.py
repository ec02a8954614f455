"""When the steps of a run end: each a little longer than the one before it. Pure."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Run:
    """`steps` steps from `began_ms` on. The first takes `first_ms`, each later one `growth_ms` more."""

    began_ms: float
    first_ms: float
    growth_ms: float
    steps: int

    @property
    def end_ms(self) -> float:
        return self.end_of(self.steps)

    def end_of(self, step: int) -> float:
        """When step number `step` ends, counted from 1."""
        return self.began_ms + step * self.first_ms + self.growth_ms * (step * (step - 1) / 2)

    def cut(self, now_ms: float) -> "Run":
        """Without the steps that have not begun yet."""
        if self.steps == 1 or now_ms >= self.end_ms:
            return self
        gone_ms = max(now_ms - self.began_ms, 0.0)
        linear = self.first_ms - self.growth_ms / 2
        if self.growth_ms:
            guess = (math.sqrt(linear * linear + 2 * self.growth_ms * gone_ms) - linear) / self.growth_ms
        else:
            guess = gone_ms / self.first_ms
        step = max(math.floor(guess), 1)
        while self.end_of(step) < now_ms:
            step += 1
        return replace(self, steps=min(step, self.steps))
