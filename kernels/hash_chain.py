"""How a KV block is named: a 64-bit chain hash over token ids. The one definition, used by engine and router.

name(block) = first 8 bytes, little endian, of BLAKE2b-64 over
    parent name (8 bytes LE; 0 before the first block) || token ids (4 bytes LE each) || salt of the block
The salt is empty for plain text; otherwise it is whatever else decides the block's content (adapter, cache salt,
multimodal hashes), as bytes.
"""

import hashlib
from array import array
from collections.abc import Sequence

from vllm_llmd.names import BlockName

ROOT = BlockName(0)
"""The parent of every first block."""


def block_name(parent: BlockName, token_ids: Sequence[int], salt: bytes = b"") -> BlockName:
    """Name of the full block that holds `token_ids` after the block `parent`."""
    digest = hashlib.blake2b(parent.to_bytes(8, "little"), digest_size=8)
    digest.update(array("I", token_ids).tobytes())
    digest.update(salt)
    return BlockName(int.from_bytes(digest.digest(), "little"))


def chain_names(token_ids: Sequence[int], block_size: int, salt: bytes = b"") -> list[BlockName]:
    """Names of the full blocks of `token_ids`, in order; a partial last block has none."""
    names: list[BlockName] = []
    parent = ROOT
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = block_name(parent, token_ids[start : start + block_size], salt)
        names.append(parent)
    return names
