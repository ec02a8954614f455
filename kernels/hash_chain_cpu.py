"""`hash_chain`, compiled by numba. Works on arrays, without the GIL."""

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels.hash_chain import PRIMES, ROOT, TOKEN_BYTES, Names
from vllm_llmd.kernels.memory_cpu import compiled, load

TokenIds = npt.NDArray[np.uint32]
"""Token ids, shape (n,)."""

P1, P2, P3, P4, P5 = map(np.uint64, PRIMES)

UNSALTED: Names = np.empty(0, np.uint64)


def chain_names(token_ids: TokenIds, block_size: int, parent: int = ROOT, digests: Names = UNSALTED) -> Names:
    """Names of the full blocks of `token_ids` after the block `parent`, shape (n,).

    `digests` are those of the blocks' salts, shape (n,), 0 for none; or none for all.
    """
    blocks = len(token_ids) // block_size
    tokens = np.ascontiguousarray(token_ids[: blocks * block_size], dtype="<u4")
    return _chain(tokens.view(np.uint8), block_size * TOKEN_BYTES, np.uint64(parent), digests)


def piece_names(text: bytes, piece_bytes: int, root: int) -> Names:
    """As the reference, shape (n,)."""
    return _chain(np.frombuffer(text, np.uint8), piece_bytes, np.uint64(root), UNSALTED)


def xxh64(data: bytes, seed: int) -> int:
    """As the reference."""
    return int(_hash_bytes(np.frombuffer(data, np.uint8), np.uint64(seed)))


def compile_ahead() -> None:
    """Compiles every kernel or loads it from numba's cache, so that no request has to wait for that."""
    chain_names(np.zeros(1, np.uint32), 1)
    xxh64(b"", 0)


@compiled
def _chain(data: npt.NDArray[np.uint8], piece_bytes: int, parent: np.uint64, digests: Names) -> Names:
    pieces = (len(data) + piece_bytes - 1) // piece_bytes
    names = np.empty(pieces, np.uint64)
    address = data.ctypes.data
    for piece in range(pieces):
        start = piece * piece_bytes
        seed = parent ^ digests[piece] if len(digests) else parent
        parent = hash_at(address + start, min(piece_bytes, len(data) - start), seed)
        if parent == np.uint64(0):
            parent = np.uint64(1)
        names[piece] = parent
    return names


@compiled
def _hash_bytes(data: npt.NDArray[np.uint8], seed: np.uint64) -> np.uint64:
    return hash_at(data.ctypes.data, len(data), seed)


@compiled
def hash_at(address: int, size: int, seed: np.uint64) -> np.uint64:
    """The 64-bit xxHash of `size` bytes at `address`."""
    at = 0
    if size < 32:
        state = seed + P5
    else:
        a, b, c, d = seed + P1 + P2, seed + P2, seed, seed - P1
        while size - at >= 32:
            a = _mixed(a, load(address, at, np.uint64))
            b = _mixed(b, load(address, at + 8, np.uint64))
            c = _mixed(c, load(address, at + 16, np.uint64))
            d = _mixed(d, load(address, at + 24, np.uint64))
            at += 32
        state = _rotated(a, 1) + _rotated(b, 7) + _rotated(c, 12) + _rotated(d, 18)
        state = (state ^ _mixed(np.uint64(0), a)) * P1 + P4
        state = (state ^ _mixed(np.uint64(0), b)) * P1 + P4
        state = (state ^ _mixed(np.uint64(0), c)) * P1 + P4
        state = (state ^ _mixed(np.uint64(0), d)) * P1 + P4
    state = state + np.uint64(size)
    while size - at >= 8:
        state = _rotated(state ^ _mixed(np.uint64(0), load(address, at, np.uint64)), 27) * P1 + P4
        at += 8
    if size - at >= 4:
        state = _rotated(state ^ (np.uint64(load(address, at, np.uint32)) * P1), 23) * P2 + P3
        at += 4
    while at < size:
        state = _rotated(state ^ (np.uint64(load(address, at, np.uint8)) * P5), 11) * P1
        at += 1
    state = (state ^ (state >> np.uint64(33))) * P2
    state = (state ^ (state >> np.uint64(29))) * P3
    return state ^ (state >> np.uint64(32))


@compiled
def _mixed(lane: np.uint64, word: np.uint64) -> np.uint64:
    return _rotated(lane + word * P2, 31) * P1


@compiled
def _rotated(word: np.uint64, by: int) -> np.uint64:
    return (word << np.uint64(by)) | (word >> np.uint64(64 - by))
