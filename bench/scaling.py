"""`make bench-scaling`: are the desired replicas right? Plays a trace on fleets as large as is wanted, and on others.

`steady`: at a load that stays, what the router wants against the smallest fleet that keeps the SLO, found by trying.
`changing`: the fleet follows what the router wants, as an autoscaler would have it. See bench/README.md.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_llmd.names import Role
from vllm_llmd.router import policies
from vllm_llmd.router.policy import PolicySettings
from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.simulate import main as simulate
from vllm_llmd.simulate import traffic
from vllm_llmd.simulate.events import Events
from vllm_llmd.simulate.member import Member
from vllm_llmd.simulate.report import is_good
from vllm_llmd.simulate.routing import Routing
from vllm_llmd.simulate.settings import SimulateSettings
from vllm_llmd.simulate.simulation import Simulation
from vllm_llmd.simulate.trace import TraceRequest

Sizes = Mapping[Role, int]
Found = dict[str, Any]
"""What a fleet has shown, as JSON has it."""
Controller = Callable[[float, Sizes], Sizes]
"""Given the time and what the router wants, how many engines take requests from now on."""

LOOK_MS = 15_000.0
"""An autoscaler looks so often, as Kubernetes' own does."""

START_MS = 60_000.0
"""An engine takes requests so long after it was wanted."""

STABLE_MS = 300_000.0
"""Nobody is stopped who was wanted within this time, as Kubernetes' own has it by default."""

KEPT_SHARE = 0.9


@dataclass(frozen=True)
class Run:
    """What a fleet has shown: at every look, what the router `wanted`; and how many engines it `had` until the next."""

    good_share: float
    wanted: list[tuple[float, Sizes]]
    had: list[Sizes]

    def mean_wanted(self, after_ms: float) -> dict[Role, float]:
        looks = [sizes for at_ms, sizes in self.wanted if at_ms > after_ms]
        return {role: fmean(each[role] for each in looks) for role in looks[0]}


class Autoscaled:
    """Plays requests on a fleet of which a controller says how much of it takes requests."""

    def __init__(self, args: argparse.Namespace, most: Sizes) -> None:
        settings = SimulateSettings(trace=str(args.trace), seed=args.seed)
        self._slo = settings.slo
        self._events = Events()
        policy = policies.make(args.policy, PolicySettings(settings.min_remote_tokens, random.Random(args.seed)))
        self._routing = Routing(RouterSettings(policy=args.policy), self._events, policy)
        limits, speeds = settings.limits(), settings.model.speeds()
        self._ids = {role: [f"{role}-{n}" for n in range(count)] for role, count in most.items()}
        members = [Member(each, role, limits, speeds) for role, ids in self._ids.items() for each in ids]  # type: ignore[arg-type]
        self._simulation = Simulation(members, self._routing, self._events, settings.heartbeat_ms)
        self._looks: list[tuple[float, Sizes]] = []
        self._had: list[Sizes] = []

    def play(self, requests: list[TraceRequest], first: Sizes, controller: Controller) -> Run:
        self._controller, self._end_ms = controller, requests[-1].at_ms
        self._events.at(0.0, self._take, first)
        self._events.at(LOOK_MS, self._look, None)
        outcomes = self._simulation.run(requests).outcomes
        good = sum(is_good(outcome, self._slo) for outcome in outcomes)
        return Run(good / len(outcomes), self._looks, self._had)

    def _look(self, _: None) -> None:
        now_ms = self._events.now_ms()
        wanted = {plan.role: plan.desired.replicas for plan in self._routing.fleet.plans()}
        self._looks.append((now_ms, wanted))
        self._take(self._controller(now_ms, wanted))
        if now_ms + LOOK_MS < self._end_ms:
            self._events.at(now_ms + LOOK_MS, self._look, None)

    def _take(self, sizes: Sizes) -> None:
        """The first of each role take requests, the others finish what they have."""
        self._had.append({role: min(sizes[role], len(ids)) for role, ids in self._ids.items()})
        membership = self._routing.fleet.membership
        for role, ids in self._ids.items():
            for number, engine in enumerate(ids):
                known = membership.get(engine)  # type: ignore[arg-type]
                if known is not None and known.drained == (number < sizes[role]):
                    (membership.undrain if known.drained else membership.drain)(known.info.id)


