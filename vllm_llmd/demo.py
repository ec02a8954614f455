"""`make demo`: two real engines and a router answer a chat, its prompt prefilled on one and decoded on the other.

Each round asks the same question twice, both times with cold caches: once the decode engine alone, once the fleet.
The last line printed is one JSON object, and everything in it was measured in this run.
"""

import argparse
import http.client
import json
import statistics
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_llmd.clock import MonotonicClock
from vllm_llmd.errors import LaunchError, LlmdError
from vllm_llmd.fleet import Fleet
from vllm_llmd.launch import ToldToStop, signals_as_exceptions
from vllm_llmd.launch_progress import shown_on
from vllm_llmd.launch_spec import FleetSpec, engines_by_role

QUESTION = "What is the capital of France?"
ENGINE_FLAGS = ("--dtype", "float32", "--max-model-len", "4096", "--max-num-batched-tokens", "512")
"""float32: in bfloat16 a prompt computed in other chunks may be answered in other words. 512: several ranges."""

SOURCE, DESTINATION = "prefill-0", "decode-0"
ROUNDS = 5
LINES_OF_NOTES = 90
ANSWER_S = 120.0

COUNTERS = {
    "kv_bytes_read": "vllm:llmd_kv_bytes_read_total",
    "kv_ranges": "vllm:llmd_kv_ranges_read_total",
    "ranges_read_before_prefill_ended": "vllm:llmd_kv_ranges_read_before_prefill_ended_total",
}
"""Key in the last line -> counter of the destination engine."""


@dataclass(frozen=True)
class Answer:
    """What one request brought: its text, and the time to the first piece of it."""

    text: str
    ttft_ms: float


@dataclass(frozen=True)
class Round:
    """The same prompt answered by one engine and by the fleet."""

    alone: Answer
    together: Answer

    @property
    def identical(self) -> bool:
        return self.alone.text == self.together.text


def system_prompt(number: int) -> str:
    """About 2,000 tokens of plain notes. The number in the first line makes each one unknown to every cache."""
    ships = ("Heron", "Plover", "Curlew", "Avocet", "Dunlin", "Godwit", "Turnstone")
    cargoes = ("timber and rope", "wool and cloth", "salt and barley", "slate and lime", "oranges and cork")
    notes = [
        f"The {ships[day % 7]} came in with {cargoes[day % 5]}, and left again on the next tide for the north."
        for day in range(LINES_OF_NOTES)
    ]
    role = "You are a helpful assistant. You answer the user's question in one short sentence."
    return "\n".join((f"Conversation {number}. {role}", "", "Notes:", *notes))


def messages(number: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": system_prompt(number)}, {"role": "user", "content": QUESTION}]


def ask(server: str, model: str, number: int, **more: Any) -> Answer:
    """Asks a server by streaming. Raises LaunchError if it does not answer as it should."""
    body = {"model": model, "messages": messages(number), "temperature": 0, "max_tokens": 24, "stream": True, **more}
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(server).netloc, timeout=ANSWER_S)
    try:
        began = time.monotonic()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise LaunchError(f"{server} answered {response.status}: {response.read(500).decode(errors='replace')}")
        text, first_ms = "", 0.0
        for piece in _pieces(response):
            first_ms = first_ms or (time.monotonic() - began) * 1000
            text += piece
    except OSError as error:
        raise LaunchError(f"{server} did not answer: {error}") from error
    finally:
        connection.close()
    if not text:
        raise LaunchError(f"{server} answered nothing")
    return Answer(text, first_ms)


def _pieces(response: http.client.HTTPResponse) -> Iterator[str]:
    """The non-empty pieces of a streamed answer."""
    for line in response:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise LaunchError(f"the answer broke off: {event['error']}")
        for choice in event["choices"]:
            if choice["delta"].get("content"):
                yield choice["delta"]["content"]


def play(fleet: Fleet, number: int) -> Round:
    """One round; the two take turns in going first. A salt of its own keeps the single engine's cache cold."""
    model = fleet.models()[0]

    def alone() -> Answer:
        return ask(fleet.engine(DESTINATION).http, model, number, cache_salt=f"alone-{number}")

    if number % 2:
        first = alone()
        return Round(first, ask(fleet.router_http, model, number))
    together = ask(fleet.router_http, model, number)
    return Round(alone(), together)


def read_counters(fleet: Fleet) -> dict[str, int]:
    """The destination's counters, when they have come to rest."""
    counters = _counters_now(fleet)
    while True:
        time.sleep(1)
        former, counters = counters, _counters_now(fleet)
        if counters == former:
            return counters


def _counters_now(fleet: Fleet) -> dict[str, int]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{fleet.engine(DESTINATION).http}/metrics", timeout=ANSWER_S) as response:
        lines = response.read().decode().splitlines()
    return {
        key: sum(int(float(line.split()[-1])) for line in lines if line.startswith(f"{counter}{{"))
        for key, counter in COUNTERS.items()
    }


def report(rounds: list[Round], counters: dict[str, int]) -> dict[str, Any]:
    """The last line. It is ok if the fleet answers rightly and as one engine does, and the KV came as a stream."""
    identical = all(each.identical for each in rounds)
    answer = rounds[-1].together.text.strip()
    streamed = counters["kv_bytes_read"] > 0 and counters["ranges_read_before_prefill_ended"] > 0
    return {
        "ok": identical and streamed and "Paris" in answer,
        "identical": identical,
        "answer": answer,
        "ttft_ms": {
            "one_engine": round(statistics.median(each.alone.ttft_ms for each in rounds), 1),
            "disaggregated": round(statistics.median(each.together.ttft_ms for each in rounds), 1),
        },
        **counters,
    }


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Brings the fleet up, plays, and takes it down; returns the report. Raises LlmdError."""
    spec = FleetSpec(
        model=args.model, engines=engines_by_role(1, 1, 0), log_dir=args.log_dir, engine_flags=ENGINE_FLAGS
    )
    console.print(f"Starting a router and two vLLM engines on {args.model}; logs in {args.log_dir}", highlight=False)
    with ExitStack() as screen, Fleet(spec, screen.enter_context(shown_on(console, MonotonicClock()))) as fleet:
        screen.close()
        before = read_counters(fleet)
        with console.status("Warming up"):
            play(fleet, 0)
        console.print(
            f"Asking after 2,000 tokens of notes that are in no cache: {QUESTION}", highlight=False, soft_wrap=True
        )
        rounds = []
        for number in range(1, args.rounds + 1):
            with console.status(f"Round {number} of {args.rounds}"):
                rounds.append(play(fleet, number))
            console.print(_line(number, rounds[-1]), highlight=False, soft_wrap=True)
        after = read_counters(fleet)
    return report(rounds, {key: after[key] - before[key] for key in after})


def _line(number: int, played: Round) -> str:
    alike = "the same answer" if played.identical else "DIFFERENT ANSWERS"
    return (
        f"round {number}: first token after {played.alone.ttft_ms:.0f} ms from {DESTINATION} alone, "
        f"{played.together.ttft_ms:.0f} ms with {SOURCE} prefilling; {alike}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vllm_llmd.demo", description="Two engines, a router, one chat")
    parser.add_argument("--model", type=Path, required=True, help="directory that `vllm-llmd model` made")
    parser.add_argument("--log-dir", type=Path, required=True, help="one log file per process")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    try:
        with signals_as_exceptions():
            shown = run(parser.parse_args(), Console())
    except ToldToStop as told:
        return told.status
    except LlmdError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(json.dumps(shown, ensure_ascii=False, separators=(",", ":")) + "\n")
    return 0 if shown["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
