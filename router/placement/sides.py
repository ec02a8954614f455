"""What every engine brings into a plan for one request: for columns of engines, and compiled for one. Pure."""

from typing import Final, NamedTuple

import numpy as np

from vllm_llmd.kernels.memory_cpu import usable_in_kernels
from vllm_llmd.router import costs
from vllm_llmd.router.candidates import Column, Loads, Milliseconds, RateColumns, Roster


class Ask(NamedTuple):
    """What of a request its prices depend on, and of traffic as a whole; in tokens, but for the share `reuse`.

    Whoever is to supply KV supplies `least` at least. `crowd` requests do not answer yet, averaged over who computes.
    By the factor `doubt` predictions are off. The last four are `misses.Objectives`.
    """

    prompt: float
    output: float
    reuse: float
    least: float
    crowd: float
    doubt: float
    ttft_ms: float
    answer_ms: float
    ttft_error: float
    answer_error: float


class Party(NamedTuple):
    """What one engine, or each of all, brings into a plan.

    Of the prompt it has `cached` tokens and lacks `own`; `held` it could give away after `ready_ms`, and so many are
    `given`. `spared` is 1 for who is not to compute what it lacks, since others are there for that. Its next step is
    `next_ms` away. There, `decoding` requests decode and `ahead` others are to be computed. `source_memory_ms` is for
    prefilling only, `more_ms` the terms of others and `chance_ms` what makes equals differ.
    """

    own: Column
    cached: Column
    held: Column
    given: Column
    spared: Column
    decoding: Column
    ahead: Column
    queue_ms: Milliseconds
    join_ms: Milliseconds
    next_ms: Milliseconds
    ready_ms: Milliseconds
    prefill_ms: Milliseconds
    reload_ms: Milliseconds
    cold_ms: Milliseconds
    decode_ms: Milliseconds
    decode_interference_ms: Milliseconds
    memory_ms: Milliseconds
    source_memory_ms: Milliseconds
    blocks_ms: Milliseconds
    transfer_ms: Milliseconds
    transfer_token_ms: Milliseconds
    token_ms: Milliseconds
    context_ms: Milliseconds
    more_ms: Milliseconds
    chance_ms: Milliseconds


MORE_IS_CHEAPER: Final = tuple(Party._fields.index(name) for name in ("cached", "held"))
"""Of these, more makes no pair dearer; of all other fields, less."""

MAY_BE_NEGATIVE: Final = Party._fields.index("more_ms")
"""The first field for which this holds whatever its sign is. Of those before it, it does where none is negative."""


@usable_in_kernels
def party(
    ask: Ask,
    roster: Roster,
    loads: Loads,
    rates: RateColumns,
    prefix_blocks: Column,
    offloaded_blocks: Column,
    coming_blocks: Column,
) -> Party:
    """Without `more_ms` and `chance_ms`."""
    sizes = roster.block_sizes
    cached = np.minimum(prefix_blocks * sizes, ask.prompt - 1)
    own = ask.prompt - cached
    fetchable = prefix_blocks - offloaded_blocks - coming_blocks * (offloaded_blocks > 0)  # up to the first that is not
    held = np.minimum(fetchable, np.floor((ask.prompt - 1) / sizes)) * sizes
    coming = coming_blocks * sizes
    coming_ms = costs.prefill_ms(coming, np.maximum(held - coming, 0.0), rates.token_ms, rates.context_ms)
    queue_ms, join_ms = costs.queue_ms(loads, rates), costs.join_ms(loads, rates)
    next_ms = costs.next_step_ms(queue_ms, join_ms, loads)
    new_tokens = own + ask.output
    decode_ms = costs.decode_ms(ask.output, loads, rates)
    decoding, ahead = loads.decoding * roster.decodes, np.maximum(loads.requests - loads.decoding, 0.0)
    return Party(
        own=own,
        cached=cached,
        held=held,
        given=held,
        spared=roster.helped * (own >= ask.least),
        decoding=decoding,
        ahead=ahead,
        queue_ms=queue_ms,
        join_ms=join_ms,
        next_ms=next_ms,
        ready_ms=costs.ready_ms(queue_ms, next_ms, coming_ms),
        prefill_ms=costs.prefill_ms(own, cached, rates.token_ms, rates.context_ms),
        reload_ms=costs.reload_ms(offloaded_blocks * sizes, rates),
        cold_ms=rates.cold_ms,
        decode_ms=decode_ms,
        decode_interference_ms=costs.decode_interference_ms(ask.output, loads, rates),
        memory_ms=costs.memory_ms(new_tokens, ask.reuse, rates),
        source_memory_ms=costs.memory_ms(own, ask.reuse, rates),
        blocks_ms=costs.full_ms(new_tokens, loads, roster, decode_ms),
        transfer_ms=rates.transfer_ms,
        transfer_token_ms=rates.transfer_token_ms,
        token_ms=rates.token_ms,
        context_ms=rates.context_ms,
        more_ms=0.0 * own,
        chance_ms=0.0 * own,
    )
