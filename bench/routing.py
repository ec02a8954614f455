"""`make bench-routing`: our placement against other routers', on real engines, with real HTTP, on this machine.

Writes results after every cell, so that an interrupted run can be continued. The last line printed is one JSON object.
See bench/README.md.
"""

import argparse
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import routing_check
import routing_client
import routing_report
from pd_engines import Engine, free_port
from resumable import conclude, status_of, versions
from routing_arms import ARMS, IN_TURN, OURS, Front, Places, front
from routing_client import Users
from routing_engines import Site, empty, engines, fast_dtype, served
from routing_plan import WARM_UP_REQUESTS, WORKLOADS, rotated, warm_up
from routing_probe import held, probes, unit_ms
from routing_values import Cell, Probe, Results, Settings, load, read, save

from vllm_llmd.errors import LlmdError
from vllm_llmd.launch_spec import HOST

FULL: Final = {"repetitions": 3, "scale": 1.0}
QUICK: Final = {"repetitions": 1, "scale": 0.25}
"""Whether everything works, in a few minutes; its figures say little."""

UNITS: Final = 3
"""So many prefills of each engine say how long a unit is before a cell and after it."""

SETTLE_S: Final = 0.5
"""After the caches have been emptied: a heartbeat, with the load of engines that have nothing to do."""


@dataclass(frozen=True)
class Desk:
    """What every cell works with."""

    results: Results
    engines: list[Engine]
    places: Places

    def unit_ms(self, when: str) -> float:
        """How long a unit is now. Not to be asked twice with the same words: caches may know them."""
        return round(routing_client.run(unit_ms(self.engines, when, UNITS)), 1)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def plan(settings: Settings) -> list[tuple[int, str, str]]:
    """Every cell in order. The arms of a workload follow each other, each time beginning with another one."""
    return [
        (repetition, workload, arm)
        for repetition in range(settings.repetitions)
        for place, workload in enumerate(settings.workloads)
        for arm in rotated(settings.arms, repetition + place)
    ]


def measure(desk: Desk, key: tuple[int, str, str]) -> Cell:
    """One cell. Raises LlmdError."""
    repetition, name, arm = key
    settings = desk.results.settings
    workload = WORKLOADS[name](settings.seed + repetition, settings.scale)
    with front(arm, desk.engines, desk.places) as router:
        routing_client.run(held(router.http, 0.0, warm_up(WARM_UP_REQUESTS)))
        before_ms = desk.unit_ms(f"before {key}")
        empty(desk.engines, router.indexed)
        time.sleep(SETTLE_S)
        before = served(desk.engines)
        users = routing_client.run(held(router.http, before_ms / 1000, workload))
        split = [after - former for after, former in zip(served(desk.engines), before, strict=True)]
        cell = cell_of(key, users, split, router)
        return msgspec.structs.replace(cell, units_ms=[before_ms, desk.unit_ms(f"after {key}")])


def cell_of(key: tuple[int, str, str], users: Users, split: list[int], router: Front) -> Cell:
    asked = sorted(users.asked, key=lambda each: each.sent_ms)
    first_ms = min(each.sent_ms + each.ttft_ms for each in asked)
    if all(each.cached_tokens for each in asked if each.sent_ms < first_ms):
        raise LlmdError("all that came before the first answer found tokens in caches that should be empty")
    return Cell(
        repetition=key[0],
        workload=key[1],
        arm=key[2],
        lasted_ms=round((users.ended_s - users.began_s) * 1000, 1),
        asked=asked,
        split=split,
        told=router.told() if key[2] == OURS else {},
    )


def measure_all(desk: Desk, out: Path, until_s: float) -> list[str]:
    """Every cell that is not done yet, as long as there is time; returns what failed, in words."""
    failed, cells = [], plan(desk.results.settings)
    for number, key in enumerate(cells, start=1):
        if key in desk.results.done:
            continue
        if time.monotonic() > until_s:
            say(f"{len(cells) - number + 1} of {len(cells)} are left; --resume goes on with them")
            break
        title = f"{number} of {len(cells)}: {key[1]}, {key[2]}, repetition {key[0] + 1}"
        try:
            cell = measure(desk, key)
        except LlmdError as error:
            failed.append(f"{title}: {error}")
            say(f"FAILED {failed[-1]}")
            continue
        desk.results.cells.append(cell)
        desk.results.summary = routing_report.summary(desk.results)
        save(desk.results, out)
        say(f"{title}: {routing_report.line(desk.results, cell)}")
    return failed


def probed(desk: Desk) -> list[Probe]:
    """Every probe once, with texts of its own."""
    with front(IN_TURN, desk.engines, desk.places) as router:
        return routing_client.run(probes(router.http, len(desk.engines), f"after {len(desk.results.probes)}"))


