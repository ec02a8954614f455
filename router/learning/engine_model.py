"""How fast every engine is, learned from its reports and answers; or from everybody's where little is known of one.

Pure. For each kind of time there are three models: the prior, one of all engines, and one of the engine itself.
Whichever has lately been the least wrong about the engine is believed: odd data makes none worse than the prior.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import OUTPUT_TOKENS, REUSE
from vllm_llmd.router.decide import Decision
from vllm_llmd.router.learning.averages import Ratio
from vllm_llmd.router.learning.least_squares import LeastSquares
from vllm_llmd.router.members.rates import PRIOR, Rates
from vllm_llmd.router.placement.plans import UNTIL_FIRST_BYTE
from vllm_llmd.router.upstream.seen import Measured, Seen
from vllm_llmd.wire import Load

What = Literal["first_byte", "step", "transfer"]
By = Literal["prior", "fleet", "engine"]

PRIORS: Final[dict[What, tuple[float, ...]]] = {
    "first_byte": (
        PRIOR.base_ms,
        PRIOR.token_ms,
        PRIOR.context_ms,
        PRIOR.running_ms,
        PRIOR.waiting_ms,
        PRIOR.reload_token_ms,
    ),
    "step": (PRIOR.step_ms, PRIOR.step_running_ms),
    "transfer": (PRIOR.transfer_ms, PRIOR.transfer_token_ms),
}

SHARE: Final = 0.25
"""Of what was expected until the first byte: what is less of it cannot be told from errors of the rest."""

ENOUGH: Final = 8
"""Measurements before a model may be believed: more than it has coefficients."""

ENOUGH_OF_ONE: Final = 4 * ENOUGH
"""Before what one engine has shown is believed rather than what all have: most engines of a fleet are alike."""

FIRST_DOUBT: Final = math.log(2)
"""Until predictions have been compared with what came, they may be off by twice."""

ERROR_WEIGHT: Final = 1 / 16
"""Of the newest measurement in a model's error: as many as are needed to tell whether an engine's index is right."""

WORST: Final = 5.0
"""An error of more, as a natural logarithm, counts as so much: one answer that hung does not decide for long."""

SLOW_WEIGHT: Final = 1 / 64
"""Of the newest answer in what is true of traffic as a whole, once enough have come."""

PRIOR_COUNT: Final = 4
PROMPT_TOKENS: Final = 1000
"""Answers that a prior is worth, and tokens of their prompts: any real ones are better than a guess."""

COLD_WEIGHT: Final = 1 / 4
"""Of the newest engine's first answer in what being cold costs: engines join too rarely for more to be gathered."""

NOT_OF_THE_SOURCE: Final = ("join_ms", "transfer_ms", "blocks_ms")
MOST_TOKENS: Final = 1e6
LEAST_MS: Final = 0.1

MOST_MS: Final = 1e7
"""What takes longer than three hours is not a measurement of speed."""


@dataclass
class Believed:
    """Three models of one kind of time of one engine. `errors` are absolute logarithms of expected over measured."""

    what: What
    fleet: LeastSquares
    engine: LeastSquares
    errors: dict[By, float] = field(default_factory=lambda: {"prior": 0.0, "fleet": 0.0, "engine": 0.0})
    measured: int = 0

    @property
    def by(self) -> By:
        """The model that is believed."""
        believed: By = "prior"
        if self.fleet.count >= ENOUGH and self.measured and self.errors["fleet"] < self.errors["prior"]:
            believed = "fleet"
        if self.fleet.count >= ENOUGH and not self.measured:
            believed = "fleet"
        if self.engine.count >= ENOUGH_OF_ONE and self.errors["engine"] < self.errors[believed]:
            believed = "engine"
        return believed

    @property
    def coefficients(self) -> Sequence[float]:
        match self.by:
            case "prior":
                return PRIORS[self.what]
            case "fleet":
                return self.fleet.coefficients
            case "engine":
                return self.engine.coefficients

    def expected(self, x: Sequence[float]) -> float:
        return sum(each * coefficient for each, coefficient in zip(x, self.coefficients, strict=True))

    def learn(self, x: Sequence[float], ms: float) -> bool:
        """Judges the three by a measurement before they learn from it. False if it is none."""
        if not (0 < ms < MOST_MS and all(math.isfinite(each) and each >= 0 for each in x)):
            return False
        prior_ms = sum(each * prior for each, prior in zip(x, PRIORS[self.what], strict=True))
        guesses: dict[By, float] = {
            "prior": prior_ms,
            "fleet": self.fleet.expected(x),
            "engine": self.engine.expected(x),
        }
        self.measured += 1
        weight = max(ERROR_WEIGHT, 1 / self.measured)
        for by, guess_ms in guesses.items():
            self.errors[by] += weight * (error_of(guess_ms, ms) - self.errors[by])
        self.fleet.learn(x, ms)
        self.engine.learn(x, ms)
        return True


