"""For numba: floats to and from other formats, one at a time and by integers alone, so that LLVM can vectorize it.

Numbers are the bits of a float32, as uint32, unless a name says otherwise. All rounding is to nearest, ties to even.
"""

from typing import Any

import numpy as np

from vllm_llmd.kernels.memory_cpu import bits_of, compiled, float_of

U32, F32 = np.uint32, np.float32

SIGN, MAGNITUDE = U32(0x80000000), U32(0x7FFFFFFF)
INFINITY, NAN = U32(0x7F800000), U32(0x7FC00000)

E4M3_TOP, E4M3_NORMAL = U32(0x43E00000), U32(0x3C800000)
"""448, the largest, and 2^-6, the smallest with all its bits."""

E4M3_NAN = U32(0x7F)

HALF_NORMAL, HALF_INFINITY, HALF_NAN = U32(0x38800000), U32(0x7C00), U32(0x7E00)
"""2^-14, the smallest with all its bits; the other two are bits of a float16."""

BFLOAT16_NAN = U32(0x7FC0)


@compiled
def to_e4m3(bits: np.uint32, factor: np.float32) -> np.uint8:
    """The number times `factor`, a float32, at most 448 in magnitude."""
    magnitude = min(bits_of(float_of(bits) * factor) & MAGNITUDE, E4M3_TOP)
    normal = U32((magnitude + U32(0x7FFFF) + ((magnitude >> U32(20)) & U32(1))) >> U32(20)) - U32(120 << 3)
    # Beside 2^14 a float32 has steps of 2^-9, as the e4m3 below 2^-6: the addition rounds.
    small = bits_of(float_of(magnitude) + F32(16384)) - U32(0x46800000)
    code = U32(normal) if magnitude >= E4M3_NORMAL else U32(small)
    if bits & MAGNITUDE > INFINITY:
        return np.uint8(E4M3_NAN)
    return np.uint8(code | (bits & SIGN) >> U32(24))


@compiled
def from_e4m3(code: np.uint8) -> Any:
    """As a float32."""
    magnitude = U32(code) & U32(0x7F)
    normal = float_of(U32((magnitude << U32(20)) + U32(120 << 23)))
    number = normal if magnitude >= U32(8) else (normal - F32(2**-7)) * F32(2)
    if magnitude == E4M3_NAN:
        number = float_of(NAN)
    return float_of(U32(bits_of(number) | (U32(code) & U32(0x80)) << U32(24)))


@compiled
def to_float16(bits: np.uint32) -> np.uint16:
    """What is too large becomes infinite."""
    magnitude = bits & MAGNITUDE
    # Beside 0.5 a float32 has steps of 2^-24, as a float16 below 2^-14.
    small = bits_of(float_of(U32(magnitude)) + F32(0.5)) - U32(0x3F000000)
    normal = (magnitude + U32(0xFFF) + ((magnitude >> U32(13)) & U32(1)) - U32(112 << 23)) >> U32(13)
    half = U32(small) if magnitude < HALF_NORMAL else min(U32(normal), HALF_INFINITY)
    if magnitude > INFINITY:
        half = HALF_NAN
    return np.uint16(half | (bits & SIGN) >> U32(16))


@compiled
def from_float16(half: np.uint16) -> np.uint32:
    magnitude = (U32(half) & U32(0x7FFF)) << U32(13)
    small = bits_of(float_of(U32(magnitude + HALF_NORMAL)) - F32(2**-14))
    normal = magnitude + U32(112 << 23)
    special = magnitude + U32(224 << 23)
    value = small if magnitude < U32(1 << 23) else (normal if magnitude < U32(31 << 23) else special)
    return U32(value | (U32(half) & U32(0x8000)) << U32(16))


@compiled
def to_bfloat16(bits: np.uint32) -> np.uint16:
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.uint16(BFLOAT16_NAN) if bits & MAGNITUDE > INFINITY else np.uint16(rounded)


@compiled
def from_bfloat16(bits: np.uint16) -> np.uint32:
    return U32(bits) << U32(16)
