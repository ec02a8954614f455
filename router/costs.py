"""What a placement costs, in predicted milliseconds: terms as small functions over columns of all candidates. Pure.

What the milliseconds are of: the latency that the placement adds to all requests, the one at hand and those it slows
down. So terms add up, and none needs a weight. `plans_cpu` compiles them for single engines, so they are made of
arithmetic, comparisons, `np.minimum` and `np.maximum` alone.
"""

from typing import Final

import numpy as np

from vllm_llmd.kernels.memory_cpu import usable_in_kernels
from vllm_llmd.router.candidates import Column, Loads, Milliseconds, RateColumns, Roster

CHUNK_TOKENS: Final = 2048
"""What vLLM computes of a prompt in one step at most, unless told otherwise: the last chunk's KV travels after it."""

MOST_REUSE: Final = 0.9
"""However much is wanted again, what is pushed out pushes out no more than nine times as much."""


@usable_in_kernels
def queue_ms(loads: Loads, rates: RateColumns) -> Milliseconds:
    """Until a request that comes now is being computed: the prompts before it, the step under way, others that wait."""
    return join_ms(loads, rates) + rates.token_ms * loads.tokens + rates.waiting_ms * loads.waiting


@usable_in_kernels
def join_ms(loads: Loads, rates: RateColumns) -> Milliseconds:
    """Until a request of which nothing is left to compute gets its first token."""
    found: Milliseconds = rates.base_ms + rates.running_ms * loads.batch
    return found


@usable_in_kernels
def next_step_ms(queue: Milliseconds, join: Milliseconds, loads: Loads) -> Milliseconds:
    """Until the engine's next step, which takes in whoever computes next to nothing: at most the whole queue."""
    found: Milliseconds = np.minimum(queue, join + loads.step_ms)
    return found


@usable_in_kernels
def ready_ms(queue: Milliseconds, next_step: Milliseconds, coming_prefill: Milliseconds) -> Milliseconds:
    """Until an engine can give away what it holds: with its next step, but for what it is computing for others."""
    found: Milliseconds = np.minimum(queue, next_step + coming_prefill)
    return found


@usable_in_kernels
def prefill_ms(tokens: Column, cached_tokens: Column, token_ms: Column, context_ms: Column) -> Milliseconds:
    """Computing `tokens` of a prompt after `cached_tokens` that need not be, at these rates."""
    context = (cached_tokens + tokens / 2) / 1000
    found: Milliseconds = tokens * (token_ms + context_ms * context)
    return found


@usable_in_kernels
def reload_ms(offloaded_tokens: Column, rates: RateColumns) -> Milliseconds:
    """Bringing back what is cached, but not on the GPU."""
    found: Milliseconds = rates.reload_token_ms * offloaded_tokens
    return found


@usable_in_kernels
def transfer_ms(tokens: Column, source_prefill_ms: Column, latency_ms: Column, token_ms: Column) -> Milliseconds:
    """What is left of a transfer once the source has computed: its last chunk, and what was too slow until then."""
    tail_ms = np.minimum(tokens, CHUNK_TOKENS) * token_ms
    found: Milliseconds = latency_ms + np.maximum(tail_ms, tokens * token_ms - source_prefill_ms)
    return found


@usable_in_kernels
def decode_ms(output_tokens: float, loads: Loads, rates: RateColumns) -> Milliseconds:
    """All tokens of the answer after its first, beside those that run already."""
    found: Milliseconds = output_tokens * (rates.step_ms + rates.step_running_ms * loads.batch)
    return found


@usable_in_kernels
def prefill_interference_ms(own_prefill_ms: Milliseconds, batch: Column) -> Milliseconds:
    """What computing the prompt takes from those that decode there: all of them stand still for so long."""
    found: Milliseconds = own_prefill_ms * batch
    return found


@usable_in_kernels
def congestion_ms(own_prefill_ms: Milliseconds, ahead: Column, ahead_on_average: float) -> Milliseconds:
    """What computing the prompt takes from those that will come while the queue that it joins lasts.

    `ahead` requests are before it, `ahead_on_average` at all who compute. In a queue of one server, random arrivals and
    random work (M/M/1) the latter is utilization over what is left of it: as many arrive, for each that is ahead, until
    the queue is empty.
    """
    found: Milliseconds = own_prefill_ms * ahead * ahead_on_average
    return found


@usable_in_kernels
def decode_interference_ms(output_tokens: float, loads: Loads, rates: RateColumns) -> Milliseconds:
    """What one more sequence takes from those that decode there, step by step."""
    found: Milliseconds = output_tokens * rates.step_running_ms * loads.batch
    return found


@usable_in_kernels
def memory_ms(new_tokens: Column, reuse: float, rates: RateColumns) -> Milliseconds:
    """Blocks that the request pushes out of a cache, at what it costs to compute those that are wanted again.

    `reuse` is the share of evicted blocks that are. To compute those anew pushes others out, and so on. A cache that
    has room is full sooner or later, so new blocks cost the same there: what others hold is best not held twice.
    """
    pushed_out = reuse / (1.0 - min(reuse, MOST_REUSE))
    found: Milliseconds = new_tokens * pushed_out * rates.token_ms
    return found


@usable_in_kernels
def full_ms(new_tokens: Column, loads: Loads, roster: Roster, answer_ms: Milliseconds) -> Milliseconds:
    """Waiting for blocks that others have to give back first, as all do within an answer, which takes `answer_ms`.

    Requests that came before and have no blocks yet are served first.
    """
    used = np.maximum(roster.num_blocks - loads.free_blocks, 1)
    missing = np.maximum((new_tokens + loads.unplaced) / roster.block_sizes - loads.free_blocks, 0)
    found: Milliseconds = (loads.batch > 0) * (answer_ms * missing / used)
    return found
