"""The simulated engines' block pool evicts what vLLM's own does, in the same order, whatever is asked of both."""

import random

import pytest

from vllm_llmd.names import BlockName
from vllm_llmd.sim.block_pool import BlockPool

pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SIZE = 24


class VllmPool:
    """vLLM's pool behind the names of ours. It keeps a block of its own back."""

    def __init__(self) -> None:
        from vllm.v1.core.block_pool import BlockPool as Real
        from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

        self.pool = Real(SIZE + 1, True, 16)
        if not hasattr(self.pool, "_insert_block_hash"):
            pytest.skip("this release of vLLM keeps its hashes in another way")
        self._key = make_block_hash_with_group_id

    def key(self, name: BlockName) -> bytes:
        return name.to_bytes(8, "big")

    def cached(self, names: list[BlockName]) -> list[int]:
        found = []
        for name in names:
            blocks = self.pool.get_cached_block(self.key(name), [0])
            if blocks is None:
                break
            found.append(blocks[0].block_id)
        return found

    def hold(self, blocks: list[int]) -> None:
        self.pool.touch([self.pool.blocks[block] for block in blocks])

    def take(self, count: int) -> list[int]:
        return [block.block_id for block in self.pool.get_new_blocks(count)]

    def name(self, block: int, name: BlockName) -> None:
        if self.pool.blocks[block].block_hash is None:
            self.pool._insert_block_hash(self._key(self.key(name), 0), self.pool.blocks[block], num_tokens=16)

    def release(self, blocks: list[int]) -> None:
        self.pool.free_blocks(self.pool.blocks[block] for block in reversed(blocks))


@pytest.mark.parametrize("seed", range(20))
def test_both_hand_out_and_find_the_same_blocks(seed: int) -> None:
    rng = random.Random(seed)
    ours, theirs = BlockPool(SIZE), VllmPool()
    held: list[list[int]] = []
    for _ in range(400):
        assert ours.free == theirs.pool.get_num_free_blocks()
        prompt = [BlockName(100 * rng.randrange(1, 4) + at) for at in range(rng.randrange(1, 8))]
        if held and (rng.random() < 0.5 or ours.free < 8):
            blocks = held.pop(rng.randrange(len(held)))
            ours.release([block - 1 for block in blocks])  # type: ignore[misc]
            theirs.release(blocks)
            continue
        hits = theirs.cached(prompt)
        assert [block + 1 for block in ours.cached(prompt, len(prompt))] == hits
        ours.hold([block - 1 for block in hits])  # type: ignore[misc]
        theirs.hold(hits)
        new = theirs.take(len(prompt) - len(hits) + rng.randrange(2))
        assert [block + 1 for block in ours.take(len(new))] == new
        for block, name in zip(new, prompt[len(hits) :], strict=False):
            ours.name(block - 1, name)  # type: ignore[arg-type]
            theirs.name(block, name)
        held.append([*hits, *new])
