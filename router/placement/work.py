"""How long those who have a part in a plan compute, whoever it is for: what they are due by. Pure."""

from typing import NamedTuple

import numpy as np

from vllm_llmd.router import costs
from vllm_llmd.router.placement.plans import ALONE, PREFILLED, Asked, Plan


class Work(NamedTuple):
    """How long it takes to compute what each has to compute of a prompt, itself or for others before; in ms."""

    destination: float
    source: float | None


def work_ms(asked: Asked, plan: Plan, held: int) -> Work:
    """Where a source gives what it has, that is `held` tokens. Who waits for KV computes next to nothing."""
    prompt = max(asked.facts.prompt_tokens, 1)
    if plan.kind == ALONE:
        return Work(_computing_ms(asked, plan.destination, 0, prompt), None)
    if plan.kind == PREFILLED:
        return Work(0.0, _computing_ms(asked, plan.source, 0, prompt))
    return Work(_computing_ms(asked, plan.destination, held, prompt), _computing_ms(asked, plan.source, 0, held))


def _computing_ms(asked: Asked, place: int, first: int, end: int) -> float:
    """Tokens from `first` to `end` that are not there yet, though they may be on their way."""
    of, rates = asked.candidates, asked.candidates.rates.rows[place]
    coming = 0 if of.coming_blocks is None else int(of.coming_blocks[place])
    there = (int(of.prefix_blocks[place]) - coming) * int(of.roster.block_sizes[place])
    first = max(first, min(there, end - 1))
    tokens, cached_tokens = np.array([[end - first], [first]], np.float64)
    with np.errstate(all="ignore"):  # rates may be anything
        [found_ms] = costs.prefill_ms(tokens, cached_tokens, rates["token_ms"], rates["context_ms"]).tolist()
    return float(found_ms)
