"""The prefix index against NVIDIA Dynamo's, side by side in one process: block events in, matches out, hashes.

Both hold a million blocks of 64 engines, 16 tokens each. Arms take turns. Dynamo's `RadixTree` has a thread of its own:
events are counted as applied when a match asked for behind them has come.
"""

import json
import random
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
from dynamo._core import RadixTree, compute_block_hash_for_seq
from index_values import Arms, Found, Settings, in_turn, measure_call, seconds

from vllm_llmd.kernels import hash_chain_cpu, prefix_table_cpu
from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.names import EngineId
from vllm_llmd.router.index.prefixes import PrefixIndex

ENGINES = 64
BLOCK_SIZE = 16
CHAIN_BLOCKS = 512
CHAIN_TOKENS = CHAIN_BLOCKS * BLOCK_SIZE
NOBODY = np.empty(0, np.uint64)


class Ours:
    """Our index with engines known by number."""

    def __init__(self, max_blocks: int) -> None:
        self.index = PrefixIndex(max_blocks)
        self.engines = [EngineId(f"engine-{number}") for number in range(ENGINES)]

    def store(self, engine: int, names: Names) -> None:
        self.index.apply(self.engines[engine], NOBODY, names)


class Theirs:
    """Dynamo's tree, fed with its own events; a block's hash stands for its tokens' hash too."""

    def __init__(self) -> None:
        self.tree = RadixTree()
        self._events = 0

    def event(self, names: Sequence[int]) -> bytes:
        self._events += 1
        blocks = [{"block_hash": name, "tokens_hash": name} for name in names]
        stored = {"parent_hash": None, "blocks": blocks}
        return json.dumps({"event_id": self._events, "data": {"stored": stored}}).encode()


def chains(rng: np.random.Generator, count: int, blocks: int) -> Iterator[Names]:
    """Different chains of block names, below 2**63 so that both sides take them."""
    for _ in range(count):
        yield rng.integers(1, 2**63, blocks, np.uint64)


def fill(ours: Ours, theirs: Theirs, rng: np.random.Generator, resident: int) -> None:
    for number, chain in enumerate(chains(rng, resident // CHAIN_BLOCKS, CHAIN_BLOCKS)):
        ours.store(number % ENGINES, chain)
        theirs.tree.apply_event(number % ENGINES, theirs.event(chain.tolist()))
    theirs.tree.find_matches([1])


def measure_apply(arms: Arms, sides: tuple[Ours, Theirs], found: list[Names]) -> None:
    """One round: every chain of `found` is stored as one event, by either side in turn. Rates count blocks."""
    ours, theirs = sides
    events = [theirs.event(chain.tolist()) for chain in found]
    blocks = sum(map(len, found))

    def apply_ours() -> None:
        for number, chain in enumerate(found):
            ours.store(number % ENGINES, chain)

    def apply_theirs() -> None:
        for number, event in enumerate(events):
            theirs.tree.apply_event(number % ENGINES, event)
        theirs.tree.find_matches([1])

    for values, apply in in_turn((arms.ours, apply_ours), (arms.dynamo, apply_theirs)):
        values.append(blocks / seconds(apply))


def measure(settings: Settings) -> Found:
    hash_chain_cpu.compile_ahead()
    prefix_table_cpu.compile_ahead()
    rng = np.random.default_rng(0)
    ours, theirs = Ours(4 * settings.resident), Theirs()
    fill(ours, theirs, rng, settings.resident)
    bytes_per_block = ours.index.bytes_in_use / settings.resident
    long = Arms("events of 512 blocks", "blocks/s", more_is_better=True)
    short = Arms("events of 1 block", "events/s", more_is_better=True)
    for _ in range(settings.rounds):
        measure_apply(long, (ours, theirs), list(chains(rng, 100, CHAIN_BLOCKS)))
        measure_apply(short, (ours, theirs), list(chains(rng, 2000, 1)))
    match_all, match_one = measure_matches((ours, theirs), rng, settings.calls)
    listed, packed = measure_hashes(settings.calls)
    figures = {
        "apply512_vs_dynamo": long.speed_up,
        "apply1_vs_dynamo": short.speed_up,
        "match512_vs_dynamo": min(match_all.speed_up, match_one.speed_up),
        "hash512_vs_dynamo": packed.speed_up,
        "bytes_per_block": bytes_per_block,
    }
    return Found(figures, [long, short, match_all, match_one, listed, packed])


def measure_matches(sides: tuple[Ours, Theirs], rng: np.random.Generator, calls: int) -> tuple[Arms, Arms]:
    """A chain that every engine holds, and one that a single one does."""
    ours, theirs = sides
    everyone, one = chains(rng, 2, CHAIN_BLOCKS)
    for engine in range(ENGINES):
        ours.store(engine, everyone)
        theirs.tree.apply_event(engine, theirs.event(everyone.tolist()))
    ours.store(7, one)
    theirs.tree.apply_event(7, theirs.event(one.tolist()))
    match_all = Arms("match of 512 blocks, 64 holders", "us", more_is_better=False)
    match_one = Arms("match of 512 blocks, 1 holder", "us", more_is_better=False)
    for _ in range(calls):
        for arms, names in ((match_all, everyone), (match_one, one)):
            listed = names.tolist()
            measure_call(arms, lambda n=names: ours.index.match(n), lambda n=listed: theirs.tree.find_matches(n))
    return match_all, match_one


def measure_hashes(calls: int) -> tuple[Arms, Arms]:
    """Token ids in a list, and in an array as the router holds them."""
    hashed = Arms("hash of 512 blocks, from a list", "us", more_is_better=False)
    packed = Arms("hash of 512 blocks, from an array", "us", more_is_better=False)
    tokens = [random.randrange(150_000) for _ in range(CHAIN_TOKENS)]
    token_array = np.array(tokens, np.uint32)
    for _ in range(calls):
        measure_call(
            hashed,
            lambda: hash_chain_cpu.chain_names(np.frombuffer(array("I", tokens), np.uint32), BLOCK_SIZE),
            lambda: compute_block_hash_for_seq(tokens, BLOCK_SIZE),
        )
        measure_call(
            packed,
            lambda: hash_chain_cpu.chain_names(token_array, BLOCK_SIZE),
            lambda: compute_block_hash_for_seq(tokens, BLOCK_SIZE),
        )
    return hashed, packed
