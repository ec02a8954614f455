"""Triton's kernels compiled for GPUs that are not here: what its interpreter does not show."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from vllm_llmd.kernels import block_copy_triton, block_pack_triton
from vllm_llmd.kernels.block_copy import Grid, Strides
from vllm_llmd.kernels.block_copy_triton import OPTIONS, Tiles
from vllm_llmd.kernels.block_pack import ITEM_BYTES, Float, Packing
from vllm_llmd.kernels.block_pack_triton import Lane

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton only interprets")

HND, NHD, TRANSPOSED = Strides(4096, 256, 2), Strides(256, 2048, 2), Strides(4096, 2, 32)
GRIDS = {
    "whole blocks": Grid(8, 16, 128, 2, HND, HND),
    "HND to NHD": Grid(8, 16, 128, 2, HND, NHD),
    "a slice of NHD": Grid(4, 16, 128, 2, NHD, Strides(256, 1024, 2)),
    "transposed": Grid(8, 16, 128, 2, HND, TRANSPOSED),
    "and back": Grid(8, 16, 128, 2, TRANSPOSED, HND),
}
POINTERS = {"source": "*u8", "destination": "*u8", "source_offsets": "*i64", "destination_offsets": "*i64"}


@pytest.fixture(autouse=True)
def compile_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def ptx_of(kernel: Any, arguments: dict[str, Any], capability: int) -> str:
    """As a launch with `arguments` and memory that begins at multiples of 16 compiles it."""
    constants = {name: value for name, value in arguments.items() if name[0].isupper() or value == 1}
    signature = {
        name: "constexpr" if name in constants else POINTERS.get(name, "*fp32" if name == "scales" else "i32")
        for name in kernel.arg_names
    }
    multiples = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in POINTERS}
    source = ASTSource(kernel, signature, constants, multiples)
    compiled = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
    ptx: str = compiled.asm["ptx"]
    return ptx


def widths(ptx: str) -> set[int]:
    """Bytes that a thread moves at once, to and from tiles in global memory; single words of 8 are offsets."""
    found = re.findall(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    return {int(count or 1) * int(bits) // 8 for count, bits in found if (count, bits) != ("", "64")}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", GRIDS)
def test_a_copy_moves_sixteen_bytes_at_once(name: str, capability: int) -> None:
    arguments = Tiles.of(GRIDS[name], 16).arguments
    assert widths(ptx_of(block_copy_triton._copy_tiles, arguments, capability)) == {16}


def test_a_copy_at_odd_places_compiles_too() -> None:
    arguments = Tiles.of(GRIDS["transposed"], 1).arguments
    assert widths(ptx_of(block_copy_triton._copy_tiles, arguments, 90)) == {1}


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("kernel", ["_pack", "_unpack"])
def test_packing_compiles_without_fused_or_flushed_arithmetic(kernel: str, dtype: Float) -> None:
    """A GPU of capability 80 has no 8-bit floats of its own."""
    wide, narrow = Strides(2048 * ITEM_BYTES[dtype], 128 * ITEM_BYTES[dtype], ITEM_BYTES[dtype]), Strides(2048, 128, 1)
    packing = Packing(Grid(8, 16, 128, ITEM_BYTES[dtype], wide, narrow), dtype)
    arguments = block_pack_triton._arguments(packing, Lane(wide, 16), Lane(narrow, 16))
    ptx = ptx_of(getattr(block_pack_triton, kernel), arguments, 80)
    assert "fma" not in ptx
    assert "ftz" not in ptx
    assert widths(ptx) == {4, 16}
