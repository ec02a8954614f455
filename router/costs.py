"""What a placement costs, in predicted milliseconds, term by term. Pure.

The coefficients are priors for an engine of which nothing is known yet.
"""

from typing import Final

from vllm_llmd.router.candidates import Counts, Milliseconds

MS_PER_REQUEST: Final = 10.0
MS_PER_PREFILL_TOKEN: Final = 0.1


def queue_ms(requests: Counts, prefill_tokens: Counts) -> Milliseconds:
    """Waiting for what each candidate already has to do, including what it does not know of yet."""
    return requests * MS_PER_REQUEST + prefill_tokens * MS_PER_PREFILL_TOKEN


def prefill_ms(uncached_tokens: int) -> float:
    """Computing the part of the prompt that is not cached."""
    return uncached_tokens * MS_PER_PREFILL_TOKEN
