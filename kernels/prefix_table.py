"""Which of up to 64 engines hold which block: the contract of a bank of the prefix table, and its plain twin.

`prefix_table_cpu.Bank` is the same, compiled. Engines are numbered 0 to 63 within a bank. Nothing is named 0: it is not
stored and never found.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels.hash_chain import Names

BANK_ENGINES = 64

Depths = npt.NDArray[np.int32]
"""How many blocks from the start each engine of a bank holds, shape (64,)."""


@dataclass(frozen=True)
class Contents:
    """How many blocks an engine holds, and the exclusive or of their names."""

    blocks: int
    digest: int


class BankLike(Protocol):
    """Example: after `store(names, 3)`, `match` finds `len(names)` for engine 3 and 0 for all others."""

    def store(self, names: Names, engine: int) -> int:
        """The engine holds these too. Returns how many found no room; names that it holds already change nothing."""
        ...

    def remove(self, names: Names, engine: int) -> None:
        """The engine holds these no more. Names that it does not hold change nothing."""
        ...

    def clear(self, engine: int) -> None:
        """The engine holds nothing any more."""
        ...

    def match(self, names: Names, depths: Depths) -> None:
        """Writes to `depths` how many blocks from the start of `names` each engine holds without a hole."""
        ...

    def holders(self, names: Names) -> Names:
        """Who holds each of `names`, shape (n,): bit `e` is set for engine `e`."""
        ...

    def held(self, engine: int) -> Names:
        """What the engine holds, in any order."""
        ...

    def contents(self, engine: int) -> Contents: ...


class PlainBank:
    """A set per engine."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._held: list[set[int]] = [set() for _ in range(BANK_ENGINES)]

    def store(self, names: Names, engine: int) -> int:
        missed = 0
        for name in _ints(names):
            if name == 0:
                continue
            known = any(name in held for held in self._held)
            if known or len(set().union(*self._held)) < self._max_blocks:
                self._held[engine].add(name)
            else:
                missed += 1
        return missed

    def remove(self, names: Names, engine: int) -> None:
        self._held[engine].difference_update(_ints(names))

    def clear(self, engine: int) -> None:
        self._held[engine].clear()

    def match(self, names: Names, depths: Depths) -> None:
        depths[:] = [_depth(_ints(names), held) for held in self._held]

    def holders(self, names: Names) -> Names:
        bits = [sum((name in held) << e for e, held in enumerate(self._held)) for name in _ints(names)]
        return np.array(bits, dtype=np.uint64)

    def held(self, engine: int) -> Names:
        return np.array(sorted(self._held[engine]), dtype=np.uint64)

    def contents(self, engine: int) -> Contents:
        digest = 0
        for name in self._held[engine]:
            digest ^= name
        return Contents(len(self._held[engine]), digest)


def depths_of(holders: Names, depths: Depths) -> None:
    """Writes to `depths` how many from the start of `holders` each engine is among without a hole."""
    bits = _ints(holders)
    depths[:] = [next((depth for depth, held in enumerate(bits) if not held >> e & 1), len(bits)) for e in range(64)]


def _ints(names: Iterable[np.uint64]) -> list[int]:
    return [int(name) for name in names]


def _depth(names: Sequence[int], held: set[int]) -> int:
    return next((depth for depth, name in enumerate(names) if name not in held), len(names))
