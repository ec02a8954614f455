"""Learns where prompts given as text end up in block chains, so that no tokenizer is needed. Pure.

Text is cut into chunks named by chained hashes, as blocks are. When an engine reports the block chain of a request
that this router forwarded, each chunk is tied to the block that its end falls into, by proportion; where two chains
disagree about a chunk, it is tied to the last block they share. Cost: about 150 bytes per chunk and per block, at
most `chunks_kept` chunks and `BLOCKS_PER_CHUNK` times as many blocks, the least recently used forgotten first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vllm_llmd.kernels.hash_chain import ROOT
from vllm_llmd.kernels.hash_chain_cpu import piece_names, xxh64
from vllm_llmd.names import BlockName

BLOCKS_PER_CHUNK: Final = 4
FORWARDED_KEPT: Final = 10_000
STEPS_BACK: Final = 64
"""How far two chains are followed back to where they met."""


@dataclass(frozen=True)
class Chunks:
    """A text as chunk hashes. The last chunk may be partial."""

    hashes: Sequence[int]
    text_bytes: int
    chunk_bytes: int

    def end(self, chunk: int) -> float:
        """Where a chunk ends, as a part of the whole."""
        return min((chunk + 1) * self.chunk_bytes / self.text_bytes, 1.0)


def cut(seed: bytes, text: bytes, chunk_bytes: int) -> Chunks:
    """Chained 64-bit hashes of the chunks of `text`; `seed` is what else decides its tokens."""
    return Chunks(piece_names(text, chunk_bytes, xxh64(seed, 0)).tolist(), len(text), chunk_bytes)


class TextIndex:
    """Chunk -> last block of its chain, and block -> the block before it."""

    def __init__(self, chunks_kept: int) -> None:
        self._chunks_kept = chunks_kept
        self._last: OrderedDict[tuple[int, int], BlockName] = OrderedDict()
        self._parent: OrderedDict[BlockName, BlockName] = OrderedDict()
        self._forwarded: OrderedDict[str, Chunks] = OrderedDict()

    def __len__(self) -> int:
        return len(self._last)

    def forwarded(self, request: str, chunks: Chunks) -> None:
        """Remembers the text of a request until an engine reports its blocks."""
        self._forwarded[request] = chunks
        while len(self._forwarded) > FORWARDED_KEPT:
            self._forwarded.popitem(last=False)

    def learn(self, request: str, block_size: int, names: Sequence[BlockName]) -> None:
        """Takes in the block chain of a request. One that this router did not forward teaches nothing."""
        chunks = self._forwarded.pop(request, None)
        if chunks is None:
            return
        self._remember_chain(names)
        chain = frozenset(names)
        for chunk in range(len(chunks.hashes) - 1, -1, -1):  # the first chunk is the last to be forgotten
            key = (block_size, chunks.hashes[chunk])
            known = self._last.get(key)
            shared = None if known is None else self._shared(known, chain)
            blocks = int(chunks.end(chunk) * len(names))
            if shared is None:
                shared = names[blocks - 1] if blocks else ROOT
            self._last[key] = shared
            self._last.move_to_end(key)
        while len(self._last) > self._chunks_kept:
            self._last.popitem(last=False)

    def predict(self, block_size: int, chunks: Chunks) -> list[BlockName]:
        """The block chain that the text's longest known prefix leads to; empty if none is known."""
        keys: list[tuple[int, int]] = []
        for chunk in chunks.hashes:
            if (block_size, chunk) not in self._last:
                break
            keys.append((block_size, chunk))
        for key in reversed(keys):
            self._last.move_to_end(key)
        return self._chain_to(self._last[keys[-1]]) if keys else []

    def _shared(self, block: BlockName, chain: frozenset[BlockName]) -> BlockName | None:
        """The last block on the way back from `block` that is in `chain`; None if there is none nearby."""
        for _ in range(STEPS_BACK):
            if block == ROOT or block in chain:
                return block
            parent = self._parent.get(block)
            if parent is None:
                return None
            block = parent
        return None

    def _remember_chain(self, names: Sequence[BlockName]) -> None:
        for depth in range(len(names) - 1, -1, -1):
            self._parent[names[depth]] = names[depth - 1] if depth else ROOT
            self._parent.move_to_end(names[depth])
        while len(self._parent) > BLOCKS_PER_CHUNK * self._chunks_kept:
            self._parent.popitem(last=False)

    def _chain_to(self, block: BlockName) -> list[BlockName]:
        chain = []
        while block != ROOT:
            parent = self._parent.get(block)
            if parent is None:
                return []
            self._parent.move_to_end(block)
            chain.append(block)
            block = parent
        chain.reverse()
        return chain
