"""Block names: the definition, its compiled twin, and the published vectors."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.kernels import hash_chain, hash_chain_cpu
from vllm_llmd.names import BlockName

VECTORS = Path(__file__).parents[2] / "docs" / "block-names.md"

seeds = st.integers(0, 2**64 - 1)


@given(data=st.binary(max_size=200), seed=seeds)
def test_both_implementations_hash_alike(data: bytes, seed: int) -> None:
    assert hash_chain.xxh64(data, seed) == hash_chain_cpu.xxh64(data, seed)


@pytest.mark.parametrize(
    ("data", "seed", "expected"),
    [
        (b"", 0, 0xEF46DB3751D8E999),
        (b"a", 0, 0xD24EC4F1A98C6E5B),
        (b"abc", 0, 0x44BC2CF5AD770999),
    ],
)
def test_the_hash_is_the_one_that_others_call_xxh64(data: bytes, seed: int, expected: int) -> None:
    assert hash_chain.xxh64(data, seed) == expected


@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=70),
    block_size=st.integers(1, 20),
    salt=st.sampled_from([b"", b"adapter", b"\0" * 40]),
)
def test_both_implementations_name_alike(tokens: list[int], block_size: int, salt: bytes) -> None:
    blocks = len(tokens) // block_size
    digests = np.full(blocks, hash_chain.digest(salt), np.uint64)
    compiled = hash_chain_cpu.chain_names(np.array(tokens, np.uint32), block_size, digests=digests)
    assert compiled.tolist() == hash_chain.chain_names(tokens, block_size, salt)
    if not salt:
        assert hash_chain_cpu.chain_names(np.array(tokens, np.uint32), block_size).tolist() == compiled.tolist()


@given(text=st.binary(max_size=300), piece_bytes=st.integers(1, 70), root=seeds)
def test_both_implementations_name_pieces_of_text_alike(text: bytes, piece_bytes: int, root: int) -> None:
    pieces = hash_chain.piece_names(text, piece_bytes, root)
    assert hash_chain_cpu.piece_names(text, piece_bytes, root).tolist() == pieces
    assert len(pieces) == -(-len(text) // piece_bytes)


def test_a_chain_goes_on_from_a_parent() -> None:
    tokens = np.arange(64, dtype=np.uint32)
    whole = hash_chain_cpu.chain_names(tokens, 16)
    rest = hash_chain_cpu.chain_names(tokens[32:], 16, parent=int(whole[1]))
    assert rest.tolist() == whole[2:].tolist()


def test_each_block_has_its_own_salt() -> None:
    tokens = np.arange(48, dtype=np.uint32)
    salted = hash_chain.digest(b"image")
    names = hash_chain_cpu.chain_names(tokens, 16, digests=np.array([0, salted, 0], np.uint64)).tolist()
    plain = hash_chain.chain_names(tokens.tolist(), 16)
    assert names[0] == plain[0]
    assert names[1] == hash_chain.block_name(plain[0], range(16, 32), b"image")
    assert names[2] == hash_chain.block_name(BlockName(names[1]), range(32, 48))


def test_a_token_that_does_not_fit_is_refused() -> None:
    with pytest.raises(OverflowError):
        hash_chain.token_bytes([2**32])


def rows() -> list[tuple[str, str, str]]:
    return re.findall(r"^\| `(.*?)` \| (.*?) \| ((?:`[0-9a-f]{16}` ?)+) \|$", VECTORS.read_text(), re.MULTILINE)


def test_the_published_vectors_hold() -> None:
    assert len(rows()) >= 5
    for tokens, salt, names in rows():
        first, end = (int(bound) for bound in tokens.split(" to "))
        salted = b"" if salt == "none" else bytes.fromhex(salt.strip("`"))
        found = hash_chain.chain_names(range(first, end), 16, salted)
        assert " ".join(f"`{name:016x}`" for name in found) == names
