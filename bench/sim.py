"""`make bench-sim`: every policy on a production trace, on simulated fleets of three sizes, with and without roles.

Prints a table per cell and writes results after each, so that an interrupted run can be continued. The last line
printed is one JSON object. See bench/README.md.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import sim_results
from resumable import conclude, status_of
from sim_cells import Cell, Load, Objectives, Roles
from sim_results import Results, Settings

from vllm_llmd.router import policies
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.simulate import main as simulate
from vllm_llmd.simulate.report import Summary
from vllm_llmd.simulate.settings import Place, SimulateSettings
from vllm_llmd.simulate.table import table

MINUTES = {8: 20.0, 64: 4.0, 512: 1.5}
"""Of the trace, by engines: fewer minutes of more users are as many requests."""


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def play(policy: str, settings: SimulateSettings) -> tuple[Summary, float]:
    """Runs in a process of its own. The summary, and simulated requests per second of this machine's time."""
    requests = simulate.traffic_of(settings)
    simulate.compile_ahead()
    began_s = time.perf_counter()
    summary = simulate.summarised(policy, settings, requests)
    return summary, len(requests) / (time.perf_counter() - began_s)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sim", description=__doc__.partition("\n")[0])
    parser.add_argument("--trace", required=True, help="file in the form of Mooncake's conversation_trace.jsonl")
    parser.add_argument("--engines", nargs="+", type=int, default=list(MINUTES), help="default: %(default)s")
    parser.add_argument(
        "--roles", nargs="+", choices=get_args(Roles), default=list(get_args(Roles)), help="default: both"
    )
    parser.add_argument(
        "--loads", nargs="+", choices=get_args(Load), default=list(get_args(Load)), help="default: both"
    )
    parser.add_argument("--policies", nargs="+", default=policies.names(), help="default: all, %(default)s")
    parser.add_argument("--ours", default=RouterSettings().policy, help="default: the router's, %(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="of the minutes played (default: %(default)s)")
    parser.add_argument("--waiting", choices=get_args(Place), default="router", help="default: %(default)s")
    parser.add_argument("--objectives", choices=get_args(Objectives), default="sent", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--resume", action="store_true", help="go on with the results of an interrupted run")
    parser.add_argument("--out", type=Path, default=Path("bench/results/sim.json"), help="default: %(default)s")
    return parser.parse_args()


def cells_of(args: argparse.Namespace) -> list[Cell]:
    return [
        Cell(engines, roles, load, args.scale * MINUTES.get(engines, MINUTES[512]))
        for engines in args.engines
        for roles in args.roles
        for load in args.loads
    ]


def settings_from(args: argparse.Namespace) -> Settings:
    names = list(dict.fromkeys([args.ours, *args.policies, "round_robin"]))
    return Settings(
        trace=Path(args.trace).name,
        ours=args.ours,
        policies=names,
        scale=args.scale,
        seed=args.seed,
        waiting=args.waiting,
        objectives=args.objectives,
    )


def settings_of(cell: Cell, args: argparse.Namespace) -> SimulateSettings:
    return cell.settings(args.trace, args.seed, args.waiting, args.objectives)


def play_all(results: Results, cells: Sequence[Cell], args: argparse.Namespace) -> None:
    """Every cell that has not been played yet."""
    names = results.settings.policies
    with processes(args.jobs) as pool:
        running = [
            (cell, [pool.submit(play, name, settings_of(cell, args)) for name in names]) for cell in results.left(cells)
        ]
        for cell, runs in running:
            done = [run.result() for run in runs]
            summaries = [summary for summary, _ in done]
            told = results.add(cell, summaries)
            sim_results.save(results, args.out)
            say(f"\n{cell.name}: {summaries[0].requests:,} requests, {summaries[0].offered:.2f} a second")
            say(table(summaries))
            say(
                f"{args.ours} against {told.best_other}: {told.ratio:.3f}; simulated requests per second: "
                f"{min(rate for _, rate in done):,.0f} to {max(rate for _, rate in done):,.0f}"
            )


@contextmanager
def processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """So many. Where the block is left before all is done, they end at once."""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()


def run() -> int:
    args = read_arguments()
    settings = settings_from(args)
    results = sim_results.load(args.out, settings) if args.resume else Results(settings=settings)
    play_all(results, cells_of(args), args)
    return conclude([], results.last)


if __name__ == "__main__":
    sys.exit(status_of(run))