class Follow:
    """What is wanted, once engines have started; fewer only when fewer were wanted for a while."""

    def __init__(self, first: Sizes) -> None:
        self._wanted: list[tuple[float, Sizes]] = [(-STABLE_MS, first)]

    def __call__(self, now_ms: float, wanted: Sizes) -> Sizes:
        self._wanted.append((now_ms, wanted))
        at_ms = now_ms - START_MS
        last = [sizes for when_ms, sizes in self._wanted if when_ms <= at_ms][-1]
        lately = [sizes for when_ms, sizes in self._wanted if at_ms - STABLE_MS + START_MS < when_ms <= at_ms]
        return {role: max([last[role], *(sizes[role] for sizes in lately)]) for role in last}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def fixed(args: argparse.Namespace, requests: list[TraceRequest], sizes: Sizes) -> Run:
    run = Autoscaled(args, sizes).play(requests, sizes, lambda *_: sizes)
    say(f"    {told(sizes)}: {100 * run.good_share:.1f} % good, wants {told(run.mean_wanted(args.warm_ms))}")
    return run


def told(sizes: Mapping[Role, float]) -> str:
    return " + ".join(f"{size:g} {role}" for role, size in ((role, round(size, 2)) for role, size in sizes.items()))


def smallest(args: argparse.Namespace, requests: list[TraceRequest], sizes: Sizes, role: Role, keeps: bool) -> int:
    """The fewest engines of a role that keep the SLO beside the others, tried one by one from `sizes` on."""
    size = sizes[role]
    while True:
        tried = size - 1 if keeps else size + 1
        if not tried:
            return size
        if (fixed(args, requests, {**sizes, role: tried}).good_share >= KEPT_SHARE) != keeps:
            return size if keeps else tried
        size = tried


def settled(args: argparse.Namespace, requests: list[TraceRequest], sizes: Sizes) -> tuple[Sizes, Run]:
    """The fleet that wants to stay as large as it is; of several that want each other, the largest."""
    tried: list[tuple[Sizes, Run]] = []
    while all(sizes != each for each, _ in tried):
        tried.append((sizes, fixed(args, requests, sizes)))
        sizes = {role: round(size) for role, size in tried[-1][1].mean_wanted(args.warm_ms).items()}
    circle = tried[[each for each, _ in tried].index(sizes) :]
    return max(circle, key=lambda each: sum(each[0].values()))


def steady(args: argparse.Namespace, first: Sizes, speedup: float) -> Found:
    """What a fleet wants that is large enough, tried, and sizes around it."""
    say(f"{' and '.join(first)}, {speedup:g} times the trace's load")
    requests = read(args, speedup, args.minutes * speedup)
    first = {role: round(size * speedup) for role, size in first.items()}
    wanted, run = settled(args, requests, first)
    less = fixed(args, requests, {role: max(int(0.7 * size), 1) for role, size in wanted.items()})
    keeps = run.good_share >= KEPT_SHARE
    least = {role: smallest(args, requests, wanted, role, keeps) for role in wanted}
    found = {
        "roles": list(wanted),
        "speedup": speedup,
        "wanted": wanted,
        "good_share": round(run.good_share, 4),
        "good_share_of_0.7": round(less.good_share, 4),
        "smallest": least,
        "wanted_to_smallest": {role: round(wanted[role] / least[role], 3) for role in wanted},
    }
    say(f"  {json.dumps(found)}")
    return found


