"""What an engine costs when nobody asks it anything: cores used by its whole process group."""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pd_block import Bench
from pd_engines import Engine
from pd_values import Idle

QUIET_BEFORE_S = 10.0
MEASURED_S = 10.0
PROMPT = 512

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


async def watch(bench: Bench) -> None:
    """Each engine answers a request, rests, and is watched, while all others are frozen. Adds to the results.

    A lane's last engine is the one that is watched.
    """
    task = bench.task
    for number in range(task.rounds):
        for lane in bench.lanes:
            await bench.freezer.only(*lane.names)
            await bench.client.ttft_ms(lane.route, bench.prompts.next(PROMPT))
            engine = lane.engines[-1]
            await bench.freezer.only(engine.name)
            await asyncio.sleep(QUIET_BEFORE_S)
            cores = await _cores(engine)
            connector = "none" if lane.arm == "none" else task.block
            bench.results.idle.append(
                Idle(model=task.model, block=task.block, turn=task.turn, round=number, connector=connector, cores=cores)
            )
            bench.say(f"idle with connector {connector}: {cores:.3f} cores")


async def _cores(engine: Engine) -> float:
    began, used = time.monotonic(), cpu_seconds(engine.process.pgid)
    await asyncio.sleep(MEASURED_S)
    return (cpu_seconds(engine.process.pgid) - used) / (time.monotonic() - began)


def cpu_seconds(group: int) -> float:
    """CPU time that the processes of a group have used so far, those included that they have waited for."""
    return sum(seconds for pgid, seconds in _processes() if pgid == group)


def _processes() -> Iterator[tuple[int, float]]:
    """Process group and CPU seconds of every process. See proc(5) for the fields: the name may hold spaces."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = stat.read_text().rpartition(")")[2].split()
            yield int(fields[2]), sum(map(int, fields[11:15])) * _TICK_S
