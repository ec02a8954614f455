"""How fast KV blocks are gathered and scattered, beside one plain copy of as many bytes, on a GPU or on one CPU core.

    python bench/block_copy.py --mib 64 --rounds 31

All are timed in turn, round by round, so that what disturbs one disturbs all. Bandwidth is bytes of KV per second, at
the median. The last line printed is one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from vllm_llmd.kernels.block_copy import Grid, Strides
from vllm_llmd.kernels.block_pack import Packing

Work = Callable[[], object]
Seconds = Callable[[Work], float]

HEADS, TOKENS, CHANNELS, ITEM = 8, 16, 128, 2
RUN = CHANNELS * ITEM
HND = Strides(TOKENS * RUN, RUN, ITEM)
NHD = Strides(RUN, HEADS * RUN, ITEM)
TRANSPOSED = Strides(TOKENS * RUN, ITEM, TOKENS * ITEM)
HALF_OF_NHD = Strides(RUN, HEADS // 2 * RUN, ITEM)
CODES = Strides(TOKENS * CHANNELS, CHANNELS, 1)

PLAIN = "one plain copy"


@dataclass(frozen=True)
class Layout:
    """From blocks scattered over a cache, at multiples of `block_bytes`, to a staging area where they are dense."""

    name: str
    gather: Grid
    block_bytes: int

    @property
    def scatter(self) -> Grid:
        return replace(self.gather, source=self.gather.destination, destination=self.gather.source)


BLOCK = HEADS * TOKENS * RUN
LAYOUTS = (
    Layout("whole blocks", Grid(HEADS, TOKENS, CHANNELS, ITEM, HND, HND), BLOCK),
    Layout("heads outermost to tokens outermost", Grid(HEADS, TOKENS, CHANNELS, ITEM, HND, NHD), BLOCK),
    Layout("half of the heads", Grid(HEADS // 2, TOKENS, CHANNELS, ITEM, NHD, HALF_OF_NHD), BLOCK),
    Layout("transposed", Grid(HEADS, TOKENS, CHANNELS, ITEM, TRANSPOSED, HND), BLOCK),
)


class Cpu:
    """One core, by numba."""

    def __init__(self) -> None:
        from vllm_llmd.kernels import block_copy_cpu, block_pack_cpu

        block_pack_cpu.compile_ahead()
        self.name = "cpu"
        self.copy, self.pack, self.unpack = (
            block_copy_cpu.copy_blocks,
            block_pack_cpu.pack_blocks,
            block_pack_cpu.unpack_blocks,
        )

    def memory(self, size: int) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)

    def offsets(self, offsets: np.ndarray) -> np.ndarray:
        return offsets

    def scales(self, copies: int) -> np.ndarray:
        return np.zeros((copies, HEADS), np.float32)

    def plain(self, source: np.ndarray, destination: np.ndarray) -> None:
        np.copyto(destination, source)

    def seconds(self, work: Work) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


class Gpu:
    """The current CUDA device, by Triton. Time is that of the device: the call is queued while it still sleeps."""

    def __init__(self) -> None:
        from vllm_llmd.kernels import block_copy_triton, block_pack_triton

        self.name = torch.cuda.get_device_name()
        self.copy, self.pack, self.unpack = (
            block_copy_triton.copy_blocks,
            block_pack_triton.pack_blocks,
            block_pack_triton.unpack_blocks,
        )

    def memory(self, size: int) -> torch.Tensor:
        return torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")

    def offsets(self, offsets: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(offsets)

    def scales(self, copies: int) -> torch.Tensor:
        return torch.zeros(copies, HEADS, device="cuda")

    def plain(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        destination.copy_(source)

    def seconds(self, work: Work) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(5_000_000)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def works(device: Cpu | Gpu, size: int) -> Iterator[tuple[str, int, Work]]:
    """What is timed: name, bytes of KV, and the work. The cache has twice the blocks that are copied."""
    chance = np.random.default_rng(0)
    cache, staging = device.memory(2 * size), device.memory(size)
    yield PLAIN, size, partial(device.plain, cache[:size], staging)
    for layout in LAYOUTS:
        copies = size // layout.block_bytes
        places = device.offsets(chance.permutation(2 * copies)[:copies] * layout.block_bytes)
        dense = device.offsets(np.arange(copies) * layout.gather.bytes)
        moved = copies * layout.gather.bytes
        yield f"gather {layout.name}", moved, partial(device.copy, cache, places, staging, dense, layout.gather)
        yield f"scatter {layout.name}", moved, partial(device.copy, staging, dense, cache, places, layout.scatter)
    copies = size // BLOCK
    places = device.offsets(chance.permutation(2 * copies)[:copies] * BLOCK)
    dense = device.offsets(np.arange(copies) * (BLOCK // ITEM))
    scales = device.scales(copies)
    there = Packing(Grid(HEADS, TOKENS, CHANNELS, ITEM, HND, CODES), "bfloat16")
    back = Packing(Grid(HEADS, TOKENS, CHANNELS, ITEM, CODES, HND), "bfloat16")
    yield "pack to 8 bits", copies * BLOCK, partial(device.pack, cache, places, staging, dense, scales, there)
    yield "unpack from 8 bits", copies * BLOCK, partial(device.unpack, staging, dense, cache, places, scales, back)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="bytes of KV to move at a time, in MiB")
    parser.add_argument("--rounds", type=int, default=31, help="times that each is timed")
    asked = parser.parse_args()
    device = Gpu() if torch.cuda.is_available() else Cpu()
    todo = list(works(device, asked.mib << 20))
    for _, _, work in todo:
        work()
    times: dict[str, list[float]] = {name: [] for name, _, _ in todo}
    for _ in range(asked.rounds):
        for name, _, work in todo:
            times[name].append(device.seconds(work))
    rates = {name: size / statistics.median(times[name]) / 1e9 for name, size, _ in todo}
    for name, rate in rates.items():
        sys.stdout.write(f"{name:44} {rate:9.2f} GB/s  {rate / rates[PLAIN]:5.2f} of {PLAIN}\n")
    found = {"device": device.name, "mib": asked.mib, "rounds": asked.rounds}
    sys.stdout.write(json.dumps({**found, "gb_per_s": {name: round(rate, 3) for name, rate in rates.items()}}) + "\n")


if __name__ == "__main__":
    main()
