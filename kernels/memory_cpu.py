"""Memory at addresses, for numba: load, store, move, and transpose a tile. Nothing here checks an address.

Addresses and offsets are int64, in bytes, and need no alignment. A `kind` is a numpy scalar type that gives the size of
an item; complex128 stands for 16 bytes.
"""

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types  # type: ignore[import-untyped]
from numba.extending import intrinsic, register_jitable  # type: ignore[import-untyped]

F = TypeVar("F", bound=Callable[..., Any])

HERE = Path(__file__).parent

VECTOR_BYTES = 16
"""What every 64-bit machine has: a tile's side is as many items as fit into one vector."""


SOURCES = tuple(sorted(HERE.glob("*_cpu.py")))
"""What compiled functions of this package are made of."""


def compiled(function: F) -> F:
    """`function` compiled by numba at its first call with new types; it runs without the GIL.

    The machine code is kept beside the source or in the user's cache directory, where either can be written.
    """
    return _compiled(function, SOURCES)


def compiled_with(*sources: str) -> Callable[[F], F]:
    """As `compiled`, for a function of another package; what is compiled into it stands in these files, too.

    It divides by zero as numpy does.
    """
    return lambda function: _compiled(function, (*SOURCES, *map(Path, sources)), error_model="numpy")


def usable_in_kernels(function: F) -> F:
    """`function` itself, which can be called on columns; kernels that call it on numbers have it compiled into them."""
    usable: F = register_jitable(error_model="numpy")(function)
    return usable


def _compiled(function: F, sources: Iterable[Path], **options: str) -> F:
    try:
        kernel: F = njit(nogil=True, cache=True, **options)(function)
        # Numba looks for changes in the function's own file alone, and functions are compiled into one another.
        kernel._cache._cache_file._source_stamp = tuple(map(_stamp, sources))  # type: ignore[attr-defined]
    except (RuntimeError, AttributeError):  # no directory to write to, or numba keeps its code in another way
        kernel = njit(nogil=True, **options)(function)
    return kernel


@cache
def _stamp(source: Path) -> tuple[str, int, int]:
    stat = source.stat()
    return source.name, stat.st_mtime_ns, stat.st_size


def inside_kernels(function: Callable[..., Any]) -> Any:
    """What `function` emits, where a compiled function calls it with all arguments but the first."""
    return intrinsic(function)


@inside_kernels
def load(context: Any, address: Any, offset: Any, kind: Any) -> Any:
    """The item of `kind` at `address + offset`."""
    item = kind.dtype

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], args[1]), typ=_integer(item), align=1)

    return item(types.int64, types.int64, kind), emit


@inside_kernels
def load_big_endian(context: Any, address: Any, offset: Any, kind: Any) -> Any:
    """The integer of `kind` at `address + offset`, whose first byte is the highest."""
    item = kind.dtype

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.bswap(builder.load(_pointer(builder, args[0], args[1]), typ=_integer(item), align=1))

    return item(types.int64, types.int64, kind), emit


@inside_kernels
def store(context: Any, address: Any, offset: Any, item: Any) -> Any:
    """Writes an integer `item`, in as many bytes as its type has, to `address + offset`."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(builder, args[0], args[1]), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, item), emit


@inside_kernels
def bits_of(context: Any, number: Any) -> Any:
    """The bits of a float32, as uint32."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), emit


@inside_kernels
def float_of(context: Any, bits: Any) -> Any:
    """The float32 with these bits, an uint32."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), emit


@inside_kernels
def prefetch(context: Any, address: Any, offset: Any) -> Any:
    """Asks the memory for what is at `address + offset`, which will be read soon. Waits for nothing."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer, word = _pointer(builder, *args), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        to_read, closest, data = (ir.Constant(word, value) for value in (0, 3, 1))
        builder.call(ask, [pointer, to_read, closest, data])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), emit


@inside_kernels
def move_item(context: Any, destination: Any, source: Any, kind: Any) -> Any:
    """Copies one item of `kind`."""
    item = kind.dtype

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        value = builder.load(_pointer(builder, args[1]), typ=_integer(item), align=1)
        builder.store(value, _pointer(builder, args[0]), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, kind), emit


@inside_kernels
def move_run(context: Any, destination: Any, source: Any, size: Any) -> Any:
    """Copies `size` bytes; the two runs must not overlap."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointers = [_pointer(builder, address) for address in args[:2]]
        memcpy = builder.module.declare_intrinsic("llvm.memcpy", [*(p.type for p in pointers), args[2].type])
        builder.call(memcpy, [*pointers, args[2], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), emit


@inside_kernels
def transpose_tile(context: Any, to: Any, to_stride: Any, origin: Any, origin_stride: Any, kind: Any) -> Any:
    """Row r of the source becomes column r of the destination; rows are contiguous and their strides are in bytes.

    A tile has `VECTOR_BYTES / item bytes` rows and columns.
    """
    item = kind.dtype
    side = VECTOR_BYTES * 8 // item.bitwidth

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        to, to_stride, origin, origin_stride, _ = args
        vector = ir.VectorType(_integer(item), side)
        froms = [_pointer(builder, origin, _times(builder, origin_stride, r)) for r in range(side)]
        rows = [builder.load(pointer, typ=vector, align=1) for pointer in froms]
        for _ in range(side.bit_length() - 1):
            rows = _interleave(builder, rows)
        for r, row in enumerate(rows):
            builder.store(row, _pointer(builder, to, _times(builder, to_stride, r)), align=1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64, types.int64, kind), emit


def _interleave(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """One riffle of all items, row by row; as many riffles as a row's index has bits transpose a square."""
    half, side = len(rows) // 2, len(rows)
    out = []
    for upper, lower in zip(rows[:half], rows[half:], strict=True):
        for first in (0, half):
            lanes = [lane for i in range(first, first + half) for lane in (i, side + i)]
            mask = ir.Constant(ir.VectorType(ir.IntType(32), side), lanes)
            out.append(builder.shuffle_vector(upper, lower, mask))
    return out


def _integer(item: Any) -> Any:
    return ir.IntType(item.bitwidth)


def _times(builder: ir.IRBuilder, stride: Any, factor: int) -> Any:
    return builder.mul(stride, ir.Constant(stride.type, factor))


def _pointer(builder: ir.IRBuilder, address: Any, offset: Any = None) -> Any:
    """An offset apart from the address lets LLVM see the stride of a loop, and vectorize it."""
    base = builder.inttoptr(address, ir.PointerType())
    return base if offset is None else builder.gep(base, [offset], source_etype=ir.IntType(8))
