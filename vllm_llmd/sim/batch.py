"""What a step of a simulated engine computes: so many tokens of each of some requests. Pure."""

from collections.abc import Sequence

from vllm_llmd.sim.block_pool import BlockId
from vllm_llmd.sim.requests import SimRequest
from vllm_llmd.sim.speeds import Work

Batch = Sequence[tuple[SimRequest, int]]


def work_of(batch: Batch) -> Work:
    """What decides how long the step takes."""
    work = Work()
    for request, tokens in batch:
        if tokens == 1 and request.made:
            work.decode(request.computed)
        else:
            work.prefill(request.computed, tokens)
    return work


def uncomputed(request: SimRequest, batch: Batch) -> int:
    """How many tokens of its prompt will still not be computed when the step has ended."""
    in_step = sum(tokens for each, tokens in batch if each is request)
    return max(request.prompt_tokens - request.computed - in_step, 0)


def there(request: SimRequest, batch: Batch, block_size: int) -> int:
    """How many of its tokens are computed before the step has ended.

    Blocks are found in the cache as soon as a step is to compute them: some that it found may be of this very step.
    """
    written = set[BlockId]()
    for each, tokens in batch:
        if each is not request:
            written.update(each.blocks[each.computed // block_size : -(-(each.computed + tokens) // block_size)])
    found = request.computed // block_size
    return next((at for at, block in enumerate(request.blocks[:found]) if block in written), found) * block_size