def run(results: Results, args: argparse.Namespace) -> list[str]:
    """Starts the engines and measures; returns what failed. Raises LlmdError if nothing can be measured."""
    with ExitStack() as stack:
        link = f"tcp://{HOST}:{stack.enter_context(free_port())}"
        settings = results.settings
        site = Site(Path(settings.model), settings.dtype, args.log_dir, settings.engines, link)
        began_s = time.monotonic()
        running = list(stack.enter_context(engines(site)))
        say(f"{len(running)} engines up after {time.monotonic() - began_s:.0f} s")
        for when in "warm", "beginning":
            now_ms = routing_client.run(unit_ms(running, when))
        results.unit_ms = results.unit_ms or round(now_ms, 1)
        say(f"1,000 tokens of prefill take {now_ms:.0f} ms; a unit is {results.unit_ms:.0f} ms")
        desk = Desk(results, running, Places(args.vllm_router, link, args.log_dir))
        with front(OURS, running, desk.places) as router:  # compiles what the router has compiled, once
            routing_client.run(held(router.http, 0.0, warm_up(WARM_UP_REQUESTS)))
        results.probes += probed(desk)
        failed = measure_all(desk, args.out, began_s + args.minutes * 60)
        results.probes += probed(desk)  # again: in the meantime the machine may have become slower or faster
        save(results, args.out)
        return failed


def check(results: Results, out: Path) -> None:
    """Says what the simulator predicts for what was measured. Raises LlmdError for want of probes."""
    fit = routing_check.fit_of(results)
    found = routing_check.checked(results, fit)
    results.checks = [{**vars(each), "ratio": each.ratio} for each in found]
    save(results, out)
    say(routing_check.table(found, fit))


def predict(settings: Settings, out: Path) -> int:
    """The same tables and last line from the simulator, with the speeds of former results if there are any."""
    results = Results(settings=settings)
    if out.exists():
        former = read(out)
        results.unit_ms, results.probes = former.unit_ms, former.probes
    played = routing_check.predicted(results)
    say(routing_report.tables(played))
    return conclude([], routing_report.last_line(played))


def dtype_from(args: argparse.Namespace) -> str:
    """Results that are gone on with, or predicted from, say what they were measured in."""
    if args.dtype != "auto":
        return str(args.dtype)
    if args.resume or args.check or (args.predict and args.out.exists()):
        return read(args.out).settings.dtype
    return fast_dtype(Path("/proc/cpuinfo").read_text())


def settings_from(args: argparse.Namespace) -> Settings:
    preset = QUICK if args.quick else FULL
    return Settings(
        model=args.model,
        engines=args.engines,
        arms=args.arms,
        workloads=args.workloads,
        repetitions=int(args.repetitions or preset["repetitions"]),
        scale=float(args.scale or preset["scale"]),
        seed=args.seed,
        slo_ttft_units=args.slo_ttft_units,
        slo_tpot_units=args.slo_tpot_units,
        dtype=dtype_from(args),
    )


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m routing", description="placement benchmark; see bench/README.md")
    parser.add_argument("--quick", action="store_true", help="see whether everything works; the figures say little")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all, %(default)s")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="default: all")
    parser.add_argument("--repetitions", type=int, metavar="N", help="default: 3; with --quick 1")
    parser.add_argument("--scale", type=float, metavar="X", help="of the requests; default: 1; with --quick 0.25")
    parser.add_argument("--seed", type=int, default=0, help="of the first repetition (default: %(default)s)")
    parser.add_argument("--engines", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--model", default=".models/smollm2", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="default: %(default)s")
    parser.add_argument("--slo-ttft-units", type=float, default=3.0, help="default: %(default)s")
    parser.add_argument("--slo-tpot-units", type=float, default=0.3, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="begin nothing after so long")
    parser.add_argument("--resume", action="store_true", help="go on with the results of an interrupted run")
    parser.add_argument("--predict", action="store_true", help="measure nothing: play it all in the simulator")
    parser.add_argument("--check", action="store_true", help="measure nothing: compare the simulator with the results")
    parser.add_argument("--vllm-router", default=".venv-bench/bin/vllm-router", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("bench/results/routing.json"), help="default: %(default)s")
    parser.add_argument("--log-dir", type=Path, default=Path(".logs/bench-routing"), help="default: %(default)s")
    return parser.parse_args()


def perform(args: argparse.Namespace) -> int:
    settings = settings_from(args)
    if args.predict:
        return predict(settings, args.out)
    again = args.resume or args.check
    results = load(args.out, settings) if again else Results(settings=settings, versions=versions())
    failed = [] if args.check else run(results, args)
    say(routing_report.tables(results))
    check(results, args.out)
    return conclude(failed, routing_report.last_line(results))


def main() -> int:
    args = read_arguments()
    return status_of(lambda: perform(args))


if __name__ == "__main__":
    sys.exit(main())