@dataclass
class EngineModel:
    """One life of one engine. `answers` were measured."""

    first_byte: Believed
    step: Believed
    answers: int = 0
    reported_step_ms: float = 0.0


class Models:
    """Every engine's, and what they have in common: transfers, the length of answers, how much is found cached."""

    def __init__(self) -> None:
        self._fleet: dict[What, LeastSquares] = {what: LeastSquares(priors) for what, priors in PRIORS.items()}
        self._transfer = self._model("transfer")
        self._engines: dict[EngineId, EngineModel] = {}
        self._cold_ms = PRIOR.cold_ms
        self.output_tokens = OUTPUT_TOKENS
        self._error = self._step_error = FIRST_DOUBT
        self._answers = PRIOR_COUNT
        prior_tokens = float(PRIOR_COUNT * PROMPT_TOKENS)
        self._hits = Ratio(REUSE * prior_tokens, prior_tokens)

    def of(self, engine: EngineId) -> EngineModel:
        """The engine's; a new one if it has none."""
        known = self._engines.get(engine)
        if known is None:
            known = self._engines[engine] = EngineModel(self._model("first_byte"), self._model("step"))
        return known

    def _model(self, what: What) -> Believed:
        return Believed(what, self._fleet[what], LeastSquares(PRIORS[what]))

    def left(self, engine: EngineId) -> None:
        """Its life is over: the next one may be of another machine."""
        self._engines.pop(engine, None)

    def believed(self, engine: EngineId) -> list[Believed]:
        """What is believed of the engine, where anything of it was measured."""
        model = self.of(engine)
        return [each for each in (model.first_byte, model.step) if each.measured]

    def rates(self, engine: EngineId) -> Rates:
        """How fast the engine is thought to be."""
        model = self.of(engine)
        base_ms, token_ms, context_ms, running_ms, waiting_ms, reload_token_ms = model.first_byte.coefficients
        step_ms, step_running_ms = model.step.coefficients
        transfer_ms, transfer_token_ms = self._transfer.coefficients
        return Rates(
            base_ms=base_ms,
            token_ms=token_ms,
            context_ms=context_ms,
            running_ms=running_ms,
            waiting_ms=waiting_ms,
            step_ms=step_ms,
            step_running_ms=step_running_ms,
            transfer_ms=transfer_ms,
            transfer_token_ms=transfer_token_ms,
            reload_token_ms=reload_token_ms,
            cold_ms=0.0 if model.answers else self._cold_ms,
        )

    def reported(self, engine: EngineId, load: Load) -> None:
        """Takes in how long its steps have been lately, if they were of decoding alone and this is news."""
        model = self.of(engine)
        if load.running and not load.prefill_tokens and load.step_ms != model.reported_step_ms:
            model.reported_step_ms = load.step_ms
            model.step.learn((1.0, load.running - 1.0), load.step_ms)

    def answered(self, decision: Decision, measured: Measured, by_due_time: Collection[EngineId] = ()) -> None:
        """Takes in how long a request has taken. Some engines serve `by_due_time`, where that is told."""
        usage, seen, engine = measured.usage, decision.seen, decision.destination
        cached_tokens = None if usage is None or decision.source is not None else usage.cached_tokens
        if usage is not None:
            self._note_traffic(usage.prompt_tokens, cached_tokens, usage.completion_tokens)
        if seen is None or not measured.is_stream:
            return
        tells_speed = not _waits_for_its_turn(decision, by_due_time)
        if tells_speed and decision.source is not None:
            self._supplied(decision, decision.source, measured.first_byte_ms)
        elif tells_speed and _share(decision, "blocks_ms") < SHARE:
            self._first_byte(engine, first_byte_of(seen, cached_tokens), measured.first_byte_ms)
        if measured.tpot_ms is not None:
            self._steps(engine, (1.0, seen.batch), measured.tpot_ms)

    def _first_byte(self, engine: EngineId, x: Sequence[float], ms: float) -> None:
        """The first answer tells what being cold costs, if it can be told from what an answer takes otherwise."""
        model = self.of(engine)
        model.answers += 1
        if model.answers == 1 and self._fleet["first_byte"].count >= ENOUGH and 0 < ms < MOST_MS:
            over_ms = max(ms - model.first_byte.expected(x), 0.0)
            self._cold_ms += COLD_WEIGHT * (over_ms - self._cold_ms)
            return
        expected_ms = model.first_byte.expected(x)
        if model.first_byte.learn(x, ms):
            self._error += ERROR_WEIGHT * (error_of(expected_ms, ms) - self._error)

    def _steps(self, engine: EngineId, x: Sequence[float], ms: float) -> None:
        """Of an answer, each on average."""
        model = self.of(engine)
        expected_ms = model.step.expected(x)
        if model.step.learn(x, ms):
            self._step_error += ERROR_WEIGHT * (error_of(expected_ms, ms) - self._step_error)

    @property
    def hit_share(self) -> float:
        """The share of prompts' tokens that is found cached."""
        return self._hits.value

    @property
    def doubt(self) -> float:
        """By what factor times until the first byte are mispredicted lately, on average; at least 1."""
        return math.exp(self._error)

    @property
    def step_doubt(self) -> float:
        """Likewise, times per token of whole answers."""
        return math.exp(self._step_error)

    def _supplied(self, decision: Decision, source: EngineId, ms: float) -> None:
        """Such an answer tells of the transfer, or of how fast the source computes, if little else was waited for."""
        tokens = None if decision.choice is None else decision.choice.transfer_tokens
        if tokens is not None and _share(decision, "transfer_ms") >= SHARE:
            rest_ms = _expected_ms(decision) - decision.terms["transfer_ms"]
            self._transfer.learn((1.0, tokens), max(ms - rest_ms, LEAST_MS))
            return
        seen, prefilled = decision.source_seen, decision.source_until is None
        if seen is not None and prefilled and _share(decision, *NOT_OF_THE_SOURCE) < SHARE:
            rest_ms = sum(decision.terms.get(name, 0.0) for name in NOT_OF_THE_SOURCE)
            self._first_byte(source, first_byte_of(seen, None), max(ms - rest_ms, LEAST_MS))

    def _note_traffic(self, prompt_tokens: int, cached_tokens: int | None, output_tokens: int | None) -> None:
        if output_tokens:
            self._answers += 1
            weight = max(1 / self._answers, SLOW_WEIGHT)
            self.output_tokens += weight * (min(output_tokens, MOST_TOKENS) - self.output_tokens)
        if cached_tokens is not None and prompt_tokens > 0:
            asked_tokens = min(prompt_tokens, MOST_TOKENS)
            self._hits.told(min(cached_tokens, asked_tokens), asked_tokens)


