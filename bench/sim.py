"""`make bench-sim`: every policy on a production trace, on simulated fleets of three sizes, with and without roles.

Prints a table per cell, keeps every number in a results file, and ends with one JSON object. See bench/README.md.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import get_args

import msgspec
from sim_cells import Cell, Load, Played, Roles, last_line, verdict

from vllm_llmd.router import policies
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.simulate import main as simulate
from vllm_llmd.simulate.report import Summary
from vllm_llmd.simulate.settings import SimulateSettings
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
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/sim.json"), help="default: %(default)s")
    return parser.parse_args()


def cells_of(args: argparse.Namespace) -> list[Cell]:
    return [
        Cell(engines, roles, load, args.scale * MINUTES.get(engines, MINUTES[512]))
        for engines in args.engines
        for roles in args.roles
        for load in args.loads
    ]


def main() -> int:
    args = read_arguments()
    names = list(dict.fromkeys([args.ours, *args.policies, "round_robin"]))
    played: list[Played] = []
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        cells = cells_of(args)
        running = [
            (cell, [pool.submit(play, name, cell.settings(args.trace, args.seed)) for name in names]) for cell in cells
        ]
        for cell, runs in running:
            done = [run.result() for run in runs]
            summaries = [summary for summary, _ in done]
            played.append(Played(cell.name, cell.engines, cell.roles, cell.load, summaries))
            told = verdict(played[-1], args.ours)
            say(f"\n{cell.name}: {summaries[0].requests:,} requests, {summaries[0].offered:.2f} a second")
            say(table(summaries))
            say(
                f"{args.ours} against {told.best_other}: {told.ratio:.3f}; simulated requests per second: "
                f"{min(rate for _, rate in done):,.0f} to {max(rate for _, rate in done):,.0f}"
            )
    verdicts = [verdict(each, args.ours) for each in played]
    last = last_line(verdicts)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = msgspec.to_builtins({"ours": args.ours, "verdicts": verdicts, "last": last, "cells": slim(played)})
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    say("\n" + json.dumps(last))
    return 0


def slim(played: list[Played]) -> list[Played]:
    """Without what fills files: single engines, stretches of time, curves."""

    def slimmed(run: Summary) -> Summary:
        spreads = {
            name: msgspec.structs.replace(getattr(run, name), curve=[]) for name in ("ttft_ms", "tpot_ms", "e2e_ms")
        }
        return msgspec.structs.replace(run, over_time=[], engines=[], **spreads)

    return [msgspec.structs.replace(each, runs=[slimmed(run) for run in each.runs]) for each in played]


if __name__ == "__main__":
    sys.exit(main())
