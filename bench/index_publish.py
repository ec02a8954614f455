"""What publishing costs an engine's steps: CPU time of the engine's thread beyond that of a silent engine, in a step's.

A real engine on the tiny model runs in an environment that has vLLM, and a real router takes its messages. Rounds with
publishing on and off take turns. Step times of either arm, and what other threads do, are told beside it.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from index_values import Found, Settings, shown

ROUNDS = 6
ENGINE_WITHIN_S = 500

Round = Mapping[str, Any]
"""A line of `index_publish_engine.py`."""


@contextmanager
def router() -> Iterator[str]:
    """A router in a process of its own: the endpoint for engines."""
    argv = [sys.executable, "-m", "vllm_llmd.router.main", "--port", "0", "--bind", "tcp://127.0.0.1:0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["router"]
        finally:
            process.terminate()


def rounds_of(python: str, model: str, endpoint: str) -> list[Round]:
    """Runs the engine. Raises CalledProcessError if it fails; its log is on stderr."""
    script = Path(__file__).with_name("index_publish_engine.py")
    argv = [python, str(script), "--model", model, "--router", endpoint, "--rounds", str(ROUNDS)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, timeout=ENGINE_WITHIN_S, env=os.environ)
    found: list[Round] = json.loads(done.stdout.splitlines()[-1])
    return found


def cost_pct(rounds: Sequence[Round], thread: str) -> float:
    """CPU time per step of the arm that publishes less that of the arm that does not, in per cent of a step's."""
    extra_us = of_arm(rounds, "on", thread) - of_arm(rounds, "off", thread)
    return 100 * extra_us / of_arm(rounds, "off", "cpu_us")


def of_arm(rounds: Sequence[Round], arm: str, value: str) -> float:
    return statistics.median(one[value] for one in rounds if one["arm"] == arm)


def report(rounds: Sequence[Round]) -> list[str]:
    lines = []
    for arm in ("on", "off"):
        own = [one for one in rounds if one["arm"] == arm]
        wall, cpu = shown([one["wall_us"] for one in own]), shown([one["cpu_us"] for one in own])
        here, there = shown([one["engine_thread_us"] for one in own]), shown([one["other_threads_us"] for one in own])
        lines.append(f"publishing {arm:3s} per step: {wall} us, CPU {cpu} us; where publishing happens {here} us")
        lines.append(f"{'':24s} of CPU in the engine's thread, {there} us in all others")
    others = cost_pct(rounds, "other_threads_us")
    lines.append(f"{'':24s} of a step's CPU time: {cost_pct(rounds, 'engine_thread_us'):.3g} % in the engine's thread")
    lines.append(f"{'':24s} and, beside it, {others:.3g} % in all others")
    return lines


def measure(settings: Settings) -> Found:
    with router() as endpoint:
        rounds = rounds_of(settings.engine_python, settings.model, endpoint)
    figures = {"publish_cost_pct": cost_pct(rounds, "engine_thread_us")}
    return Found(figures, lines=report(rounds), details={"rounds": rounds})
