"""An OpenTelemetry span per order, joined to its request's trace. Without OpenTelemetry, nothing.

vLLM sets the tracer up when it is started with `--otlp-traces-endpoint`.
"""

import time
from collections.abc import Mapping
from typing import Any

from vllm_llmd.kv_connector.lifecycle import CANCELLED, Outcome
from vllm_llmd.names import OrderId

MAX_RANGE_EVENTS = 256
"""Ranges of one order that are told of one by one."""


class OrderSpans:
    """One open span per order that is placed."""

    def __init__(self) -> None:
        self._open: dict[OrderId, Any] = {}
        self._tracer: Any = None
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            return
        self._tracer = trace.get_tracer("vllm_llmd")
        self._propagator = TraceContextTextMapPropagator()
        self._in_context = trace.set_span_in_context

    def begin(self, order: OrderId, trace_headers: Mapping[str, str], facts: Mapping[str, str | int]) -> dict[str, str]:
        """Open the order's span below its request's; returns the headers that carry it on to the source."""
        if self._tracer is None:
            return dict(trace_headers)
        context = self._propagator.extract(trace_headers)
        attributes = {f"llmd.{name}": value for name, value in facts.items()}
        span = self._tracer.start_span("llmd.order", context=context, attributes={"llmd.order": order, **attributes})
        if not span.is_recording():
            return dict(trace_headers)
        self._open[order] = span
        headers: dict[str, str] = {}
        self._propagator.inject(headers, context=self._in_context(span))
        return headers

    def end(self, order: OrderId, outcomes: list[Outcome], reason: str | None) -> None:
        """The order has ended, at every rank."""
        span = self._open.pop(order, None)
        if span is None:
            return
        from opentelemetry.trace import Status, StatusCode

        arrivals = [arrival for outcome in outcomes for arrival in outcome.arrivals if arrival.order == order]
        for arrival in arrivals[:MAX_RANGE_EVENTS]:
            attributes = {"bytes": arrival.bytes, "announced_ns": self._wall_ns(arrival.announced_ms)}
            span.add_event("range read", attributes, timestamp=self._wall_ns(arrival.read_ms))
        for ended_ms in {outcome.prefill_ended_ms for outcome in outcomes if outcome.prefill_ended_ms is not None}:
            span.add_event("prefill ended", timestamp=self._wall_ns(ended_ms))
        span.set_attribute("llmd.bytes", sum(arrival.bytes for arrival in arrivals))
        span.set_attribute("llmd.blocks_missing", max((len(o.missing) for o in outcomes), default=0))
        if reason is not None:
            span.set_attribute("llmd.reason", reason)
        if reason is not None and reason != CANCELLED:
            span.set_status(Status(StatusCode.ERROR, reason))
        span.end()

    def _wall_ns(self, monotonic_ms: float) -> int:
        return int(monotonic_ms * 1e6) + self._offset_ns
