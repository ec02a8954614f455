"""Draws one request's timeline: what the source computes and what the destination reads, as bars in an SVG file.

Starts two engines on one model and a router, asks for one long prompt through an order, and takes the times from the
order's OpenTelemetry span. `python bench/timeline.py --model DIR --tokens N --out FILE`.
"""

import argparse
import json
import random
import secrets
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from vllm_llmd.fleet import Fleet
from vllm_llmd.launch_spec import EngineSpec, FleetSpec
from vllm_llmd.testing.collector import Collector

CHUNK = 512
FLAGS = ("--served-model-name", "m", "--dtype", "float32", "--max-model-len", "8000")
WAIT_S = 60.0


@dataclass(frozen=True)
class Bar:
    """Something that lasted from `begin_ms` to `end_ms` after the request was sent."""

    begin_ms: float
    end_ms: float
    label: str = ""


@dataclass(frozen=True)
class Timeline:
    """One request: rows of bars by name, and moments by name."""

    rows: dict[str, list[Bar]]
    moments: dict[str, float]


def timeline_of(span: Any, sent_ns: int, first_token_ns: int) -> Timeline:
    """From the span of an order: ranges are announced when their step ends, and read from then on."""

    def ms(at_ns: int) -> float:
        return (at_ns - sent_ns) / 1e6

    reads = [event for event in span.events if event.name == "range read"]
    facts = [{attribute.key: attribute.value.int_value for attribute in read.attributes} for read in reads]
    announced = [ms(fact["announced_ns"]) for fact in facts]
    begins = [ms(span.start_time_unix_nano), *announced[:-1]]
    return Timeline(
        rows={
            "source computes": [Bar(b, e, str(n)) for n, (b, e) in enumerate(zip(begins, announced, strict=True), 1)],
            "destination reads": [
                Bar(at, ms(read.time_unix_nano), str(n))
                for n, (at, read) in enumerate(zip(announced, reads, strict=True), 1)
            ],
            "destination decodes": [Bar(ms(reads[-1].time_unix_nano), ms(first_token_ns))],
        },
        moments={"first token": ms(first_token_ns)},
    )


def summary(timeline: Timeline) -> str:
    """What bars of a pixel's width do not show."""
    computing, reading = timeline.rows["source computes"], timeline.rows["destination reads"]
    took, ended = median(bar.end_ms - bar.begin_ms for bar in reading), computing[-1].end_ms
    first = timeline.moments["first token"]
    return f"each read takes {took:.0f} ms; the first token comes {first - ended:.0f} ms after the last step ends"


COLOURS = ("#4c78a8", "#f58518", "#54a24b")
LEFT, WIDTH, ROW, TOP = 150, 760, 44, 40
FONT = 'font-family="sans-serif" font-size="12"'


def svg(timeline: Timeline, title: str) -> str:
    """The timeline as an SVG document."""
    end = max(bar.end_ms for bars in timeline.rows.values() for bar in bars) * 1.02
    height = TOP + ROW * len(timeline.rows) + 40

    def x(at_ms: float) -> float:
        return LEFT + WIDTH * at_ms / end

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{height}" {FONT}>',
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="20" font-size="13">{title}</text>',
    ]
    for number, (name, bars) in enumerate(timeline.rows.items()):
        y = TOP + ROW * number
        parts.append(f'<text x="{LEFT - 10}" y="{y + 20}" text-anchor="end">{name}</text>')
        for bar in bars:
            width = max(x(bar.end_ms) - x(bar.begin_ms), 1.0)
            parts.append(
                f'<rect x="{x(bar.begin_ms):.1f}" y="{y}" width="{width:.1f}" height="28" '
                f'fill="{COLOURS[number]}" stroke="white" stroke-width="0.5"/>'
            )
    axis = TOP + ROW * len(timeline.rows)
    step = 10 ** (len(str(int(end))) - 1)
    for at in range(0, int(end), step):
        parts.append(f'<text x="{x(at):.1f}" y="{axis + 24}" text-anchor="middle">{at} ms</text>')
        parts.append(f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{TOP - 4}" y2="{axis + 8}" stroke="#ddd"/>')
    for name, at_ms in timeline.moments.items():
        parts.append(f'<line x1="{x(at_ms):.1f}" x2="{x(at_ms):.1f}" y1="{TOP - 8}" y2="{axis}" stroke="#c00"/>')
        parts.append(f'<text x="{x(at_ms) - 4:.1f}" y="{TOP - 10}" text-anchor="end" fill="#c00">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def ask(http: str, prompt: Sequence[int], source: str | None, trace: str) -> tuple[int, int]:
    """Sends a streaming completion; returns when it was sent and when its first token came, in ns since the epoch."""
    body: dict[str, Any] = {"model": "m", "prompt": list(prompt), "max_tokens": 1, "temperature": 0, "stream": True}
    if source is not None:
        body["kv_transfer_params"] = {"llmd": {"source": source, "request": f"timeline-{trace}"}}
    headers = {"Content-Type": "application/json", "traceparent": f"00-{trace}-{secrets.token_hex(8)}-01"}
    request = urllib.request.Request(f"{http}/v1/completions", json.dumps(body).encode(), headers)
    sent = time.time_ns()
    with urllib.request.urlopen(request, timeout=600) as response:
        while not response.readline().startswith(b"data: {"):
            pass
        first = time.time_ns()
        response.read()
    return sent, first


def engine(engine_id: str, role: Any) -> EngineSpec:
    return EngineSpec(id=engine_id, role=role, flags=("--max-num-batched-tokens", str(CHUNK)))


def measure(model: Path, tokens: int) -> Timeline:
    """One request on two fresh engines, after one to warm them."""
    some = random.Random(1)
    with tempfile.TemporaryDirectory() as logs, Collector() as collector:
        spec = FleetSpec(
            model=model,
            engines=(engine("source", "prefill"), engine("destination", "decode")),
            log_dir=Path(logs),
            engine_flags=(*FLAGS, "--otlp-traces-endpoint", collector.endpoint),
            engine_env={"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"},
        )
        with Fleet(spec) as fleet:
            http = fleet.engine("destination").http
            for length in (CHUNK, tokens):
                trace = secrets.token_hex(16)
                prompt = [some.randrange(300, 500) for _ in range(length)]
                sent, first = ask(http, prompt, "source", trace)
            deadline = time.monotonic() + WAIT_S
            while time.monotonic() < deadline:
                for span in collector.of_trace(trace):
                    if span.name == "llmd.order":
                        return timeline_of(span, sent, first)
                time.sleep(0.1)
    raise SystemExit("the order's span has not come")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the timeline of one request")
    parser.add_argument("--model", type=Path, default=Path(".models/smollm2"), help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs/timeline.svg"), help="default: %(default)s")
    args = parser.parse_args()
    title = f"{args.tokens} tokens in chunks of {CHUNK}, {args.model.name}, two engines on one machine"
    timeline = measure(args.model, args.tokens)
    args.out.write_text(svg(timeline, f"{title}: {summary(timeline)}"))
    sys.stderr.write(f"{args.out}: {summary(timeline)}\n")


if __name__ == "__main__":
    main()
