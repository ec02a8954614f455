"""How a KV block is named: a 64-bit chain hash over token ids. The one definition, used by engine and router.

    name(block) = XXH64(token ids, 4 bytes little endian each; seed = name(block before it) xor digest(salt))

The first block has the block before it named 0. The salt is whatever else decides the block's content (adapter, cache
salt, multimodal hashes), as bytes; digest(salt) is XXH64(salt; seed = 0), and 0 without a salt. A hash that comes out
as 0 counts as 1: no block is named 0. Texts are cut into pieces that are named in the same way, byte by byte.
`hash_chain_cpu` is the same, compiled. Test vectors: docs/block-names.md.
"""

from array import array
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from vllm_llmd.names import BlockName

Names = npt.NDArray[np.uint64]
"""Block names, shape (n,)."""

ROOT = BlockName(0)
"""The parent of every first block."""

TOKEN_BYTES = 4

PRIMES = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_P1, _P2, _P3, _P4, _P5 = PRIMES
_ALL = (1 << 64) - 1


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as they are hashed. Raises OverflowError for one that does not fit into 32 bits."""
    words = array("I", token_ids)
    assert words.itemsize == TOKEN_BYTES
    return words.tobytes()


def salt_of(extra_keys: Sequence[object] | None) -> bytes:
    """The salt of a block with these extra keys, in vLLM's order; empty without any."""
    return msgspec.msgpack.encode(extra_keys) if extra_keys else b""


def digest(salt: bytes) -> int:
    """What a salt contributes to a block's seed."""
    return xxh64(salt, 0) if salt else 0


def block_name(parent: BlockName, token_ids: Sequence[int], salt: bytes = b"") -> BlockName:
    """Name of the full block that holds `token_ids` after the block `parent`."""
    return BlockName(xxh64(token_bytes(token_ids), parent ^ digest(salt)) or 1)


def chain_names(token_ids: Sequence[int], block_size: int, salt: bytes = b"") -> list[BlockName]:
    """Names of the full blocks of `token_ids`, all of one salt, in order; a partial last block has none."""
    names: list[BlockName] = []
    parent = ROOT
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = block_name(parent, token_ids[start : start + block_size], salt)
        names.append(parent)
    return names


def piece_names(text: bytes, piece_bytes: int, root: int) -> list[int]:
    """Chained names of the pieces of a text, the last of which may be shorter."""
    names = []
    for start in range(0, len(text), piece_bytes):
        root = xxh64(text[start : start + piece_bytes], root) or 1
        names.append(root)
    return names


def xxh64(data: bytes, seed: int) -> int:
    """The 64-bit xxHash of `data`."""
    at, left = 0, len(data)
    if left < 32:
        state = (seed + _P5) & _ALL
    else:
        lanes = [(seed + start) & _ALL for start in (_P1 + _P2, _P2, 0, -_P1)]
        while left - at >= 32:
            lanes = [_round(lane, data, at + 8 * i) for i, lane in enumerate(lanes)]
            at += 32
        state = sum(_rotated(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18), strict=True)) & _ALL
        for lane in lanes:
            state = ((state ^ _mixed(0, lane)) * _P1 + _P4) & _ALL
    state = (state + left) & _ALL
    while left - at >= 8:
        state = (_rotated(state ^ _round(0, data, at), 27) * _P1 + _P4) & _ALL
        at += 8
    if left - at >= 4:
        word = int.from_bytes(data[at : at + 4], "little")
        state = (_rotated(state ^ (word * _P1 & _ALL), 23) * _P2 + _P3) & _ALL
        at += 4
    for byte in data[at:]:
        state = _rotated(state ^ (byte * _P5 & _ALL), 11) * _P1 & _ALL
    state = (state ^ (state >> 33)) * _P2 & _ALL
    state = (state ^ (state >> 29)) * _P3 & _ALL
    return state ^ (state >> 32)


def _round(lane: int, data: bytes, at: int) -> int:
    return _mixed(lane, int.from_bytes(data[at : at + 8], "little"))


def _mixed(lane: int, word: int) -> int:
    return _rotated((lane + word * _P2) & _ALL, 31) * _P1 & _ALL


def _rotated(word: int, by: int) -> int:
    return (word << by | word >> (64 - by)) & _ALL