def error_of(guess_ms: float, ms: float) -> float:
    """Absolute natural logarithm of guessed over measured, up to WORST."""
    return min(abs(math.log(max(guess_ms, 1e-6) / ms)), WORST)


def _waits_for_its_turn(decision: Decision, by_due_time: Collection[EngineId]) -> bool:
    """Whether it found more to prefill than its own: some goes before it and some does not, which tells of no speed."""
    seen = decision.seen if decision.source is None else decision.source_seen
    if seen is None or not decision.work_ms or (decision.source or decision.destination) not in by_due_time:
        return False
    return seen.tokens > max(seen.prompt_tokens - seen.cached_tokens, 1.0)


def _expected_ms(decision: Decision) -> float:
    return sum(decision.terms.get(name, 0.0) for name in UNTIL_FIRST_BYTE)


def _share(decision: Decision, *names: str) -> float:
    """What these terms are of all that was expected until the first byte."""
    return sum(decision.terms.get(name, 0.0) for name in names) / max(_expected_ms(decision), LEAST_MS)


def first_byte_of(seen: Seen, cached_tokens: int | None) -> tuple[float, ...]:
    """What decides when the first byte comes; with what was really cached, where that is known."""
    cached = seen.cached_tokens if cached_tokens is None else float(cached_tokens)
    own = max(seen.prompt_tokens - cached, 1.0)
    on_gpu = seen.cached_tokens - seen.offloaded_tokens
    reloaded = min(max(cached - on_gpu, 0.0), seen.offloaded_tokens)
    return 1.0, seen.tokens + own, own * (cached + own / 2) / 1000, seen.batch, seen.waiting, reloaded
