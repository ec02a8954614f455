"""What each task does: brings engines up, lets `pd_block` or `pd_idle` measure, takes them down."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pd_block
import pd_idle
import pd_report
from pd_block import Bench
from pd_engines import OURS, OURS_ALONE, Engine, Freezer, Site, running
from pd_environ import for_transport
from pd_plan import Task
from pd_requests import BenchError, Client, Prompts
from pd_values import RawRead, Results
from rich.console import Console

from vllm_llmd.launch_spec import EngineSpec

RAW_READ_S = 300.0
LAYOUTS = ("layers", "blocks")


@dataclass(frozen=True)
class Desk:
    """What every task works with."""

    results: Results
    log_dir: Path
    console: Console

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


@dataclass(frozen=True)
class Cast:
    """Which engines a task needs: of ours, and of the others, as `running` takes them."""

    ours: Sequence[EngineSpec]
    theirs: Sequence[str]


def perform(desk: Desk, task: Task) -> None:
    """Does one task and adds to the results. Raises LlmdError."""
    match task.part:
        case "ttft":
            _with_engines(desk, task, _measured(desk, task), pd_block.measure)
        case "idle":
            _with_engines(desk, task, _watched(task), pd_idle.watch)
        case "raw":
            _read(desk, task)


def _measured(desk: Desk, task: Task) -> Cast:
    if task.block != "ours":
        return Cast(OURS_ALONE, (task.block,))
    wanted = ("decode", *desk.results.settings.arms)
    return Cast([spec for spec in OURS if spec.id in wanted], ())


def _watched(task: Task) -> Cast:
    ours = [spec for spec in OURS if spec.id in ("chunk", "decode")]
    return Cast(ours, ("none",)) if task.block == "ours" else Cast((), (task.block, "none"))


def _with_engines(desk: Desk, task: Task, cast: Cast, work: Callable[[Bench], Awaitable[None]]) -> None:
    began = time.monotonic()
    log_dir = desk.log_dir / task.key.replace("/", "_").replace(" ", "-")
    with running(Site(Path(task.model), task.transport, log_dir), cast.ours, cast.theirs) as engines:
        desk.say(f"{', '.join(engines)} up after {time.monotonic() - began:.0f} s")
        asyncio.run(_work(desk, task, engines, work))


async def _work(
    desk: Desk, task: Task, engines: Mapping[str, Engine], work: Callable[[Bench], Awaitable[None]]
) -> None:
    vocabulary = json.loads((Path(task.model) / "config.json").read_text())["vocab_size"]
    async with Client() as client:
        await work(
            Bench(
                task=task,
                lanes=[pd_block.yardstick(task.block, engines), *pd_block.arms(task.block, engines)],
                freezer=Freezer(engines),
                client=client,
                prompts=Prompts(task.key, vocabulary),
                results=desk.results,
                say=desk.say,
            )
        )


def _read(desk: Desk, task: Task) -> None:
    """In processes of their own: UCX reads its environment once."""
    for layout in LAYOUTS:
        command = [sys.executable, "-P", "-m", "raw_read", "--layout", layout, "--rounds", str(task.rounds)]
        measured = _last_line(command, for_transport(os.environ, task.transport))
        for fragmented_ms, contiguous_ms in measured["ms"]:
            desk.results.raw_reads.append(
                RawRead(
                    transport=task.transport,
                    layout=layout,
                    turn=task.turn,
                    bytes=measured["bytes"],
                    fragmented_ms=fragmented_ms,
                    contiguous_ms=contiguous_ms,
                )
            )
        speed = pd_report.read_speeds(desk.results)[task.transport, layout]
        desk.say(f"{layout} outermost: scattered blocks at {speed:.3f} of the speed of one run")


def _last_line(command: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object that a command prints last. Raises BenchError."""
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=RAW_READ_S, check=True)
    except subprocess.SubprocessError as error:
        said = str(getattr(error, "stderr", "") or "").strip()[-1000:]
        raise BenchError(f"{' '.join(command[2:])}: {error}\n{said}") from error
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured
