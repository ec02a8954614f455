"""`make bench-pd`: time to first token of our connector, of one engine, and of vLLM's own connectors, on this machine.

Writes results after every block, so that an interrupted run can be continued. The last line printed is one JSON
object. See bench/README.md.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pd_report
from pd_plan import BLOCK_OF_ARM, plan, remaining_s
from pd_tasks import Desk, perform
from pd_values import Finished, Load, Part, Results, Settings, Transport, load, save
from resumable import conclude, status_of, versions
from rich.console import Console

from vllm_llmd.errors import LlmdError

FULL = Settings(
    models=[".models/smollm2", ".models/tiny"],
    transports=["shm", "tcp"],
    lengths=["512", "2048", "6000", "8x512"],
    arms=list(BLOCK_OF_ARM),
    parts=["ttft", "idle", "raw"],
    rounds=15,
    turns=3,
)
QUICK = Settings(
    models=[".models/tiny"],
    transports=["shm"],
    lengths=["512", "2048"],
    arms=list(BLOCK_OF_ARM),
    parts=["ttft", "idle", "raw"],
    rounds=2,
    turns=1,
)
"""Whether everything works, in a quarter of an hour; its figures say little."""


def settings_from(args: argparse.Namespace) -> Settings:
    """Flags over the preset. Raises ConfigError for a length that cannot be read."""
    preset = QUICK if args.quick else FULL
    chosen = {name: getattr(args, name) or getattr(preset, name) for name in Settings.__struct_fields__}
    for length in chosen["lengths"]:
        Load.parse(length)
    chosen["turns"] = min(chosen["turns"], chosen["rounds"])
    return Settings(**chosen)


def perform_all(desk: Desk, out: Path) -> list[str]:
    """Every task that is not finished yet, saving after each; returns what failed, in words."""
    results = desk.results
    tasks = plan(results.settings)
    failed = []
    for number, task in enumerate(tasks, start=1):
        done = {each.key for each in results.finished}
        if task.key in done:
            continue
        left = remaining_s([each for each in tasks[number - 1 :] if each.key not in done], results.finished)
        about = "" if left is None else f"; about {left / 60:.0f} minutes left"
        desk.say(f"\n{number} of {len(tasks)}: {task.key}{about}")
        began, kept = time.monotonic(), Kept.of(results)
        try:
            perform(desk, task)
        except LlmdError as error:
            kept.restore(results)
            failed.append(f"{task.key}: {error}")
            desk.say(f"failed: {error}")
            continue
        results.finished.append(Finished(key=task.key, seconds=time.monotonic() - began))
        results.summary = pd_report.last_line(results)
        save(results, out)
    return failed


@dataclass(frozen=True)
class Kept:
    """How much had been measured before a task: what half a task has brought is taken back."""

    lengths: dict[str, int]

    @classmethod
    def of(cls, results: Results) -> "Kept":
        return cls({name: len(value) for name, value in _lists(results).items()})

    def restore(self, results: Results) -> None:
        for name, value in _lists(results).items():
            del value[self.lengths[name] :]


def _lists(results: Results) -> dict[str, list[object]]:
    return {name: value for name in results.__struct_fields__ if isinstance(value := getattr(results, name), list)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every choice is a flag; without one, the preset's."""
    parser.add_argument("--quick", action="store_true", help="see whether everything works; the figures say little")
    parser.add_argument("--models", nargs="+", metavar="DIR", help="model directories; the headlines are the first's")
    parser.add_argument("--transports", nargs="+", choices=get_args(Transport), help="shared memory, TCP")
    parser.add_argument("--lengths", nargs="+", metavar="N", help="2048; 8x512: 8 at once; 6000@5: at most 5 rounds")
    parser.add_argument("--arms", nargs="+", choices=tuple(BLOCK_OF_ARM), help="`one` is always measured")
    parser.add_argument("--parts", nargs="+", choices=get_args(Part), help="what to measure")
    parser.add_argument("--rounds", type=_at_least_one, metavar="N", help="measurements of each arm and length")
    parser.add_argument("--turns", type=_at_least_one, metavar="N", help="over how many starts of the engines")
    parser.add_argument("--resume", action="store_true", help="go on with the results of an interrupted run")
    parser.add_argument("--out", type=Path, default=Path("bench/results/pd.json"), help="default: %(default)s")
    parser.add_argument("--log-dir", type=Path, default=Path(".logs/bench-pd"), help="default: %(default)s")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number; got '{text}'")
    return int(text)


def measure(args: argparse.Namespace) -> int:
    settings = settings_from(args)
    results = load(args.out, settings) if args.resume else Results(settings=settings, versions=versions())
    failed = perform_all(Desk(results, args.log_dir, Console()), args.out)
    failed += [f"other answers than one engine's: {arm}" for arm in pd_report.disagreements(results)]
    sys.stdout.write(f"\n{pd_report.tables(results)}\n")
    return conclude(failed, pd_report.rounded(pd_report.last_line(results)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pd", description="prefill/decode benchmark; see bench/README.md")
    add_arguments(parser)
    args = parser.parse_args()
    return status_of(lambda: measure(args))


if __name__ == "__main__":
    sys.exit(main())
