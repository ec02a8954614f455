"""Prefixes that are on their way to this engine, so that nobody orders them a second time. Engine thread."""

from collections.abc import Callable, Hashable
from typing import Any, Final, NamedTuple

from vllm_llmd.names import RequestId


class _Range(NamedTuple):
    """The hashes of a prompt from the one numbered `first` on."""

    first: int
    hashes: list[Hashable]


NOTHING: Final = _Range(0, [])


class InFlight:
    """Blocks by vLLM's own hash, which names a block within one engine, and the request each is coming for.

    A request that has been scheduled keeps its entries until it ends: from then on they say nothing.
    """

    def __init__(self, hash_tokens: int, min_tokens: int, waits_for_kv: Callable[[Any], bool]) -> None:
        """vLLM makes one hash for every `hash_tokens` tokens; fewer than `min_tokens` are not worth waiting for."""
        self._hash_tokens = hash_tokens
        self._min_hashes = max(-(-min_tokens // hash_tokens), 1)
        self._waits_for_kv = waits_for_kv
        self._coming: dict[Hashable, Any] = {}
        self._by_request: dict[RequestId, _Range] = {}

    def add(self, request: Any, first_token: int, end_token: int) -> None:
        """Tokens `first_token` to `end_token` of the request's prompt are coming."""
        first = first_token // self._hash_tokens
        hashes = list(request.block_hashes[first : end_token // self._hash_tokens])
        self._by_request[request.request_id] = _Range(first, hashes)
        self._coming.update((block_hash, request) for block_hash in hashes)

    def forget(self, request: RequestId) -> None:
        """The request is over."""
        for block_hash in self._by_request.pop(request, NOTHING).hashes:
            coming = self._coming.get(block_hash)
            if coming is not None and coming.request_id == request:
                del self._coming[block_hash]

    def covers(self, request: Any, computed: int) -> bool:
        """Whether half of what the request lacks after its first `computed` tokens is coming for another.

        That must be half of all that is coming for the other one, too: it is there when all of it is.
        """
        if not self._coming:
            return False
        hashes, first = request.block_hashes, computed // self._hash_tokens
        last = first + max((len(hashes) - first + 1) // 2, self._min_hashes) - 1
        coming = self._coming.get(hashes[last]) if last < len(hashes) else None
        if coming is None or coming is request or not self._waits_for_kv(coming):
            return False
        theirs = self._by_request[coming.request_id]
        middle = (len(theirs.hashes) - 1) // 2
        at = theirs.first + middle
        return at <= last or (at < len(hashes) and hashes[at] == theirs.hashes[middle])
