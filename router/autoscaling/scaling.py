"""How many engines of a kind it takes to keep the objectives: from what is asked of them and how fast one is. Pure.

Prompts queue for engines as in M/G/m, with the service times that were seen. Answers share an engine's steps, stand
still while a prompt is computed, and hold blocks meanwhile. docs/decisions/0023-autoscaling.md derives the formulas.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np

from vllm_llmd.router.candidates import Column

Bound = Literal["ttft", "tpot", "memory", "queue", "min", "max", "unknown"]

NOTHING: Final[Column] = np.empty(0)

PLACED_AMONG: Final = 2
"""A prompt waits as if the better of two engines took it: what a router does that goes by more than queues."""

SPARED: Final = 0.5
"""Of the misses that are allowed: so much is left to queueing, however many objectives cannot be kept by any fleet."""

LEAST_MS: Final = 1e-6
"""Nobody waits for less."""

TINY: Final = 1e-30
HUGE: Final = 1e30
"""Beyond these nothing makes a difference."""

MOST: Final = 1 << 20
"""No fleet has more engines."""


@dataclass(frozen=True, eq=False)
class Demand:
    """What is asked of one kind of engines.

    Prompts come at `prefills_per_ms`; computing one takes `prefill_ms`, a sample with shape (n,), and it may wait and
    be computed for `until_ms`, infinite where nobody minds. It waits as in one queue for `placed_among` engines, where
    there are so many. `backlog_ms` are to be computed already.
    Answers come at `answers_per_ms`: of `output_tokens`, each to take `tpot_ms` at most, with `kv_tokens` in the cache
    on average, and for `held_ms` before the first of them; samples with shape (k,).
    """

    prefills_per_ms: float = 0.0
    prefill_ms: Column = field(default_factory=lambda: NOTHING)
    until_ms: Column = field(default_factory=lambda: NOTHING)
    placed_among: int = PLACED_AMONG
    backlog_ms: float = 0.0
    answers_per_ms: float = 0.0
    output_tokens: Column = field(default_factory=lambda: NOTHING)
    tpot_ms: Column = field(default_factory=lambda: NOTHING)
    kv_tokens: Column = field(default_factory=lambda: NOTHING)
    held_ms: Column = field(default_factory=lambda: NOTHING)

    @property
    def prefill_load(self) -> float:
        """Engines that do nothing but compute prompts."""
        return self.prefills_per_ms * _mean(self.prefill_ms)

    @property
    def tokens_per_ms(self) -> float:
        return self.answers_per_ms * _mean(self.output_tokens)


@dataclass(frozen=True)
class Ability:
    """One engine: a step takes `step_ms`, and `step_running_ms` more for each further sequence in it.

    Its cache has room for `kv_tokens`, and it runs `sequences` at a time.
    """

    step_ms: float
    step_running_ms: float
    kv_tokens: float
    sequences: float


@dataclass(frozen=True)
class Goal:
    """At most `missing` of the requests miss their objectives. A backlog is to be worked off in `horizon_ms`.

    No fewer than `least` engines are wanted, and no more than `most`.
    """

    missing: float
    horizon_ms: float
    least: int
    most: int


@dataclass(frozen=True)
class Misses:
    """Shares of the requests that miss the objectives, or find no room."""

    ttft: float = 0.0
    tpot: float = 0.0
    memory: float = 0.0

    @property
    def all(self) -> float:
        return self.ttft + self.tpot + self.memory


@dataclass(frozen=True)
class Desired:
    """So many engines are wanted. `bound` says why no fewer, or no more; `misses` are expected of them."""

    replicas: int
    bound: Bound
    misses: Misses = Misses()
    wait_ms: float = 0.0
    """Mean time for which prompts wait."""
    sequences: float = 0.0
    """Answers that are being made at a time."""


def desired(demand: Demand, ability: Ability, goal: Goal) -> Desired:
    """The fewest engines that keep the objectives, within the goal's bounds. What is asked and known must be finite."""
    best = misses(1, replace(demand, prefills_per_ms=0.0, answers_per_ms=0.0), ability)
    allowed = max(goal.missing, best.all + SPARED * goal.missing)

    def enough(engines: int) -> bool:
        return engines > demand.prefill_load and misses(engines, demand, ability).all <= allowed

    wanted = _fewest(enough)
    bound = _bound(misses(wanted - 1, demand, ability), best) if wanted > 1 else "min"
    catching_up = demand.prefill_load + demand.backlog_ms / goal.horizon_ms
    if math.ceil(catching_up) > wanted:
        wanted, bound = math.ceil(catching_up), "queue"
    asked = demand.prefills_per_ms > 0 or demand.answers_per_ms > 0 or demand.backlog_ms > 0
    least = max(goal.least, int(asked))
    if wanted <= least or not asked:
        wanted, bound = least, "min"
    if wanted > goal.most:
        wanted, bound = goal.most, "max"
    wait = waiting(wanted, demand)
    mean_ms = goal.horizon_ms if wait is None else wait.share * wait.mean_ms
    steps = _steps(wanted, demand, ability)
    sequences = ability.sequences if steps is None and demand.answers_per_ms else steps.batch if steps else 0.0
    return Desired(
        wanted,
        bound,
        misses(wanted, demand, ability),
        min(mean_ms, goal.horizon_ms),
        wanted * min(sequences, ability.sequences),
    )


def misses(engines: int, demand: Demand, ability: Ability) -> Misses:
    """What so many engines miss. Never more than what fewer do."""
    steps = _steps(engines, demand, ability)
    if steps is None:
        return Misses(_late(engines, demand), float(len(demand.tpot_ms) > 0), 0.0)
    return Misses(_late(engines, demand), _slow(engines, demand, steps), _without_room(engines, demand, ability, steps))


