"""How likely a request is to miss its objectives, from what is expected and from how far that has been off. Pure.

`plans_cpu` compiles it for single engines, as it does the terms in `costs`.
"""

import math
from typing import Any, Final, NamedTuple

import numpy as np

from vllm_llmd.kernels.memory_cpu import usable_in_kernels
from vllm_llmd.router.candidates import Candidates, Column, Milliseconds
from vllm_llmd.router.request import Facts

LEAST_MS: Final = 1.0
"""No objective is shorter, and what is no number is none longer."""

LEAST_ERROR: Final = 1e-3
"""Of logarithms: however good predictions are, they are a thousandth off."""


class Objectives(NamedTuple):
    """The first token should come within `ttft_ms`, the others `answer_ms` after that; infinite where nobody minds.

    `ttft_error` and `answer_error` are by how much the logarithms of either time are off, on average.
    """

    ttft_ms: float
    answer_ms: float
    ttft_error: float
    answer_error: float


NONE: Final = Objectives(math.inf, math.inf, 1.0, 1.0)


def objectives(facts: Facts, candidates: Candidates, output_tokens: float) -> Objectives:
    """Those of a request. An answer of one token has no time per token to keep."""
    if facts.ttft_ms is None and facts.tpot_ms is None:
        return NONE
    ttft_ms = math.inf if facts.ttft_ms is None else max(LEAST_MS, facts.ttft_ms)
    answer_ms = math.inf
    if facts.tpot_ms is not None and facts.output_tokens != 1:
        answer_ms = max(LEAST_MS, facts.tpot_ms * output_tokens)
    return Objectives(ttft_ms, answer_ms, _error(candidates.doubt), _error(candidates.step_doubt))


def _error(doubt: float) -> float:
    """What is no number says nothing: all is as likely to be late as not."""
    return max(LEAST_ERROR, math.log(doubt)) if doubt >= 1 else math.inf


@usable_in_kernels
def late(expected_ms: Milliseconds, objective_ms: float, error: float) -> Column:
    """How likely it is that what is expected to take so long takes longer than it may.

    Of all distributions of logarithms with this mean error, Laplace's presumes the least (it has the most entropy).
    This is its tail: a half where both times are equal, and less by a power of their ratio.
    """
    over = np.maximum(expected_ms, 0.0) / objective_ms
    tail = (np.minimum(over, 1.0) / np.maximum(over, 1.0)) ** (1 / error) / 2
    found: Column = tail + (over > 1.0) * (1.0 - 2 * tail)
    return found


@usable_in_kernels
def missed(of: Any, first_ms: Milliseconds, answer_ms: Milliseconds) -> Column:
    """How likely a plan is to miss one of the objectives, those in `of`; it rises with what it is expected to take."""
    kept = 1.0 + 0.0 * first_ms
    if of.ttft_ms < np.inf:
        kept = kept * (1.0 - late(first_ms, of.ttft_ms, of.ttft_error))
    if of.answer_ms < np.inf:
        kept = kept * (1.0 - late(answer_ms, of.answer_ms, of.answer_error))
    found: Column = 1.0 - kept
    return found
