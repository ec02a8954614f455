"""What is asked of the fleet, as the router sees it: how much comes, of what kind, and how long it takes. Pure state.

Everything is of the last `window_ms`, by served model and role of engines. What of it engines have to compute is judged
by the cost model's rates, and these by how long engines say they were busy.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from vllm_llmd.router.candidates import Column
from vllm_llmd.router.learning.least_squares import LeastSquares
from vllm_llmd.router.members.rates import PRIOR, Rates
from vllm_llmd.wire import Load

PARTS: Final = 12
"""A window moves on by so many steps."""

SAMPLES: Final = 1024
"""Requests whose sizes are kept: the mean of so many, of sizes as spread as those of chats, is known within 6 %."""

SURE_MS: Final = 2000.0
"""What engines say of being busy counts as much as the cost model once that makes so much work: four reports."""

MOST_OFF: Final = 50.0
"""By no greater factor is computing thought to take longer than the cost model has it, or less."""


class Window:
    """A sum over the latest time."""

    def __init__(self, window_ms: float, began_ms: float) -> None:
        self._part_ms = window_ms / PARTS
        self._began_ms = began_ms
        self._parts: deque[tuple[int, float]] = deque()

    def add(self, value: float, now_ms: float) -> None:
        part = int(now_ms // self._part_ms)
        if self._parts and self._parts[-1][0] >= part:
            part, value = self._parts[-1][0], self._parts.pop()[1] + value
        self._parts.append((part, value))

    def total(self, now_ms: float) -> float:
        first = int(now_ms // self._part_ms) - PARTS + 1
        while self._parts and self._parts[0][0] < first:
            self._parts.popleft()
        return math.fsum(value for _, value in self._parts)

    def covered_ms(self, now_ms: float) -> float:
        """How long the total is of: a window when it has passed once, and a part of it at least."""
        full_ms = (PARTS - 1) * self._part_ms + now_ms % self._part_ms
        return max(min(full_ms, now_ms - self._began_ms), self._part_ms)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to be computed by an engine: `own` tokens after `context` that are there.

    Its first token is to come within `ttft_ms`, None if nobody minds; `transfer_tokens` travel before that.
    """

    own: float
    context: float
    ttft_ms: float | None
    transfer_tokens: float = 0.0


@dataclass
class Busy:
    """What one engine last said of itself: that it has prompts to compute, or has none, or cannot tell."""

    at_ms: float
    computes: bool | None
    step_ms: float


@dataclass(eq=False)
class Pool:
    """Engines of one role that serve one model.

    `rates`, room for `kv_tokens` and `sequences` are the means of those that were there last; 0 is not known.
    """

    window_ms: float
    began_ms: float
    prompts: deque[Prompt] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    told: deque["Told"] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    rates: Rates = PRIOR
    engines: dict[str, Busy] = field(default_factory=dict)
    kv_tokens: float = 0.0
    sequences: float = 0.0

    def __post_init__(self) -> None:
        self.prefills, self.prefill_tokens, self.answers, self.busy_ms, self.computed_ms = (
            Window(self.window_ms, self.began_ms) for _ in range(5)
        )
        self.steps = LeastSquares((PRIOR.step_ms, PRIOR.step_running_ms))

    def placed(self, prompt: Prompt, now_ms: float) -> None:
        """One of its engines is to compute a prompt."""
        self.prompts.append(prompt)
        self.prefills.add(1.0, now_ms)
        self.prefill_tokens.add(prompt.own, now_ms)

    def computed(self, engine: str, prompt: Prompt, now_ms: float) -> None:
        """It has. Counts where the engine tells whether it is busy."""
        last = self.engines.get(engine)
        if last is not None and last.computes is not None and now_ms - last.at_ms <= self.window_ms / PARTS:
            self.computed_ms.add(prefill_ms(prompt, self.rates), now_ms)

    def reported(self, engine: str, load: Load, now_ms: float) -> None:
        """Takes in what it says: until its next report it is taken to compute prompts, or not, as it does now."""
        last = self.engines.get(engine)
        step_ms = load.step_ms if math.isfinite(load.step_ms) else 0.0
        if last is not None and last.computes:
            self.busy_ms.add(min(now_ms - last.at_ms, self.window_ms / PARTS), now_ms)
        decodes = load.running > 0 and not load.prefill_tokens and not load.waiting_for_kv
        if decodes and (last is None or step_ms != last.step_ms):
            self.steps.learn((1.0, load.running - 1.0), step_ms)
        computes = None if load.waiting_for_kv else load.prefill_tokens > 0
        self.engines[engine] = Busy(now_ms, computes, step_ms)

    def correction(self, now_ms: float) -> float:
        """By how much computing takes longer than the rates have it, as the time shows that engines were busy."""
        busy_ms, computed_ms = self.busy_ms.total(now_ms), self.computed_ms.total(now_ms)
        return min(max((busy_ms + SURE_MS) / (computed_ms + SURE_MS), 1 / MOST_OFF), MOST_OFF)


@dataclass(frozen=True, slots=True)
class Computed:
    """A prompt, and the engine of a pool that computes it."""

    pool: Pool
    engine: str
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Told:
    """An answer of `output_tokens` to a prompt of `prompt_tokens`, of which engines have computed these parts."""

    prompt_tokens: float
    output_tokens: float
    tpot_ms: float | None
    computed: tuple[Computed, ...] = ()


def prefill_ms(prompt: Prompt, rates: Rates) -> float:
    """How long an engine computes it, by the rates."""
    return rates.base_ms + prompt.own * (rates.token_ms + rates.context_ms * (prompt.context + prompt.own / 2) / 1000)


def column(values: list[float]) -> Column:
    return np.array(values, np.float64)
