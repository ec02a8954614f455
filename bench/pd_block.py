"""One block's turn: warms its engines up, checks that arms answer alike, and measures them request by request."""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pd_engines import SETTLE_S, Engine, Freezer
from pd_plan import Task
from pd_requests import Alone, Client, Ordered, Prompts, Pulled, Pushed, Route
from pd_values import Agreement, FirstOrder, Load, Results, Ttft

OUR_ARMS = ("chunk", "layer")
"""Each is also the name of its prefill engine."""

GATE_TOKENS = 8
GATE_PROMPT = 700
FIRST_ORDER_PROMPT = 512

BYTES_READ = "vllm:llmd_kv_bytes_read_total"
BYTES_EARLY = "vllm:llmd_kv_bytes_read_before_prefill_ended_total"


@dataclass(frozen=True)
class Lane:
    """One arm within a block: the engines that take part, the prefilling one first, and how they are asked."""

    arm: str
    engines: tuple[Engine, ...]
    route: Route

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(engine.name for engine in self.engines)


def yardstick(block: str, engines: Mapping[str, Engine]) -> Lane:
    """One engine alone, ours; where idle engines are compared, the one without a connector."""
    if "none" in engines:
        return Lane("none", (engines["none"],), Alone(engines["none"].http))
    engine = engines["decode" if block == "ours" else "one"]
    return Lane("one", (engine,), Alone(engine.http))


def arms(block: str, engines: Mapping[str, Engine]) -> list[Lane]:
    """The arms of a block whose engines are there."""
    decode = engines["decode"]
    if block == "ours":
        sources = [engines[arm] for arm in OUR_ARMS if arm in engines]
        return [Lane(each.name, (each, decode), Ordered(decode.http, each.name)) for each in sources]
    prefill = engines["prefill"]
    proxy = Pushed if block.startswith("push") else Pulled
    return [Lane(block, (prefill, decode), proxy(prefill.http, decode.http))]


@dataclass(frozen=True)
class Bench:
    """What a turn of a block works with."""

    task: Task
    lanes: Sequence[Lane]
    freezer: Freezer
    client: Client
    prompts: Prompts
    results: Results
    say: Callable[[str], None]


async def measure(bench: Bench) -> None:
    """Adds to the results. Raises BenchError."""
    await _first_orders(bench)
    await _warm_up(bench)
    for lane in bench.lanes[1:]:
        await _check(bench, lane)
    for number, loads in enumerate(bench.task.loads):
        for load in loads:
            await _round(bench, number, load)


async def _first_orders(bench: Bench) -> None:
    """Of engines that have answered alone but never with each other: only now can this be seen."""
    task = bench.task
    for lane in bench.lanes[1:] if task.block == "ours" else []:
        await bench.freezer.only(*lane.names)
        for engine in lane.engines * 2:
            await _first_order_ms(bench, Alone(engine.http))
        first, second = await _first_order_ms(bench, lane.route), await _first_order_ms(bench, lane.route)
        bench.results.first_orders.append(
            FirstOrder(
                model=task.model,
                transport=task.transport,
                turn=task.turn,
                arm=lane.arm,
                first_ms=first,
                second_ms=second,
            )
        )
        bench.say(f"{lane.arm}: first order {first:.0f} ms, second {second:.0f} ms")


async def _first_order_ms(bench: Bench, route: Route) -> float:
    await asyncio.sleep(SETTLE_S)
    return await bench.client.ttft_ms(route, bench.prompts.next(FIRST_ORDER_PROMPT))


async def _warm_up(bench: Bench) -> None:
    """Each arm has seen its longest prompt, and its most requests at once; the longest touches most of the cache."""
    loads = {load for loads in bench.task.loads for load in loads}
    longest = {load.at_once: load for load in sorted(loads, key=lambda load: load.tokens)}
    for lane in bench.lanes:
        await bench.freezer.only(*lane.names)
        for load in longest.values():
            await bench.client.mean_ttft_ms(lane.route, _prompts(bench, load))


async def _check(bench: Bench, lane: Lane) -> None:
    """The same prompt by the arm, then by one engine alone."""
    prompt = bench.prompts.next(GATE_PROMPT)
    answers = []
    for each in (lane, bench.lanes[0]):
        await bench.freezer.only(*each.names)
        answers.append(await bench.client.tokens(each.route, prompt, GATE_TOKENS))
    alike = next((i for i, (a, b) in enumerate(zip(*answers, strict=True)) if a != b), GATE_TOKENS)
    task = bench.task
    bench.results.agreements.append(
        Agreement(
            model=task.model,
            transport=task.transport,
            block=task.block,
            turn=task.turn,
            arm=lane.arm,
            alike=alike,
            of=GATE_TOKENS,
        )
    )
    bench.say(f"{lane.arm}: the first {alike} of {GATE_TOKENS} tokens are those of one engine alone")


async def _round(bench: Bench, number: int, load: Load) -> None:
    """Every arm once, one after the other; each round begins with another one."""
    task, heard = bench.task, []
    first = (task.turn + number) % len(bench.lanes)
    for lane in (*bench.lanes[first:], *bench.lanes[:first]):
        await bench.freezer.only(*lane.names)
        before = await _counted(bench, lane)
        ttft_ms = await bench.client.mean_ttft_ms(lane.route, _prompts(bench, load))
        await asyncio.sleep(SETTLE_S)
        after = await _counted(bench, lane)
        read, early = (None if a is None or b is None else b - a for a, b in zip(before, after, strict=True))
        bench.results.ttft.append(
            Ttft(
                model=task.model,
                transport=task.transport,
                block=task.block,
                turn=task.turn,
                round=number,
                load=str(load),
                arm=lane.arm,
                ttft_ms=ttft_ms,
                kv_bytes=read,
                kv_early=early,
            )
        )
        heard.append(f"{lane.arm} {ttft_ms:.0f} ms")
    bench.say(f"round {number + 1} of {task.rounds}, {load}: {', '.join(heard)}")


def _prompts(bench: Bench, load: Load) -> list[list[int]]:
    return [bench.prompts.next(load.tokens) for _ in range(load.at_once)]


async def _counted(bench: Bench, lane: Lane) -> tuple[int | None, int | None]:
    """Bytes read, and bytes that came before prefill ended; None for what the destination does not count."""
    metrics = await bench.client.text(f"{lane.engines[-1].http}/metrics")
    return counter(metrics, BYTES_READ), counter(metrics, BYTES_EARLY)


def counter(metrics: str, name: str) -> int | None:
    """The sum over all label sets of one counter in Prometheus' text format, or None if it is not there."""
    values = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", metrics, flags=re.M)
    return sum(int(float(value)) for value in values) if values else None
