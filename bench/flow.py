"""What flow control costs a request: headers, the question whether there is room, and the queue. One line of JSON.

python bench/flow.py
"""

import json
import sys
import time
from collections.abc import Callable
from statistics import median

from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.router.candidates import Roster
from vllm_llmd.router.members.membership import Engine, Placed, State
from vllm_llmd.router.placement.rosters import Wanted
from vllm_llmd.router.slo import Wish, read_wish
from vllm_llmd.router.waiting.flow import Arrival, Flow, Pool, QueueLimits, to_wait
from vllm_llmd.router.waiting.saturation import Limits, has_room
from vllm_llmd.wire import EngineInfo, Load

ROUNDS = 15
LIMITS = Limits(engine_queue=8, engine_requests=256, prefill_tokens=65_536, fresh_ms=2000)
POOL = Pool(Wanted("m"), True)
PLAIN = [("Host", "router:8000"), ("Accept", "*/*"), ("Content-Type", "application/json"), ("Content-Length", "4096")]
PLAIN += [("Authorization", "Bearer key"), ("User-Agent", "client/1.0"), ("Accept-Encoding", "gzip")]
ASKING = [*PLAIN, ("x-llmd-priority", "5"), ("x-llmd-tenant", "team-a"), ("x-llmd-slo-ttft-ms", "250")]


def microseconds(act: Callable[[], object], times: int) -> float:
    """Of this thread's time for one call, the median of rounds."""
    took = []
    for _ in range(ROUNDS):
        began_ns = time.thread_time_ns()
        for _ in range(times):
            act()
        took.append((time.thread_time_ns() - began_ns) / times / 1000)
    return round(median(took), 2)


def fleet(size: int, in_flight: int) -> Roster:
    engines = []
    for number in range(size):
        name, room = EngineId(f"e{number}"), (16, 10_000, 131_072)
        info = EngineInfo(name, Epoch(1), "both", "", ["m"], *room, "f", [], max_sequences=256)
        engines.append(Engine(info, State.READY, 0))
    for engine in engines:
        engine.reported(Load(running=200, free_blocks=5000), 1.0)
        for number in range(in_flight):
            engine.place(str(number), Placed(0.0, 100))
    return Roster.of(engines, "m")


def send_one(roster: Roster) -> Callable[[], None]:
    """What is counted of a request that need not wait: sent, answered, ended."""
    engine = roster.engines[0]

    def act() -> None:
        engine.place("r", Placed(2.0, 100))
        engine.answering("r")
        engine.ended("r")

    return act


def through_the_queue(depth: int, tenants: int) -> Callable[[], None]:
    """One enters, one leaves, with so many waiting."""
    flow, number = Flow(QueueLimits(2 * depth, 1 << 40, {})), 0

    def enter() -> None:
        nonlocal number
        number += 1
        arrival = Arrival(str(number), POOL, 1000, 200, 4096, float(number))
        flow.enter(to_wait(arrival, Wish(tenant=str(number % tenants), priority=number % 3), 60_000.0))

    def act() -> None:
        enter()
        flow.next(lambda pool: True, float(number))

    for _ in range(depth):
        enter()
    return act


def shedding(depth: int, tenants: int) -> Callable[[], None]:
    """One enters a full queue, so that one is shed."""
    flow, number = Flow(QueueLimits(depth, 1 << 40, {})), 0

    def act() -> None:
        nonlocal number
        number += 1
        arrival = Arrival(str(number), POOL, 1000, 200, 4096, float(number))
        flow.enter(to_wait(arrival, Wish(tenant=str(number % tenants), priority=number % 3), 60_000.0))

    for _ in range(depth):
        act()
    return act


def main() -> None:
    light, full = fleet(512, 1), fleet(512, 264)
    measured = {
        "headers_none_us": microseconds(lambda: read_wish(PLAIN, {}), 5000),
        "headers_three_us": microseconds(lambda: read_wish(ASKING, {}), 5000),
        "arrival_us": microseconds(lambda: Arrival("r", POOL, 1000, 200, 4096, 0.0), 5000),
        "room_at_once_us": microseconds(lambda: has_room(light, True, LIMITS, 2.0), 5000),
        "no_room_512_engines_us": microseconds(lambda: has_room(full, True, LIMITS, 2.0), 50),
        "place_answer_end_us": microseconds(send_one(light), 5000),
        "queue_1000_us": microseconds(through_the_queue(1000, 50), 2000),
        "queue_10000_us": microseconds(through_the_queue(10_000, 50), 2000),
        "shed_1000_us": microseconds(shedding(1000, 50), 500),
    }
    sys.stdout.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    main()
