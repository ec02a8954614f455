"""The prefix index against NVIDIA Dynamo's, side by side in one process: block events in, matches out, hashes.

Both hold a million blocks of 64 engines, 16 tokens each. Arms take turns; figures are medians with quartiles. Dynamo's
`RadixTree` has a thread of its own: events are counted as applied when a match asked for behind them has come.
The last line is one JSON object; each `_vs_` is a speed-up, larger is better. What is not measured yet is null.
"""

import argparse
import json
import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

try:
    from dynamo._core import RadixTree, compute_block_hash_for_seq
except ImportError:
    sys.exit("error: ai-dynamo-runtime is not installed here; run: make bench-index")

from vllm_llmd.kernels import hash_chain_cpu, prefix_table_cpu
from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.names import EngineId
from vllm_llmd.router.prefix_index import PrefixIndex

ENGINES = 64
BLOCK_SIZE = 16
CHAIN_BLOCKS = 512
CHAIN_TOKENS = CHAIN_BLOCKS * BLOCK_SIZE
NOBODY = np.empty(0, np.uint64)

NOT_MEASURED = ("zmq_vs_dynamo", "select_vs_dynamo", "route_100k_tokens_p50_ms", "lag_p99_ms", "join_exact_s")


@dataclass
class Arms:
    """Values of ours and of Dynamo's, taken in turn. `more_is_better` for rates."""

    what: str
    unit: str
    more_is_better: bool
    ours: list[float] = field(default_factory=list)
    dynamo: list[float] = field(default_factory=list)

    @property
    def speed_up(self) -> float:
        ours, theirs = statistics.median(self.ours), statistics.median(self.dynamo)
        return ours / theirs if self.more_is_better else theirs / ours

    def row(self) -> str:
        arms = f"{_shown(self.ours):>30s} {_shown(self.dynamo):>30s}"
        return f"{self.what:34s} {arms} {self.unit:9s} {self.speed_up:6.2f}x"


def _shown(values: Sequence[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.4g} [{low:.4g}, {high:.4g}]"


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

    for values, apply in _in_turn((arms.ours, apply_ours), (arms.dynamo, apply_theirs)):
        values.append(blocks / _seconds(apply))


def measure_call(arms: Arms, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    for values, call in _in_turn((arms.ours, ours), (arms.dynamo, theirs)):
        values.append(_seconds(call) * 1e6)


def _in_turn(
    *pairs: tuple[list[float], Callable[[], object]],
) -> list[tuple[list[float], Callable[[], object]]]:
    return random.sample(pairs, len(pairs))


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m index", description=__doc__.partition("\n")[0])
    parser.add_argument("--resident", type=int, default=1_000_000, help="blocks held (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of events (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=300, help="matches and hashes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/results/index.json"), help="default: %(default)s")
    args = parser.parse_args()
    hash_chain_cpu.compile_ahead()
    prefix_table_cpu.compile_ahead()
    rng = np.random.default_rng(0)
    ours, theirs = Ours(4 * args.resident), Theirs()
    fill(ours, theirs, rng, args.resident)
    bytes_per_block = sum(bank.bytes_in_use for bank in ours.index._banks) / args.resident

    long = Arms("events of 512 blocks", "blocks/s", more_is_better=True)
    short = Arms("events of 1 block", "events/s", more_is_better=True)
    for _ in range(args.rounds):
        measure_apply(long, (ours, theirs), list(chains(rng, 100, CHAIN_BLOCKS)))
        measure_apply(short, (ours, theirs), list(chains(rng, 2000, 1)))

    everyone, one = (next(chains(rng, 1, CHAIN_BLOCKS)) for _ in range(2))
    for engine in range(ENGINES):
        ours.store(engine, everyone)
        theirs.tree.apply_event(engine, theirs.event(everyone.tolist()))
    ours.store(7, one)
    theirs.tree.apply_event(7, theirs.event(one.tolist()))
    match_all = Arms("match of 512 blocks, 64 holders", "us", more_is_better=False)
    match_one = Arms("match of 512 blocks, 1 holder", "us", more_is_better=False)
    hashed = Arms("hash of 512 blocks, from a list", "us", more_is_better=False)
    packed = Arms("hash of 512 blocks, from an array", "us", more_is_better=False)
    tokens = [random.randrange(150_000) for _ in range(CHAIN_TOKENS)]
    token_array = np.array(tokens, np.uint32)
    for _ in range(args.calls):
        for arms, names in ((match_all, everyone), (match_one, one)):
            listed = names.tolist()
            measure_call(arms, lambda n=names: ours.index.match(n), lambda n=listed: theirs.tree.find_matches(n))
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
    every = [long, short, match_all, match_one, hashed, packed]
    say = sys.stdout.write
    say(f"{'':34s} {'ours':>30s} {'Dynamo':>30s}\n" + "".join(arms.row() + "\n" for arms in every))
    last = {
        "apply512_vs_dynamo": long.speed_up,
        "apply1_vs_dynamo": short.speed_up,
        "match512_vs_dynamo": min(match_all.speed_up, match_one.speed_up),
        "hash512_vs_dynamo": packed.speed_up,
        "bytes_per_block": bytes_per_block,
        **dict.fromkeys(NOT_MEASURED),
    }
    results = {"settings": vars(args) | {"out": str(args.out)}, "arms": [vars(arms) for arms in every], "last": last}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    say(json.dumps({name: None if value is None else float(f"{value:.4g}") for name, value in last.items()}) + "\n")


if __name__ == "__main__":
    main()
