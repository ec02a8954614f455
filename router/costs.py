"""What a placement costs, in predicted milliseconds, term by term. Pure.

The coefficients are priors for an engine of which nothing is known yet.
"""

from typing import Final

from vllm_llmd.router.candidates import Column, Milliseconds

MS_PER_REQUEST: Final = 10.0
MS_PER_PREFILL_TOKEN: Final = 0.1


def queue_ms(requests: Column, prefill_tokens: Column) -> Milliseconds:
    """Waiting for what each candidate already has to do, including what it does not know of yet."""
    return requests * MS_PER_REQUEST + prefill_tokens * MS_PER_PREFILL_TOKEN
