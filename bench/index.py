"""`make bench-index`: the global prefix index against NVIDIA Dynamo's, and against its own targets.

Each part is a module `index_<part>` and runs in a process of its own. Prints tables, keeps every value in a results
file, and ends with one JSON object; what is not measured in this run is null there. See bench/README.md.
"""

import argparse
import importlib
import json
import multiprocessing
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from index_plan import PARTS, Parts, kept, last_line
from index_values import Found, Settings

say = sys.stdout.write


def measure(part: str, settings: Settings) -> Found:
    """Runs in the part's own process."""
    found: Found = importlib.import_module(f"index_{part}").measure(settings)
    return found


def measure_apart(part: str, settings: Settings) -> Found:
    """A part in a fresh process. Raises whatever went wrong there."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, part, settings).result()


def tell(found: Found) -> None:
    if found.arms:
        say(f"{'':34s} {'ours':>30s} {'Dynamo':>30s}\n")
    for line in [*(arms.row() for arms in found.arms), *found.lines]:
        say(line + "\n")
    sys.stdout.flush()


def earlier(out: Path) -> Parts:
    """The parts in a results file; none if there is no such file."""
    if not out.exists():
        return {}
    parts: Parts = json.loads(out.read_text()).get("parts", {})
    return parts


def save(parts: Parts, out: Path) -> None:
    out.write_text(json.dumps({"parts": parts, "last": last_line(parts)}, indent=1) + "\n")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m index", description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--resident", type=int, default=1_000_000, help="blocks held (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of events (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=300, help="matches and hashes (default: %(default)s)")
    parser.add_argument("--engine-python", default=".venv/bin/python", help="has vLLM (default: %(default)s)")
    parser.add_argument("--model", default=".models/tiny", help="of real engines (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/index.json"), help="default: %(default)s")
    return parser.parse_args()


def main() -> int:
    args = read_arguments()
    settings = Settings(args.resident, args.rounds, args.calls, args.engine_python, args.model)
    every, now, failed = earlier(args.out), {}, False
    for part in args.parts:
        say(f"\n{part}\n")
        sys.stdout.flush()
        try:
            found = measure_apart(part, settings)
        except ModuleNotFoundError as error:
            say(f"error: this part needs {error.name}, which is not installed here; run: make bench-index\n")
            failed = True
            continue
        except Exception:  # the other parts are none the worse for it
            traceback.print_exc()
            failed = True
            continue
        tell(found)
        every[part] = now[part] = kept(found, settings, datetime.now(UTC).isoformat(timespec="seconds"))
        save(every, args.out)
    say(json.dumps(last_line(now)) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
