"""How far the simulator is from the engines: the same workloads through `vllm_llmd.simulate`, with fitted speeds. Pure.

Users in the simulation do as in the benchmark: a client of a closed loop asks anew as soon as it is answered, and a
chat's next turn follows the answer. Prompts are token ids that are equal where the words are.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

import numpy as np
from routing_arms import OURS
from routing_engines import STEP_TOKENS
from routing_fit import Fitted, fitted
from routing_plan import BLOCK_TOKENS, CACHE_BLOCKS, WARM_UP_REQUESTS, WORKLOADS, Conversation, Workload, warm_up
from routing_values import Results
from routing_words import WORDS

from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.sim.settings import SimSettings
from vllm_llmd.simulate import main as simulate
from vllm_llmd.simulate.settings import SimulateSettings
from vllm_llmd.simulate.trace import IDS, Tokens, TraceRequest

POLICY_OF: Final = {
    "rr": "round_robin",
    "vllm-rr": "round_robin",
    "approx": "approximate_prefix",
    OURS: RouterSettings().policy,
}
"""The policies of arms that the simulator has; vLLM's round robin does what ours does."""

WITHIN: Final = 0.2
QUIET_MS: Final = 1000.0
"""Between the requests that warm up and the others."""

_IDS: Final = {word: number for number, word in enumerate(WORDS, start=1)}
_HEAD: Final = (1001, 1002, 1003)
_TAIL: Final = (1004, 1005)
"""A chat template has three tokens before what somebody says, and two after."""


@dataclass(frozen=True, slots=True)
class Spoken(TraceRequest):
    """A request whose prompt and answer are known word by word."""

    said: tuple[int, ...] = ()
    told: tuple[int, ...] = ()

    def prompt(self) -> Tokens:
        return np.asarray(self.said, np.uint32)

    def answer(self, number: int) -> Tokens:
        return np.asarray(self.told, np.uint32)


class Crowd:
    """The users of a workload, in the simulation's time. A request reaches its engine `overhead_ms` later."""

    def __init__(self, workload: Workload, unit_ms: float, overhead_ms: float) -> None:
        self._workload, self._unit_ms, self._overhead_ms = workload, unit_ms, overhead_ms
        self._asked: list[tuple[int, int]] = []
        self._next = iter(range(len(workload.conversations)))

    def first(self, now_ms: float = 0.0) -> list[TraceRequest]:
        """Who asks whatever is answered, in order of time."""
        count = self._workload.clients or len(self._workload.conversations)
        numbers = [number for _, number in zip(range(count), self._next, strict=False)]
        times = [0.0 if self._workload.clients else self._of(number).at for number in numbers]
        return [self._ask(number, 0, now_ms + at * self._unit_ms) for number, at in zip(numbers, times, strict=True)]

    def follow(self, number: int, now_ms: float) -> Sequence[TraceRequest]:
        """What the same user asks after the answer to the request of that number."""
        conversation, turn = self._asked[number]
        turns = self._of(conversation).turns
        if turn + 1 < len(turns):
            return (self._ask(conversation, turn + 1, now_ms + turns[turn + 1].pause * self._unit_ms),)
        following = next(self._next, None) if self._workload.clients else None
        return () if following is None else (self._ask(following, 0, now_ms),)

    def _of(self, number: int) -> Conversation:
        return self._workload.conversations[number]

    def _ask(self, number: int, turn: int, sent_ms: float) -> TraceRequest:
        self._asked.append((number, turn))
        said, told = tuple(_prompt(self._of(number), number, turn)), tuple(_answer(self._of(number), number, turn))
        return Spoken(sent_ms + self._overhead_ms, len(said), len(told), (), len(told), said, told)


class Warmed:
    """A crowd after another one, whose requests come first and are not counted."""

    def __init__(self, warming: Crowd, count: int, crowd: Crowd) -> None:
        self._warming, self._count, self._crowd = warming, count, crowd
        self._left = count

    def first(self) -> list[TraceRequest]:
        return self._warming.first()

    def follow(self, number: int, now_ms: float) -> Sequence[TraceRequest]:
        """As a crowd's: the second one begins when the first has all its answers."""
        if number >= self._count:
            return self._crowd.follow(number - self._count, now_ms)
        self._left -= 1
        return self._warming.follow(number, now_ms) if self._left else self._crowd.first(now_ms + QUIET_MS)


def _prompt(conversation: Conversation, number: int, turn: int) -> Iterator[int]:
    """Token ids of all that has been said up to this turn, and of the beginning of the answer."""
    yield from _message(_ids(conversation.system))
    for place, each in enumerate(conversation.turns[: turn + 1]):
        yield from _message(_ids(each.text))
        if place < turn:
            yield from _message(_answer(conversation, number, place))
    yield from _HEAD