# --- prompts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wait:
    """`share` of the prompts wait, exponentially distributed with this mean."""

    share: float
    mean_ms: float


def waiting(engines: int, demand: Demand) -> Wait | None:
    """None where the queue grows for ever. Sakasegawa's share of M/M/m, Allen and Cunneen's factor for M/G/m."""
    if not engines:
        return None
    busy = demand.prefill_load / engines
    if busy >= 1:
        return None
    if not busy:
        return Wait(0.0, 1.0)
    among, mean_ms = min(demand.placed_among, engines), _mean(demand.prefill_ms)
    square_ms2 = _mean(demand.prefill_ms**2)
    return Wait(
        busy ** (math.sqrt(2 * (among + 1)) - 1), max(square_ms2 / (2 * mean_ms * among * (1 - busy)), LEAST_MS)
    )


def _late(engines: int, demand: Demand) -> float:
    if not len(demand.prefill_ms):
        return 0.0
    wait = waiting(engines, demand)
    left_ms = demand.until_ms - demand.prefill_ms
    if wait is None:
        return float(np.mean(np.isfinite(left_ms)))
    late = wait.share * np.exp(-np.maximum(left_ms, 0.0) / wait.mean_ms)
    return float(np.mean(np.where(left_ms < 0, 1.0, late)))


# --- answers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Steps:
    """An engine that decodes: `batch` sequences on average; its steps take `step_ms`, `busy` of its time prompts."""

    batch: float
    step_ms: float
    busy: float

    def answer_ms(self, output_tokens: Column) -> Column:
        found: Column = output_tokens * (self.step_ms / (1 - self.busy))
        return found


def _steps(engines: int, demand: Demand, ability: Ability) -> _Steps | None:
    """None where more tokens are asked for than can be made: as many sequences as it takes for these, at their pace."""
    busy = demand.prefill_load / engines if engines else 1.0
    if busy >= 1:
        return None
    pace = demand.tokens_per_ms / engines / (1 - busy)
    slack = 1 - pace * ability.step_running_ms
    if slack <= 0:
        return None
    batch = pace * ability.step_ms / slack
    return _Steps(batch, ability.step_ms + ability.step_running_ms * batch, busy)


def _slow(engines: int, demand: Demand, steps: _Steps) -> float:
    """Answers are late by what prompts took from them meanwhile, and by larger batches: gamma, by mean and variance."""
    if not len(demand.tpot_ms):
        return 0.0
    tokens, minds = demand.output_tokens, np.isfinite(demand.tpot_ms)
    slack_ms = np.where(minds, tokens * (np.where(minds, demand.tpot_ms, 0.0) - steps.step_ms), np.inf)
    lasts_ms = steps.answer_ms(tokens)
    mean_ms = steps.busy * lasts_ms
    stalls = demand.prefills_per_ms / engines * lasts_ms
    variance = stalls * (_mean(demand.prefill_ms**2) if len(demand.prefill_ms) else 0.0)
    return float(np.mean(_gamma_beyond(slack_ms, mean_ms, variance)))


def _without_room(engines: int, demand: Demand, ability: Ability, steps: _Steps) -> float:
    """How often what arrives finds the cache full, or all sequences taken: normal, by mean and variance."""
    if not len(demand.kv_tokens):
        return 0.0
    per_engine = demand.answers_per_ms / engines
    lasts_ms = steps.answer_ms(demand.output_tokens)
    kept_ms, kv = demand.held_ms + lasts_ms, demand.kv_tokens
    full = _normal_beyond(ability.kv_tokens, per_engine * _mean(kv * kept_ms), per_engine * _mean(kv**2 * kept_ms))
    taken = _normal_beyond(ability.sequences, steps.batch, steps.batch)
    return max(full, taken)


def _normal_beyond(limit: float, mean: float, variance: float) -> float:
    if variance <= 0:
        return float(mean > limit)
    return 0.5 * math.erfc((limit - mean) / math.sqrt(2 * variance))


def _gamma_beyond(limit: Column, mean: Column, variance: Column) -> Column:
    """Wilson and Hilferty's approximation; shape (k,). Where there is no variance, nothing is beyond a limit of 0."""
    certain = (variance <= TINY) | (limit <= 0)
    mean, variance = np.maximum(mean, TINY), np.where(certain, 1.0, variance)
    shape = np.maximum(mean * (mean / variance), TINY)
    normal = (np.cbrt(np.minimum(limit, HUGE) / mean) - 1 + 1 / (9 * shape)) * 3 * np.sqrt(shape)
    beyond = 0.5 * np.array(list(map(math.erfc, (normal / math.sqrt(2)).tolist())))
    return np.where(certain, np.where(limit < mean, 1.0, 0.0), beyond)


# --- the fewest -------------------------------------------------------------------------------------------------


def _fewest(enough: Callable[[int], bool]) -> int:
    """The least number for which it holds, given that it holds for all above it."""
    high = 1
    while high < MOST and not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _bound(fewer: Misses, best: Misses) -> Bound:
    """What one engine fewer would miss most of, beyond what no fleet can keep."""
    over: dict[Bound, float] = {
        "ttft": fewer.ttft - best.ttft,
        "tpot": fewer.tpot - best.tpot,
        "memory": fewer.memory - best.memory,
    }
    return max(over, key=lambda name: over[name])


def _mean(sample: Column) -> float:
    return float(np.mean(sample)) if len(sample) else 0.0
