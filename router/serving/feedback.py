"""What answers teach the router: how engines do, how fast they are, what their caches hold, where sessions are."""

from dataclasses import dataclass
from typing import Literal

from vllm_llmd.clock import Clock
from vllm_llmd.router.audit.decisions import Outcome
from vllm_llmd.router.decide import Decision
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.index.sessions import Last
from vllm_llmd.router.learning.truth import Prediction
from vllm_llmd.router.members.membership import Engine
from vllm_llmd.router.members.outliers import Shape
from vllm_llmd.router.observe import Metrics
from vllm_llmd.router.serving.call import Call
from vllm_llmd.router.upstream import usage
from vllm_llmd.router.upstream.attempt import Answer
from vllm_llmd.router.upstream.seen import Measured
from vllm_llmd.router.upstream.usage import Meter, Unasked


@dataclass
class Sent:
    """A request that was sent to an engine at `at_ms`, in which it took this shape.

    `prediction` is what is to be found in the engine's cache, where the answer will tell.
    """

    call: Call
    engine: Engine
    decision: Decision
    shape: Shape
    prediction: Prediction | None
    at_ms: float
    outcome: Outcome
    """Filled in as the answer comes."""


class Feedback:
    """Told of every request that is sent, of its answer's beginning and end."""

    def __init__(self, fleet: Fleet, metrics: Metrics, clock: Clock) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._clock = clock

    def sending(self, call: Call, engine: Engine, decision: Decision, outcome: Outcome) -> Sent:
        """The request is about to be sent, and counted."""
        self._metrics.predicted_cached_tokens.inc(decision.predicted_blocks * engine.info.block_size)
        if decision.source is not None:
            self._metrics.source_hints.labels(decision.source).inc()
        shape = Shape.of(decision.uncached_tokens, engine.requests_ahead, decision.source is not None)
        tells = usage.tells_of_its_prompt(call.body) and call.begun is None
        prediction = self._fleet.foretold(call.facts, decision) if tells else None
        return Sent(call, engine, decision, shape, prediction, self._clock.now_ms(), outcome)

    def answering(self, sent: Sent, answer: Answer) -> None:
        """The answer has begun."""
        now_ms = self._clock.now_ms()
        outcome, first_byte_ms = sent.outcome, now_ms - sent.at_ms
        outcome.status, outcome.is_stream, outcome.first_byte_ms = answer.status, answer.is_stream, first_byte_ms
        if sent.call.begun is None:
            outcome.ttft_ms = now_ms - sent.call.began_ms
        self._fleet.health.answered(sent.engine.info.id, now_ms)
        if answer.is_stream and answer.status == 200:
            self._fleet.health.took(sent.engine.info.id, sent.shape, first_byte_ms)
            if outcome.ttft_ms is not None:
                self._judge("ttft", sent.call.wish.ttft_ms, outcome.ttft_ms)

    def ended(self, sent: Sent, answer: Answer, meter: Meter, failed: bool) -> None:
        """The answer has ended; the engine that began it may have failed midway."""
        self._remember(sent, answer, meter)
        self._compare(sent, answer, meter)
        outcome, usage_told = sent.outcome, meter.usage
        outcome.last_byte_ms = self._clock.now_ms() - sent.at_ms
        if usage_told is not None:
            self._fleet.lengths.told(sent.call.facts, sent.call.chunks.text_bytes, usage_told.prompt_tokens)
            outcome.prompt_tokens, outcome.cached_tokens = usage_told.prompt_tokens, usage_told.cached_tokens
            outcome.completion_tokens = usage_told.completion_tokens
        if answer.status == 200 and not failed and outcome.first_byte_ms is not None:
            took_ms = outcome.first_byte_ms, outcome.last_byte_ms
            measured = Measured(*took_ms, answer.is_stream, usage_told)
            self._fleet.answered(sent.call.id, sent.decision, measured)
            if answer.is_stream and measured.tpot_ms is not None:
                self._judge("tpot", sent.call.wish.tpot_ms, measured.tpot_ms)

    def _judge(self, what: Literal["ttft", "tpot"], objective_ms: float | None, took_ms: float) -> None:
        if objective_ms is not None:
            self._metrics.objectives.labels(what, "yes" if took_ms <= objective_ms else "no").inc()

    def _remember(self, sent: Sent, answer: Answer, meter: Meter) -> None:
        """Where the session's KV is now."""
        call, info = sent.call, sent.engine.info
        if call.session is not None and answer.status == 200:
            tokens = call.facts.prompt_tokens if meter.usage is None else meter.usage.prompt_tokens
            self._fleet.sessions.went(call.session, Last(info.id, info.epoch, tokens))

    def _compare(self, sent: Sent, answer: Answer, meter: Meter) -> None:
        """What the answer says of the engine's cache against what was predicted."""
        if isinstance(meter, Unasked):
            sent.engine.stamp = meter.stamp
        if sent.prediction is None or meter.usage is None:
            return
        error = self._fleet.observed(sent.prediction, f"{sent.call.http.path} {answer.is_stream}", meter.usage)
        if error is not None:
            self._metrics.prediction_error_tokens.labels(error.engine, error.by).observe(error.tokens)
