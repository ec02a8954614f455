"""How far the simulator is from the engines: the same workloads through `vllm_llmd.simulate`, at their speeds. Pure."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

from routing_arms import OURS
from routing_crowd import Crowd, Warmed
from routing_engines import STEP_TOKENS
from routing_fit import TRANSFER_GB_PER_S, Fitted, fitted
from routing_plan import BLOCK_TOKENS, CACHE_BLOCKS, WARM_UP_REQUESTS, WORKLOADS, warm_up
from routing_report import figures
from routing_values import Asked, Cell, Results

from vllm_llmd.router.settings import RouterSettings
from vllm_llmd.sim.settings import SimSettings
from vllm_llmd.sim.speeds import Speeds
from vllm_llmd.simulate import main as simulate
from vllm_llmd.simulate.settings import SimulateSettings

POLICY_OF: Final = {
    "rr": "round_robin",
    "vllm-rr": "round_robin",
    "approx": "approximate_prefix",
    OURS: RouterSettings().policy,
}
"""The policies of arms that the simulator has; vLLM's round robin does what ours does."""

BYTES_OF: Final = {"bfloat16": 2, "float32": 4}
WITHIN: Final = 0.2

GAMES: Final = 5
"""How often a cell is played. Of requests that are sent at once, chance decides which engine gets which."""

TYPICAL: Final = Fitted(
    Speeds(
        step_ms=20.0,
        prefill_us_per_token=230.0,
        prefill_us_per_token_per_1k_context=50.0,
        decode_us_per_sequence=1000.0,
        decode_us_per_1k_context=500.0,
        kv_bytes_per_token=23_040,
        transfer_gb_per_s=TRANSFER_GB_PER_S,
    ),
    overhead_ms=15.0,
)
TYPICAL_UNIT_MS: Final = 300.0
"""About what SmolLM2 takes on one core of a server of today."""


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
    return fitted(results.probes, STEP_TOKENS, kv_bytes(Path(results.settings.model), results.settings.dtype))


def checked(results: Results, fit: Fitted) -> list[Checked]:
    """Every arm that the simulator knows, on every workload that was measured."""
    simulate.compile_ahead()
    found = []
    for workload in results.settings.workloads:
        for arm in results.settings.arms:
            cells = [cell for cell in results.cells if (cell.workload, cell.arm) == (workload, arm)]
            if cells and arm in POLICY_OF:
                measured = median(each.ttft_mean_ms for each in figures(results, workload, arm))
                expected = median(mean_ttft_ms(results, fit, workload, arm, cell.repetition) for cell in cells)
                found.append(Checked(workload, arm, measured, expected))
    return found


def mean_ttft_ms(results: Results, fit: Fitted, workload: str, arm: str, repetition: int) -> float:
    """What the simulator says of one cell, on average over some games of chance."""
    cells = [predicted_cell(results, fit, (repetition, workload, arm), game) for game in range(GAMES)]
    return fmean(each.ttft_ms for cell in cells for each in cell.asked)


def predicted_cell(results: Results, fit: Fitted, key: tuple[int, str, str], game: int = 0) -> Cell:
    """A cell as the simulator has it; only times and tokens of its requests mean anything."""
    repetition, workload, arm = key
    settings, unit_ms = results.settings, results.unit_ms or 0.0
    warming = warm_up(WARM_UP_REQUESTS)
    asked = WORKLOADS[workload](settings.seed + repetition, settings.scale)
    chance = random.Random(f"{key} {game}")
    users = Crowd(asked, unit_ms, fit.overhead_ms, chance)
    crowd = Warmed(Crowd(warming, unit_ms, fit.overhead_ms, chance), warming.requests, users)
    played = simulate.played(POLICY_OF[arm], simulated(results, fit), crowd.first(), crowd.follow)
    outcomes = played.outcomes[warming.requests :]
    began_ms = outcomes[0].at_ms
    return Cell(
        repetition=repetition,
        workload=workload,
        arm=arm,
        lasted_ms=max(each.last_ms or 0.0 for each in outcomes) - began_ms + fit.overhead_ms,
        asked=[
            Asked(
                number,
                0,
                sent_ms=each.at_ms - began_ms,
                ttft_ms=(each.ttft_ms or 0.0) + fit.overhead_ms,
                tpot_ms=each.tpot_ms or 0.0,
                prompt_tokens=each.prompt_tokens,
                cached_tokens=max(each.prompt_tokens - each.computed_tokens, 0),
                output_tokens=each.output_tokens,
            )
            for number, each in enumerate(outcomes)
        ],
        split=[engine.requests for engine in played.engines],
    )


def predicted(results: Results) -> Results:
    """Every cell that the simulator can play, with the speeds of probes, or typical ones where there are none."""
    simulate.compile_ahead()
    settings = results.settings
    fit = fit_of(results) if results.probes else TYPICAL
    played = Results(settings=settings, unit_ms=results.unit_ms or TYPICAL_UNIT_MS)
    played.cells = [
        predicted_cell(played, fit, (repetition, workload, arm))
        for workload in settings.workloads
        for arm in settings.arms
        if arm in POLICY_OF
        for repetition in range(settings.repetitions)
    ]
    return played


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
        request_ms=speeds.request_ms,
        kv_bytes=speeds.kv_bytes_per_token,
        transfer_gbps=speeds.transfer_gb_per_s,
    )
    return SimulateSettings(synthetic=1, engines=results.settings.engines, model=model)


def kv_bytes(model: Path, dtype: str) -> int:
    """Per token, of a model directory."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * BYTES_OF[dtype])


def table(found: Sequence[Checked], fit: Fitted) -> str:
    """A line per workload and arm, and what the engines' speeds were taken to be."""
    speeds = fit.speeds
    told = (
        f"\nthe simulator, with step {speeds.step_ms:.1f} ms, prompt token {speeds.prefill_us_per_token:.0f} us "
        f"(+{speeds.prefill_us_per_token_per_1k_context:.0f} per 1,000 before it), sequence "
        f"{speeds.decode_us_per_sequence:.0f} us (+{speeds.decode_us_per_1k_context:.0f} per 1,000 tokens), "
        f"request {speeds.request_ms:.0f} ms of its engine and {fit.overhead_ms:.0f} ms beside it "
        f"(half of the probes within {fit.off_by:.1%} of this); mean TTFT in ms"
    )
    lines = [
        f"{each.workload:12s} {each.arm:11s} {each.measured_ms:9.0f} {each.predicted_ms:9.0f} {each.ratio:6.2f}"
        for each in found
    ]
    near = sum(each.close for each in found)
    head = f"{'':24s} {'measured':>9s} {'predicted':>9s} {'ratio':>6s}"
    return "\n".join([told, head, *lines, f"{near} of {len(found)} within {WITHIN:.0%}"])