def changing(args: argparse.Namespace, first: Sizes) -> list[Found]:
    """Load that goes up and falls back: a fleet that follows what is wanted, and one of 0.7 times that at any time."""
    say(f"{' and '.join(first)}, at a load that changes")
    requests, most = varying(args), {role: 8 * size for role, size in first.items()}
    followed = Autoscaled(args, most).play(requests, first, Follow(first))
    fewer = iter([{role: max(int(0.7 * size), 1) for role, size in each.items()} for each in followed.had])
    less = Autoscaled(args, most).play(requests, next(fewer), lambda *_: next(fewer))
    found: list[Found] = []
    for name, run in (("wanted", followed), ("0.7 of that", less)):
        engines = {role: round(fmean(each[role] for each in run.had), 2) for role in first}
        largest = {role: max(each[role] for each in run.had) for role in first}
        told = {"roles": list(first), "fleet": name, "good_share": round(run.good_share, 4)}
        found.append({**told, "mean_engines": engines, "most_engines": largest})
        say(f"  {json.dumps(found[-1])}")
    return found


def read(args: argparse.Namespace, speedup: float, minutes: float) -> list[TraceRequest]:
    settings = SimulateSettings(trace=str(args.trace), minutes=minutes, speedup=speedup, seed=args.seed)
    return simulate.traffic_of(settings)


def varying(args: argparse.Namespace) -> list[TraceRequest]:
    """Successive parts of the trace, each of `minutes` once hastened."""
    parts, from_min, at_ms = [], 0.0, 0.0
    everything = read(args, 1.0, 1e9)
    for speedup in args.profile:
        until_min = from_min + args.minutes * speedup
        part = [each for each in everything if from_min * 60_000 <= each.at_ms < until_min * 60_000]
        for each in traffic.hastened(part, speedup):
            parts.append(TraceRequest(at_ms + each.at_ms, each.prompt_tokens, each.output_tokens, each.hash_ids))
        from_min, at_ms = until_min, at_ms + args.minutes * 60_000
    return parts


def last_line(steady: Sequence[Found], changing: Sequence[Found]) -> dict[str, object]:
    """The worst of what was found; None of what was not looked for."""
    roles = [ratio for found in steady for ratio in found["wanted_to_smallest"].values()]
    fleets = [sum(found["wanted"].values()) / sum(found["smallest"].values()) for found in steady]
    followed = [found["good_share"] for found in changing if found["fleet"] == "wanted"]
    return {
        "fleets": len(steady),
        "too_small": sum(found["good_share"] < KEPT_SHARE for found in steady),
        "wanted_to_smallest": round(max(fleets), 3) if fleets else None,
        "wanted_to_smallest_of_a_role": max(roles, default=None),
        "followed_good_share": min(followed, default=None),
    }


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--trace", type=Path, required=True, help="file in the form of Mooncake's conversation trace")
    parser.add_argument("--parts", nargs="+", choices=["steady", "changing"], default=["steady", "changing"])
    parser.add_argument("--roles", nargs="+", choices=["both", "apart"], default=["both", "apart"])
    parser.add_argument("--speedups", nargs="+", type=float, default=[1.0, 2.0])
    parser.add_argument("--profile", nargs="+", type=float, default=[0.75, 1.5, 2.25, 0.75], help="speedups, in turn")
    parser.add_argument("--minutes", type=float, default=15.0, help="for which each load stays (default: %(default)s)")
    parser.add_argument("--policy", default=RouterSettings().policy)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/results/scaling.json"))
    args = parser.parse_args()
    args.warm_ms = float(RouterSettings().scaling_window_ms)
    return args


def main() -> int:
    args = read_arguments()
    simulate.compile_ahead()
    fleets: dict[str, Sizes] = {"both": {"both": 7}, "apart": {"prefill": 6, "decode": 3}}
    found: dict[str, list[Found]] = {"steady": [], "changing": []}
    for roles in args.roles:
        if "steady" in args.parts:
            found["steady"] += [steady(args, fleets[roles], speedup) for speedup in args.speedups]
        if "changing" in args.parts:
            found["changing"] += changing(args, fleets[roles])
    last = last_line(found["steady"], found["changing"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**found, "last": last}, indent=1) + "\n")
    say(json.dumps(last))
    return 0


if __name__ == "__main__":
    sys.exit(main())
