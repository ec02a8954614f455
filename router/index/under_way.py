"""Prompts that are being computed: where whoever asks for the same beginning will find it soon. Pure.

The index learns of blocks when they are full, so of requests that come together each would seem to be the first. A
prompt counts for as long as its request lasts: its blocks are in use until then, and the index has them by then.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, NamedTuple

from vllm_llmd.kernels.hash_chain import Names
from vllm_llmd.kernels.hash_chain_cpu import piece_names, xxh64
from vllm_llmd.names import EngineId
from vllm_llmd.router.candidates import Coming
from vllm_llmd.router.decide import Supply
from vllm_llmd.router.index.texts import Chunks
from vllm_llmd.router.request import Facts, Latest

TOKENS_PER_PIECE: Final = 64
BYTES_PER_TOKEN: Final = 4

LOOKED_AT: Final = 64
"""Of prompts that begin alike, the latest ones are compared."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """A prompt cut up, each piece named together with all before it; the last may be shorter. `root` is what else
    decides its blocks. `tokens` are in a piece, more or less.
    """

    root: Hashable
    names: Names
    tokens: float

    @classmethod
    def of(cls, facts: Facts, chunks: Chunks) -> "Pieces":
        root = facts.model, facts.salt
        if len(chunks.hashes):
            return cls(root, chunks.hashes, chunks.chunk_bytes * facts.prompt_tokens / max(chunks.text_bytes, 1))
        if facts.tokens is None:
            return cls(root, chunks.hashes, 0.0)
        names = piece_names(facts.tokens.tobytes(), TOKENS_PER_PIECE * BYTES_PER_TOKEN, xxh64(facts.seed, 1))
        return cls(root, names, float(TOKENS_PER_PIECE))


class _Prompt(NamedTuple):
    names: Names
    engines: tuple[EngineId, ...]
    supply: Supply | None


NOTHING: Final = Coming(0)


class UnderWay:
    """Requests from when they are placed until they end, by how their prompts begin."""

    def __init__(self) -> None:
        self._by_beginning: dict[Hashable, OrderedDict[str, _Prompt]] = {}
        self._beginning: dict[str, Hashable] = {}
        self._latest: Latest[Pieces] = Latest()

    def __len__(self) -> int:
        return len(self._beginning)

    def began(
        self, request: str, facts: Facts, chunks: Chunks, engines: tuple[EngineId, ...], supply: Supply | None = None
    ) -> None:
        """The prompt will be in the caches of these engines."""
        self.ended(request)
        pieces = self._pieces(facts, chunks)
        if len(pieces.names):
            beginning = pieces.root, int(pieces.names[0])
            self._beginning[request] = beginning
            alike = self._by_beginning.setdefault(beginning, OrderedDict())
            alike[request] = _Prompt(pieces.names, engines, supply)

    def ended(self, request: str) -> None:
        beginning = self._beginning.pop(request, None)
        if beginning is not None:
            alike = self._by_beginning[beginning]
            del alike[request]
            if not alike:
                del self._by_beginning[beginning]

    def coming(self, facts: Facts, chunks: Chunks) -> dict[EngineId, Coming]:
        """What of the prompt, from its start, will be in the caches of engines, where any will."""
        if not self._by_beginning:
            return {}
        pieces = self._pieces(facts, chunks)
        alike = self._by_beginning.get((pieces.root, int(pieces.names[0]))) if len(pieces.names) else None
        found: dict[EngineId, Coming] = {}
        for _, prompt in zip(range(LOOKED_AT), reversed((alike or {}).values()), strict=False):
            tokens = int(shared(pieces.names, prompt.names) * pieces.tokens)
            for engine in prompt.engines:
                known = found.get(engine, NOTHING)
                if tokens > known.tokens or prompt.supply is not None or known is NOTHING:
                    found[engine] = _joined(known, engine, tokens, prompt.supply)
        return found

    def _pieces(self, facts: Facts, chunks: Chunks) -> Pieces:
        return self._latest.of(facts, lambda: Pieces.of(facts, chunks))


def _joined(known: Coming, engine: EngineId, tokens: int, supply: Supply | None) -> Coming:
    """With what another prompt brings there."""
    source, supplied = known.source, known.supplied
    if supply is not None and supply.destination == engine and min(tokens, supply.until) > supplied:
        source, supplied = supply.source, min(tokens, supply.until)
    return Coming(max(known.tokens, tokens), source, supplied)


def shared(some: Names, others: Names) -> int:
    """How many names two chains have in common: from one that differs on, all do."""
    low, high = 0, min(len(some), len(others))
    if high and some[high - 1] == others[high - 1]:
        return high
    while low < high:
        middle = (low + high) // 2
        if some[middle] == others[middle]:
            low = middle + 1
        else:
            high = middle
    return low