def _message(ids: Sequence[int]) -> tuple[int, ...]:
    return (*_HEAD, *ids, *_TAIL)


def _ids(text: str) -> list[int]:
    return [_IDS[word] for word in text.split()]


def _answer(conversation: Conversation, number: int, turn: int) -> Sequence[int]:
    """Token ids that no other answer has."""
    return [IDS + number * 100 + turn] * conversation.turns[turn].answer_tokens


@dataclass(frozen=True)
class Checked:
    """Mean TTFT of one arm on one workload: medians over repetitions, in ms."""

    workload: str
    arm: str
    measured_ms: float
    predicted_ms: float

    @property
    def ratio(self) -> float:
        return self.predicted_ms / self.measured_ms

    @property
    def close(self) -> bool:
        return abs(self.ratio - 1) <= WITHIN


def fit_of(results: Results) -> Fitted:
    """How fast the engines were. Raises LlmdError for want of probes."""
    return fitted(results.probes, STEP_TOKENS, kv_bytes(Path(results.settings.model)))


def checked(results: Results, fit: Fitted) -> list[Checked]:
    """Every arm that the simulator knows, on every workload that was measured."""
    simulate.compile_ahead()
    found = []
    for workload in results.settings.workloads:
        for arm in results.settings.arms:
            cells = [cell for cell in results.cells if (cell.workload, cell.arm) == (workload, arm)]
            if cells and arm in POLICY_OF:
                measured = median(fmean(each.ttft_ms for each in cell.asked) for cell in cells)
                predicted = median(mean_ttft_ms(results, fit, workload, arm, cell.repetition) for cell in cells)
                found.append(Checked(workload, arm, measured, predicted))
    return found


def mean_ttft_ms(results: Results, fit: Fitted, workload: str, arm: str, repetition: int) -> float:
    """What the simulator says of one cell."""
    settings, unit_ms = results.settings, results.unit_ms or 0.0
    warming = warm_up(WARM_UP_REQUESTS)
    asked = WORKLOADS[workload](settings.seed + repetition, settings.scale)
    crowd = Warmed(Crowd(warming, unit_ms, fit.overhead_ms), warming.requests, Crowd(asked, unit_ms, fit.overhead_ms))
    played = simulate.played(POLICY_OF[arm], simulated(results, fit), crowd.first(), crowd.follow)
    return fmean(each.ttft_ms or 0.0 for each in played.outcomes[warming.requests :]) + fit.overhead_ms


def simulated(results: Results, fit: Fitted) -> SimulateSettings:
    """The engines of the benchmark, as the simulator takes them."""
    speeds = fit.speeds
    model = SimSettings(
        block_size=BLOCK_TOKENS,
        blocks=CACHE_BLOCKS,
        token_budget=STEP_TOKENS,
        step_ms=speeds.step_ms,
        prefill_us=speeds.prefill_us_per_token,
        prefill_context_us=speeds.prefill_us_per_token_per_1k_context,
        decode_us=speeds.decode_us_per_sequence,
        decode_context_us=speeds.decode_us_per_1k_context,
        kv_bytes=speeds.kv_bytes_per_token,
        transfer_gbps=speeds.transfer_gb_per_s,
    )
    return SimulateSettings(synthetic=1, engines=results.settings.engines, model=model)


def kv_bytes(model: Path) -> int:
    """Per token, in float32, of a model directory."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * 4)


def table(found: Sequence[Checked], fit: Fitted) -> str:
    """A line per workload and arm, and what the engines' speeds were taken to be."""
    speeds = fit.speeds
    told = (
        f"\nthe simulator, with step {speeds.step_ms:.1f} ms, prompt token {speeds.prefill_us_per_token:.0f} us "
        f"(+{speeds.prefill_us_per_token_per_1k_context:.0f} per 1,000 before it), sequence "
        f"{speeds.decode_us_per_sequence:.0f} us (+{speeds.decode_us_per_1k_context:.0f} per 1,000 tokens), "
        f"overhead {fit.overhead_ms:.0f} ms; mean TTFT in ms"
    )
    lines = [
        f"{each.workload:12s} {each.arm:11s} {each.measured_ms:9.0f} {each.predicted_ms:9.0f} {each.ratio:6.2f}"
        for each in found
    ]
    near = sum(each.close for each in found)
    head = f"{'':24s} {'measured':>9s} {'predicted':>9s} {'ratio':>6s}"
    return "\n".join([told, head, *lines, f"{near} of {len(found)} within {WITHIN:.0%}"])
