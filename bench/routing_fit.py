"""From probes to the speeds that the simulator takes. Pure.

Times are linear in what steps hold, as the simulator has it, with coefficients that are not negative, chosen for the
least squares of relative errors.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from routing_steps import awaited
from routing_values import Probe

from vllm_llmd.errors import LlmdError
from vllm_llmd.sim.speeds import Speeds, Work

Floats = npt.NDArray[np.float64]

TRANSFER_GB_PER_S: Final = 1.0
"""From engine to engine through shared memory, beside two busy cores: assumed, not measured."""

LEAST_STEP_MS: Final = 0.1

MEASURED: Final[Mapping[str, float]] = {
    "step_ms": 1.0,
    "prefill_us_per_token": 1000.0,
    "prefill_us_per_token_per_1k_context": 1000.0,
    "decode_us_per_sequence": 1000.0,
    "decode_us_per_1k_context": 1000.0,
    "request_ms": 1.0,
}
"""Speeds in the order of `_held`, and how many of their units are a millisecond."""


@dataclass(frozen=True)
class Fitted:
    """`overhead_ms` is what a request takes beside what it takes of an engine: the router, connections, the client.

    `off_by` is how far the times of probes are from what these speeds say of them: the median of relative errors.
    """

    speeds: Speeds
    overhead_ms: float
    off_by: float = 0.0


def fitted(probes: Sequence[Probe], step_tokens: int, kv_bytes_per_token: int) -> Fitted:
    """Raises LlmdError if there are too few probes to tell all speeds apart."""
    rows: list[Floats] = []
    times_ms: list[float] = []
    for probe in probes:
        steps = awaited(probe, step_tokens)
        rows.append(np.append(np.mean([_held(each.to_first) for each in steps], axis=0), 1.0))
        times_ms.append(probe.ttft_ms)
        if probe.rest_ms > 0:
            rows.append(np.append(np.mean([_held(each.to_last) for each in steps], axis=0), 0.0))
            times_ms.append(probe.rest_ms)
    if len(rows) <= len(MEASURED):
        raise LlmdError("too few probes: measure again")
    found = least_squares(np.asarray(rows).T, times_ms)
    own = {name: ms * units for ms, (name, units) in zip(found, MEASURED.items(), strict=False)}
    own["step_ms"] = max(own["step_ms"], LEAST_STEP_MS)
    speeds = Speeds(**own, kv_bytes_per_token=kv_bytes_per_token, transfer_gb_per_s=TRANSFER_GB_PER_S)
    errors = np.abs(np.asarray(rows) @ np.asarray(found) / np.asarray(times_ms) - 1)
    return Fitted(speeds, found[-1], float(np.median(errors)))


def _held(steps: Sequence[Work]) -> list[float]:
    """What these steps hold, in the units of speeds: how many they are, thousands of tokens looked back at."""
    return [
        float(len(steps)),
        float(sum(step.prefill_tokens for step in steps)),
        sum(step.prefill_token_contexts for step in steps) / 1000,
        float(sum(step.decoding for step in steps)),
        sum(step.decode_context for step in steps) / 1000,
        float(sum(step.requests for step in steps)),
    ]


def least_squares(columns: Sequence[Sequence[float]] | Floats, values: Sequence[float]) -> list[float]:
    """The coefficients, none of them negative, with the least sum of squared relative errors.

    All choices of columns are tried: there are few.
    """
    weights = 1 / np.asarray(values)
    matrix: Floats = np.asarray(columns).T * weights[:, None]
    wanted: Floats = np.ones(len(values))
    best, least = [0.0] * len(columns), float(wanted @ wanted)
    for count in range(1, len(columns) + 1):
        for chosen in itertools.combinations(range(len(columns)), count):
            found = np.linalg.lstsq(matrix[:, chosen], wanted, rcond=None)[0]
            error = float(np.sum((matrix[:, chosen] @ found - wanted) ** 2))
            if (found >= 0).all() and error < least:
                least, best = error, [0.0] * len(columns)
                for place, value in zip(chosen, found, strict=True):
                    best[place] = float(value)
    return best
