"""What a placement costs, in predicted milliseconds, term by term. Pure.

The coefficients are priors for an engine of which nothing is known yet.
"""

from typing import Final

from vllm_llmd.wire import Load

MS_PER_REQUEST: Final = 10.0
MS_PER_PREFILL_TOKEN: Final = 0.1


def queue_ms(load: Load, placed_requests: int, placed_tokens: int) -> float:
    """Waiting for what an engine already has to do, including what it does not know of yet."""
    requests = load.running + load.waiting + load.waiting_for_kv + placed_requests
    return requests * MS_PER_REQUEST + (load.prefill_tokens + placed_tokens) * MS_PER_PREFILL_TOKEN


def prefill_ms(uncached_tokens: int) -> float:
    """Computing the part of the prompt that is not cached."""
    return uncached_tokens * MS_PER_PREFILL_TOKEN
