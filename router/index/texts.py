"""Learns where prompts given as text end up in block chains, so that no tokenizer is needed. Pure.

Text is cut into chunks named by chained hashes, as blocks are. When an engine reports the block chain of a request
that this router forwarded, each chunk is tied to the block that its end falls into, by proportion; where two chains
disagree about a chunk, it is tied to the last block they share. At most `chunks_kept` chunks are kept, and half as many
pages of 16 blocks; what was used longest ago is forgotten first. `kernels/text_table.py` says how.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from vllm_llmd.kernels.hash_chain import PRIMES, Names
from vllm_llmd.kernels.hash_chain_cpu import piece_names, xxh64
from vllm_llmd.kernels.text_table_cpu import Depths, TextTable
from vllm_llmd.names import BlockName
from vllm_llmd.router.index.agreement import Guess
from vllm_llmd.router.request import Facts

CHUNKS_PER_PAGE: Final = 2
FORWARDED_KEPT: Final = 10_000
NO_CHUNKS: Final[Names] = np.empty(0, np.uint64)


@dataclass(frozen=True, eq=False)
class Chunks:
    """A text as chunk hashes. The last chunk may be partial. One that `teaches` is all that its request asks about.

    `guess` is what this router took its tokens for, if it did.
    """

    hashes: Names
    text_bytes: int
    chunk_bytes: int
    teaches: bool = True
    guess: Guess | None = None

    def ends(self, blocks: int) -> Depths:
        """How many of the text's `blocks` blocks each chunk ends after, by proportion."""
        ends = np.arange(1, len(self.hashes) + 1) * self.chunk_bytes
        after: Depths = np.minimum(ends, self.text_bytes) * blocks // max(self.text_bytes, 1)
        return after


def cut(facts: Facts, chunk_bytes: int) -> Chunks:
    """Chained 64-bit hashes of the chunks of a request's text, starting from what else decides its tokens.

    There are none where the client gives the tokens: their blocks have exact names, and nothing is to be learned.
    """
    if facts.tokens is not None and not facts.tokenized:
        return Chunks(NO_CHUNKS, len(facts.text), chunk_bytes, facts.prompts == 1)
    hashes = piece_names(facts.text, chunk_bytes, xxh64(facts.seed, 0))
    guess = Guess(facts.model, facts.tokens, facts.salt) if facts.tokenized and facts.tokens is not None else None
    return Chunks(hashes, len(facts.text), chunk_bytes, facts.prompts == 1, guess)


class TextIndex:
    """The text table, and the texts of requests whose blocks have not been reported yet."""

    def __init__(self, chunks_kept: int) -> None:
        self._chunks_kept = chunks_kept
        self._table = TextTable(chunks_kept, -(-chunks_kept // CHUNKS_PER_PAGE))
        self._forwarded: OrderedDict[str, Chunks] = OrderedDict()
        self._forwarded_chunks = 0

    def __len__(self) -> int:
        return len(self._table)

    def forwarded(self, request: str, chunks: Chunks) -> None:
        """Remembers the text of a request until an engine reports its blocks, or until there are too many."""
        self._drop(request)
        if not len(chunks.hashes) or not chunks.teaches:
            return
        self._forwarded[request] = chunks
        self._forwarded_chunks += len(chunks.hashes)
        most_chunks = max(self._chunks_kept, len(chunks.hashes))
        while len(self._forwarded) > FORWARDED_KEPT or self._forwarded_chunks > most_chunks:
            self._drop(next(iter(self._forwarded)))

    def learn(self, request: str, block_size: int, names: Names | Sequence[BlockName]) -> Chunks | None:
        """Takes in the block chain of a request, and returns its text. One that was not forwarded teaches nothing."""
        chunks = self._drop(request)
        if chunks is not None:
            chain = np.asarray(names, np.uint64)
            self._table.learn(_keys(chunks, block_size), chunks.ends(len(chain)), chain)
        return chunks

    def predict(self, block_size: int, chunks: Chunks) -> Names:
        """The block chain that the text's longest known prefix leads to; empty if none is known."""
        return self._table.predict(_keys(chunks, block_size))

    def _drop(self, request: str) -> Chunks | None:
        chunks = self._forwarded.pop(request, None)
        if chunks is not None:
            self._forwarded_chunks -= len(chunks.hashes)
        return chunks


def _keys(chunks: Chunks, block_size: int) -> Names:
    """The chunks as the table knows them: apart for engines that name blocks of another size."""
    return chunks.hashes ^ np.uint64(block_size * PRIMES[0] & (1 << 64) - 1)
