"""From probes to the speeds that the simulator takes. Pure.

Times are linear in what is computed, as the simulator has it, with coefficients that are not negative, chosen for the
least squares of relative errors.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from routing_values import Probe

from vllm_llmd.errors import LlmdError
from vllm_llmd.sim.speeds import Speeds

Floats = npt.NDArray[np.float64]

TRANSFER_GB_PER_S: Final = 1.0
"""From engine to engine through shared memory, beside two busy cores: assumed, not measured."""

LEAST_STEP_MS: Final = 0.1


@dataclass(frozen=True)
class Fitted:
    """`overhead_ms` is what a request takes beside an engine's steps: HTTP, the chat template, tokenizing."""

    speeds: Speeds
    overhead_ms: float


def fitted(probes: Sequence[Probe], step_tokens: int, kv_bytes_per_token: int) -> Fitted:
    """Steps of decoding first; then what prefills take beyond the steps they are cut into. Raises LlmdError."""
    decodes = [each for each in probes if each.tpot_ms is not None]
    prefills = [each for each in probes if each.tpot_ms is None]
    if len(decodes) < 3 or len(prefills) < 3:
        raise LlmdError("too few probes: measure again")
    batches = [float(each.at_once) for each in decodes]
    contexts = [each.at_once * each.prompt_tokens / 1000 for each in decodes]
    step_ms, sequence_ms, context_ms = least_squares(
        [[1.0] * len(decodes), batches, contexts], [each.tpot_ms or 0.0 for each in decodes]
    )
    step_ms = max(step_ms, LEAST_STEP_MS)
    computed = [each.prompt_tokens - each.cached_tokens for each in prefills]
    steps_ms = [step_ms * math.ceil(tokens / step_tokens) for tokens in computed]
    looked_back = [tokens * tokens / 2 / 1000 for tokens in computed]
    overhead_ms, token_ms, back_ms = least_squares(
        [[1.0] * len(prefills), list(map(float, computed)), looked_back],
        [each.ttft_ms - own_ms for each, own_ms in zip(prefills, steps_ms, strict=True)],
        [each.ttft_ms for each in prefills],
    )
    speeds = Speeds(
        step_ms=step_ms,
        prefill_us_per_token=token_ms * 1000,
        prefill_us_per_token_per_1k_context=back_ms * 1000,
        decode_us_per_sequence=sequence_ms * 1000,
        decode_us_per_1k_context=context_ms * 1000,
        kv_bytes_per_token=kv_bytes_per_token,
        transfer_gb_per_s=TRANSFER_GB_PER_S,
    )
    return Fitted(speeds, overhead_ms)


def least_squares(
    columns: Sequence[Sequence[float]], values: Sequence[float], scale: Sequence[float] | None = None
) -> list[float]:
    """The coefficients, none of them negative, with the least sum of squared errors in terms of `scale` (`values`).

    All choices of columns are tried: there are few.
    """
    weights = 1 / np.asarray(values if scale is None else scale)
    matrix: Floats = np.asarray(columns).T * weights[:, None]
    wanted: Floats = np.asarray(values) * weights
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
