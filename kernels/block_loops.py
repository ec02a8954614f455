"""Pure: which loops a strided copy takes, with all that is contiguous on both sides fused into one run of bytes."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

from vllm_llmd.kernels.block_copy import Grid


@dataclass(frozen=True)
class Axis:
    """`count` steps; strides are in bytes."""

    count: int
    source: int
    destination: int

    def continues(self, inner: "Axis") -> bool:
        """Whether a step of this axis goes on where `inner` ends, on both sides."""
        return (self.source, self.destination) == (inner.count * inner.source, inner.count * inner.destination)


ONCE = Axis(1, 0, 0)


@dataclass(frozen=True)
class Loops:
    """At every step of `axes`, outermost first, `run_bytes` that are contiguous on both sides."""

    axes: tuple[Axis, Axis, Axis]
    run_bytes: int

    @property
    def transposed(self) -> bool:
        """Whether runs follow each other along the middle axis at the source, the innermost at the destination."""
        _, across, down = self.axes
        return across.source == self.run_bytes == down.destination


@lru_cache(maxsize=1024)
def loops_of(grid: Grid) -> Loops:
    """The fewest loops that do the copy of `grid`; unused axes are `ONCE`.

    Examples, of 8 heads, 16 tokens and 64 channels of 2 bytes: dense blocks on both sides are one run of 16,384 bytes;
    from heads outermost to tokens outermost it is 8 x 16 runs of 128.
    """
    run = Axis(grid.item_bytes, 1, 1)
    counts = (grid.heads, grid.tokens, grid.channels)
    froms = (grid.source.head, grid.source.token, grid.source.channel)
    tos = (grid.destination.head, grid.destination.token, grid.destination.channel)
    axes = [axis for axis in map(Axis, counts, froms, tos) if axis.count > 1]
    while pair := next((pair for pair in permutations([*axes, run], 2) if pair[0].continues(pair[1])), None):
        outer, inner = pair
        fused = Axis(outer.count * inner.count, inner.source, inner.destination)
        axes.remove(outer)
        if inner is run:
            run = fused
        else:
            axes[axes.index(inner)] = fused
    return Loops(_ordered(axes, run.count), run.count)


def _ordered(axes: list[Axis], run_bytes: int) -> tuple[Axis, Axis, Axis]:
    """Outermost the longest stride at the destination, but a transposition's two axes always innermost."""
    outer = sorted(axes, key=lambda axis: -abs(axis.destination))
    across = [axis for axis in outer if axis.source == run_bytes][:1]
    down = [axis for axis in outer if axis.destination == run_bytes][:1]
    if across and down:
        outer = [axis for axis in outer if axis is not across[0] and axis is not down[0]] + across + down
    first, second, third = [ONCE] * (3 - len(outer)) + outer
    return first, second, third
