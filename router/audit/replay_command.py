"""`vllm-llmd replay`: puts recorded decisions to other policies, and tells how they would have chosen."""

import argparse
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import msgspec

from vllm_llmd.errors import ConfigError
from vllm_llmd.program import write_file
from vllm_llmd.router import policies
from vllm_llmd.router.audit.recorded import Recorded, Restorer
from vllm_llmd.router.audit.recording import Reader
from vllm_llmd.router.audit.replay import Replay, Report, Score
from vllm_llmd.router.policy import Policy, PolicySettings
from vllm_llmd.tables import aligned

Say = Callable[[str], None]

_COLUMNS: tuple[tuple[str, Callable[[Score], str]], ...] = (
    ("policy", lambda each: each.policy),
    ("decisions", lambda each: f"{each.decisions:,}"),
    ("agree", lambda each: f"{each.agree:.1%}"),
    ("cheaper", lambda each: f"{each.cheaper:.1%}"),
    ("dearer", lambda each: f"{each.dearer:.1%}"),
    ("predicted ms", lambda each: f"{each.mean_ms:,.0f}"),
    ("taken ms", lambda each: f"{each.mean_taken_ms:,.0f}"),
    ("cached", lambda each: f"{each.cached_share:.1%}"),
    ("with source", lambda each: f"{each.source_share:.1%}"),
    ("busiest/mean", lambda each: f"{each.busiest_to_mean:.2f}"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="what `router --record-decisions` has written")
    parser.add_argument("--policy", action="append", help="may be repeated (default: all that there are)")
    parser.add_argument("--seed", type=int, default=0, help="decides what is left to chance (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="how many decisions to take, from the first (default: all)")
    parser.add_argument("--json", help="file to write the report to, as JSON")


def run(args: argparse.Namespace, say: Say) -> int:
    """Raises ConfigError for a file or a policy that cannot be used, and RecordingError for what is no recording."""
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"limit must be at least 1; got {args.limit}")

    def make(name: str, min_remote_tokens: int) -> Policy:
        return policies.make(name, PolicySettings(min_remote_tokens, random.Random(f"{name} {args.seed}")))

    replay, path = Replay(args.policy or policies.names(), make), Path(args.file)
    try:
        with path.open("rb") as stream:
            notes = _replay(replay, Reader(stream, str(path)), args.limit)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give the path of a file") from None
    report = replay.report()
    for line in (*_lines(report), *notes):
        say(line)
    write_file(args.json, msgspec.json.format(msgspec.json.encode(report), indent=1), "json: ")
    return 0


def _replay(replay: Replay, reader: Reader, limit: int | None) -> list[str]:
    """What is to be said of the file."""
    restorer = Restorer()
    decisions = itertools.count(1)
    for event in restorer.events(reader):
        if isinstance(event, Recorded) and limit is not None and next(decisions) > limit:
            return []
        replay.take(event)
    notes = []
    if reader.cut_bytes:
        notes.append(
            f"the file ends within a record, after byte {reader.end}: the router was killed, or still writes; what is "
            "before that counts"
        )
    if reader.damaged or restorer.orphans:
        notes.append(
            f"{reader.damaged} records are damaged, the last at or before byte {reader.end}; "
            f"{restorer.orphans} decisions that refer to such do not count"
        )
    if reader.unknown:
        notes.append(f"{reader.unknown} records are of kinds that this release does not know")
    return notes


def _lines(report: Report) -> list[str]:
    recorded = ", ".join(report.recorded_policies) or "nobody"
    lines = [f"{report.decisions:,} decisions of {recorded}"]
    if report.nobody:
        lines.append(f"{report.nobody:,} more found no engine")
    if report.lost:
        lines.append(f"{report.lost:,} more were lost when they were recorded")
    lines += aligned([[heading for heading, _ in _COLUMNS], *map(_row, report.scores)])
    ttft = report.ttft
    if ttft is None:
        return [*lines, "time to first byte: no stream's was measured"]
    line = (
        f"time to first byte of {ttft.answers:,} streams: measured {ttft.mean_measured_ms:,.0f} ms on average, "
        f"predicted {ttft.mean_predicted_ms:,.0f} ms; predicted over measured {ttft.ratio:.2f} (median); off by "
        f"{ttft.error_p50:.0%} (median), {ttft.error_p90:.0%} (90th percentile)"
    )
    return [*lines, line]


def _row(score: Score) -> list[str]:
    return [tell(score) for _, tell in _COLUMNS]
