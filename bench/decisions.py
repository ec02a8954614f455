"""What it costs to keep, explain, record and replay decisions: one thread, in this process, without HTTP.

    .venv/bin/python bench/decisions.py

Prints microseconds of the processor's time, medians, for fleets of 8 and 512 engines that are busy at random; between
decisions the loads of one or two of them change. Policy `cost`, a prompt of 8,192 tokens.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from decide import FACTS, fleet

from vllm_llmd.router import policies
from vllm_llmd.router.audit import explain
from vllm_llmd.router.audit.barred import barred
from vllm_llmd.router.audit.decisions import Decisions, Made, Outcome
from vllm_llmd.router.audit.recorded import Restorer
from vllm_llmd.router.audit.recorder import Recorder, RecordFile
from vllm_llmd.router.audit.recording import Began, Reader, Writer
from vllm_llmd.router.audit.replay import Replay
from vllm_llmd.router.decide import decide
from vllm_llmd.router.fleet import Fleet
from vllm_llmd.router.members.membership import Placed
from vllm_llmd.router.policy import Policy, PolicySettings

CALLS = 500


def policy_of(name: str, min_remote_tokens: int = 256) -> Policy:
    return policies.make(name, PolicySettings(min_remote_tokens, random.Random(0)))


def decisions_of(made: Fleet, chance: random.Random) -> Iterable[Made]:
    policy, chunks, engines = policy_of("cost"), made.cut(FACTS), made.membership.all()
    for number in range(CALLS):
        for engine in chance.sample(engines, 1 + number % 2):
            engine.place(f"other {number}", Placed(0.0, 100))
        candidates = made.candidates(FACTS, chunks)
        yield Made(f"life-{number}", 1, FACTS, chunks, candidates, decide(FACTS, candidates, policy), 0.0, 0.2)


class Count:
    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        self.value += amount


def us(call: Callable[[], object], times: int = CALLS) -> float:
    values = []
    for _ in range(times):
        began_s = time.thread_time()
        call()
        values.append((time.thread_time() - began_s) * 1e6)
    return statistics.median(values)


def say(what: str, value: float, unit: str = "us") -> None:
    sys.stdout.write(f"  {what:44s} {value:9.1f} {unit}\n")


def keep_and_explain(made: Fleet, one: Made) -> None:
    ring = Decisions("cost", 4096, 16 << 20, time.time)

    def kept() -> None:
        ring.ended(ring.made(one), Outcome(200, True, 12.5, 10.5, 100.5, 8192, 4096, 200))

    say("a record and its outcome", us(kept))
    assert one.decision is not None
    say("letting go of the columns", us(one.decision.without_prices))
    say("an explanation", us(lambda: explain.explanation(one, barred(made, FACTS, one.candidates, []))))
    why = explain.explanation(one, [])
    record = ring.made(one, why)
    say("its headers", us(lambda: explain.headers(record, why)))
    say("all of it as JSON", us(lambda: msgspec.json.encode(why.shown()), 50))
    say("  of", len(msgspec.json.encode(why.shown())) / 1000, "kB")


def record_and_replay(every: Iterable[Made], path: Path) -> None:
    recorded, lost = Count(), Count()
    recorder = Recorder(RecordFile(path), Writer(Began("bench", "cost", 256, 0.0), (1, 2)), recorded, lost)
    ring = Decisions("cost", 4096, 16 << 20, time.time, recorder)
    loop_us = []
    for one in every:
        began_s = time.thread_time()
        ring.ended(ring.made(one), Outcome(200, True, 12.5, 10.5, 100.5, 8192, 4096, 200))
        loop_us.append((time.thread_time() - began_s) * 1e6)
    say("a record and its outcome, recorded", statistics.median(loop_us))
    began_s = time.process_time()
    recorder.start()
    recorder.close()
    say("the thread that records it", (time.process_time() - began_s) / recorded.value * 1e6)
    say("  bytes", path.stat().st_size / recorded.value, "")
    assert not lost.value
    for name in ("cost", "weighted"):
        replay = Replay([name], policy_of)
        began_s = time.thread_time()
        with path.open("rb") as stream:
            for event in Restorer().events(Reader(stream, str(path))):
                replay.take(event)
        say(f"replaying it with {name}", (time.thread_time() - began_s) / replay.report().decisions * 1e6)


def main() -> int:
    for engines in (8, 512):
        sys.stdout.write(f"{engines} engines\n")
        made = fleet(["both"] * engines)
        every = list(decisions_of(made, random.Random(1)))
        keep_and_explain(made, every[0])
        with tempfile.TemporaryDirectory() as folder:
            record_and_replay(every, Path(folder) / "decisions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
