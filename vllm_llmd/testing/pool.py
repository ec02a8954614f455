"""The block pool of an engine, as far as pins go."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class FakeBlock:
    """One of vLLM's KV cache blocks; `refs` is how often it is held."""

    block_id: int
    refs: int = 0
    is_null: bool = False


class FakePool:
    """Counts who holds a block. Letting go of one more often than it was held is an AssertionError."""

    def pin(self, blocks: Sequence[FakeBlock]) -> None:
        for block in blocks:
            block.refs += 1

    def unpin(self, blocks: Sequence[FakeBlock]) -> None:
        for block in blocks:
            assert block.refs, "let go of more often than held"
            block.refs -= 1
            if not block.refs:
                self.freed(block)

    def freed(self, block: FakeBlock) -> None:
        """Nobody holds the block any more."""
