"""One msgpack payload of KV events -> flat arrays, compiled. What is not common is not understood, and not guessed at.

Positions are indices into the batch's bytes. A function that reads returns where the next value begins, or 0 if what
is there is not what it reads: no value begins at 0.
"""

import numpy as np
import numpy.typing as npt

from vllm_llmd.kernels.block_names_cpu import Table, fetch
from vllm_llmd.kernels.hash_chain import Names, xxh64
from vllm_llmd.kernels.hash_chain_cpu import TokenIds, hash_at
from vllm_llmd.kernels.kv_events import FULL_ATTENTION, LIMIT, REMOVED_FIELDS, STORED_FIELDS
from vllm_llmd.kernels.memory_cpu import compiled, load, load_big_endian

Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
Event = npt.NDArray[np.int64]

(IS_STORED, FIRST_KEY, END_KEY, FIRST_TOKEN, END_TOKEN, HAS_PARENT, BLOCK_SIZE, GROUP, KEEPS_ALL, EXTRAS, SEEN) = range(
    11
)
EVENT_WORDS = 11
"""An event: of `keys` and `tokens` it has a stretch each. `SEEN` has a bit per field that is there."""

LEAST_EVENT_BYTES = 16

HASHES, PARENT, TOKENS, SIZE, LORA_ID, MEDIUM, LORA_NAME, EXTRA_KEYS, GROUP_IDX, KIND = range(len(STORED_FIELDS))
OTHER = len(STORED_FIELDS)
NEEDED_BY_STORED = 1 << HASHES | 1 << PARENT | 1 << TOKENS | 1 << SIZE
REMOVED_COLUMNS = np.array([STORED_FIELDS.index(name) for name in REMOVED_FIELDS], np.int64)


def _hashed(*texts: str) -> Names:
    return np.array([xxh64(text.encode(), 0) for text in texts], np.uint64)


FIELD_HASHES = _hashed(*STORED_FIELDS)
TYPE_HASH, STORED_HASH, REMOVED_HASH, GPU_HASH = _hashed("type", "BlockStored", "BlockRemoved", "GPU")
FULL_HASHES = _hashed(*sorted(FULL_ATTENTION))

NIL, UINT8, UINT16, UINT32, UINT64 = 0xC0, 0xCC, 0xCD, 0xCE, 0xCF
ZERO, ONE, ALL_BITS = np.uint64(0), np.uint64(1), np.uint64((1 << 64) - 1)


@compiled
def parse(
    data: Bytes, start: int, end: int, events: Counts, parents: Names, keys: Names, tokens: TokenIds, table: Table
) -> tuple[bool, int, int]:
    """Whether all of the payload was understood, how many events it holds, and how many block hashes.

    The slots of hashes in `table` are asked for on the way: they are there when everything is read.
    """
    fields, at = _array(data, start, end)
    if at == 0 or fields < 2:
        return False, 0, 0
    at = _skip(data, at, end)
    if at == 0:
        return False, 0, 0
    count, at = _array(data, at, end)
    if at == 0 or count > len(events):
        return False, 0, 0
    used_keys = used_tokens = 0
    for i in range(count):
        event = events[i]
        event[:] = 0
        event[FIRST_KEY] = event[END_KEY] = used_keys
        event[FIRST_TOKEN] = event[END_TOKEN] = used_tokens
        event[KEEPS_ALL] = 1
        at = _event(data, at, end, event, parents[i : i + 1], keys, tokens, table)
        if at == 0:
            return False, 0, 0
        used_keys, used_tokens = event[END_KEY], event[END_TOKEN]
        if event[EXTRAS] and event[EXTRAS] != used_keys - event[FIRST_KEY] + 1:
            return False, 0, 0
    for _ in range(fields - 2):
        at = _skip(data, at, end)
        if at == 0:
            return False, 0, 0
    return at == end, count, used_keys


@compiled
def _event(
    data: Bytes, at: int, end: int, event: Event, parent: Names, keys: Names, tokens: TokenIds, table: Table
) -> int:
    """Reads one event of a known kind."""
    is_map = at < end and (data[at] & 0xF0 == 0x80 or data[at] in (0xDE, 0xDF))
    count, at = _map(data, at, end) if is_map else _array(data, at, end)
    if at == 0 or count == 0:
        return 0
    if is_map:
        name, at = _text(data, at, end)
        if at == 0 or name != TYPE_HASH:
            return 0
    kind, at = _text(data, at, end)
    if at == 0 or kind not in (STORED_HASH, REMOVED_HASH):
        return 0
    event[IS_STORED] = kind == STORED_HASH
    for i in range(count - 1):
        column = OTHER
        if is_map:
            name, at = _text(data, at, end)
            if at == 0:
                return 0
            column = _column(name)
        elif event[IS_STORED]:
            column = min(i, OTHER)
        elif i < len(REMOVED_COLUMNS):
            column = REMOVED_COLUMNS[i]
        if event[SEEN] >> column & 1 and column != OTHER:
            return 0
        event[SEEN] |= 1 << column
        at = _field(data, at, end, column, event, parent, keys, tokens, table)
        if at == 0:
            return 0
    needed = NEEDED_BY_STORED if event[IS_STORED] else 1 << HASHES
    return at if event[SEEN] & needed == needed else 0


@compiled
def _column(name: np.uint64) -> int:
    for column in range(OTHER):
        if FIELD_HASHES[column] == name:
            return column
    return OTHER


@compiled
def _field(
    data: Bytes,
    at: int,
    end: int,
    column: int,
    event: Event,
    parent: Names,
    keys: Names,
    tokens: TokenIds,
    table: Table,
) -> int:
    if column == HASHES:
        return _hashes(data, at, end, event, keys, table)
    if column == TOKENS:
        return _tokens(data, at, end, event, tokens)
    if column == OTHER:
        return _skip(data, at, end)
    if column == SIZE:
        size, at = _int(data, at, end)
        event[BLOCK_SIZE] = np.int64(size)
        return at if ZERO < size < np.uint64(LIMIT) else 0
    if at < end and data[at] == NIL:
        return at + 1
    if column == PARENT:
        key, at = _int(data, at, end)
        event[HAS_PARENT] = 1
        parent[0] = key if key else ONE
        return at
    if column == MEDIUM:
        medium, at = _text(data, at, end)
        return at if medium == GPU_HASH else 0
    if column == EXTRA_KEYS:
        return _no_extra_keys(data, at, end, event)
    if column == GROUP_IDX:
        group, at = _int(data, at, end)
        event[GROUP] = np.int64(group)
        return at if group < np.uint64(LIMIT) else 0
    if column == KIND:
        kind, at = _text(data, at, end)
        event[KEEPS_ALL] = 0
        for full in FULL_HASHES:
            if kind == full:
                event[KEEPS_ALL] = 1
        return at
    return 0  # an adapter


@compiled
def _hashes(data: Bytes, at: int, end: int, event: Event, keys: Names, table: Table) -> int:
    count, at = _array(data, at, end)
    if at == 0 or count > end - at:
        return 0
    place = event[FIRST_KEY]
    address = data.ctypes.data
    for i in range(count):
        if at + 9 <= end and load(address, at, np.uint8) == UINT64:
            key, at = load_big_endian(address, at + 1, np.uint64), at + 9
        else:
            key, at = _int(data, at, end)
            if at == 0:
                return 0
        key = key if key else ONE
        fetch(table, key)
        keys[place + i] = key
    event[END_KEY] = place + count
    return at


@compiled
def _tokens(data: Bytes, at: int, end: int, event: Event, tokens: TokenIds) -> int:
    count, at = _array(data, at, end)
    if at == 0 or count > end - at:
        return 0
    place = event[FIRST_TOKEN]
    done, at = _most_tokens(data.ctypes.data, at, end, count, tokens[place : place + count])
    for i in range(done, count):
        token, at = _int(data, at, end)
        if at == 0 or token >> np.uint64(32):
            return 0
        tokens[place + i] = np.uint32(token)
    event[END_TOKEN] = place + count
    return at


@compiled
def _most_tokens(address: int, at: int, end: int, count: int, tokens: TokenIds) -> tuple[int, int]:
    """Reads tokens without a branch on how long each is, as far as 8 bytes follow and all is common."""
    for i in range(count):
        if at + 8 > end:
            return i, at
        kind = np.int64(load(address, at, np.uint8))
        if kind > UINT32 or (kind >= 0x80 and kind < UINT8):
            return i, at
        width = 1 + (kind >= UINT8) + (kind >= UINT16) + 2 * (kind >= UINT32)
        bits = load_big_endian(address, at, np.uint64) >> np.uint64(64 - 8 * width)
        kind_bits = 1 + 7 * (kind >= UINT8)
        tokens[i] = np.uint32(bits & (ALL_BITS >> np.uint64(64 - 8 * width + kind_bits)))
        at += int(width)
    return count, at


@compiled
def _no_extra_keys(data: Bytes, at: int, end: int, event: Event) -> int:
    count, at = _array(data, at, end)
    if at == 0 or count > end - at:
        return 0
    for i in range(count):
        if data[at + i] != NIL:
            return 0
    event[EXTRAS] = count + 1
    return at + count


@compiled
def _int(data: Bytes, at: int, end: int) -> tuple[np.uint64, int]:
    """An integer as its 64 bits."""
    if at >= end:
        return ZERO, 0
    kind = data[at]
    if kind < 0x80:
        return np.uint64(kind), at + 1
    if kind >= 0xE0:
        return np.uint64(np.int64(np.int8(kind))), at + 1
    if kind < 0xCC or kind > 0xD3:
        return ZERO, 0
    width = 1 << ((int(kind) - 0xCC) & 3)
    if at + 1 + width > end:
        return ZERO, 0
    bits = _big_endian(data, at + 1, width)
    if kind >= 0xD0 and width < 8 and bits >> np.uint64(8 * width - 1):
        bits |= ~((ONE << np.uint64(8 * width)) - ONE)
    return bits, at + 1 + width


@compiled
def _big_endian(data: Bytes, at: int, width: int) -> np.uint64:
    bits = ZERO
    for i in range(width):
        bits = bits << np.uint64(8) | np.uint64(data[at + i])
    return bits


@compiled
def _array(data: Bytes, at: int, end: int) -> tuple[int, int]:
    return _head(data, at, end, 0x90, 0xDC)


@compiled
def _map(data: Bytes, at: int, end: int) -> tuple[int, int]:
    return _head(data, at, end, 0x80, 0xDE)


@compiled
def _head(data: Bytes, at: int, end: int, short: int, long: int) -> tuple[int, int]:
    """How many items follow, and where the first one is."""
    if at >= end:
        return 0, 0
    kind = data[at]
    if kind & 0xF0 == short:
        return int(kind & 0x0F), at + 1
    width = 2 if kind == long else 4 if kind == long + 1 else 0
    if width == 0 or at + 1 + width > end:
        return 0, 0
    return int(np.int64(_big_endian(data, at + 1, width))), at + 1 + width


@compiled
def _text(data: Bytes, at: int, end: int) -> tuple[np.uint64, int]:
    """A string, as its hash."""
    if at >= end:
        return ZERO, 0
    kind = data[at]
    if kind & 0xE0 == 0xA0:
        size, at = int(kind & 0x1F), at + 1
    elif kind == 0xD9 and at + 2 <= end:
        size, at = int(data[at + 1]), at + 2
    else:
        return ZERO, 0
    if not _is_ascii(data, at, at + size, end):
        return ZERO, 0
    return hash_at(data.ctypes.data + at, size, ZERO), at + size


@compiled
def _skip(data: Bytes, at: int, end: int) -> int:
    """Past one value: a number, a short text, nothing, or an array of these."""
    left = 1
    while left:
        if at >= end:
            return 0
        kind = int(data[at])
        left -= 1
        at += 1
        if 0x90 <= kind <= 0x9F:
            left += kind & 0x0F
        elif 0xA0 <= kind <= 0xBF or kind == 0xD9:
            _, at = _text(data, at - 1, end)
            if at == 0:
                return 0
        elif kind in (0xCA, 0xCB):
            at += 4 << (kind - 0xCA)
        elif 0xCC <= kind <= 0xD3:
            at += 1 << ((kind - 0xCC) & 3)
        elif kind in (0xDC, 0xDD):
            count, at = _array(data, at - 1, end)
            if at == 0:
                return 0
            left += count
        elif kind not in (NIL, 0xC2, 0xC3) and 0x80 <= kind < 0xE0:
            return 0  # a map, bytes, long text, an extension
    return at if at <= end else 0


@compiled
def _is_ascii(data: Bytes, start: int, end: int, limit: int) -> bool:
    if end > limit:
        return False
    bits = np.uint8(0)
    for i in range(start, end):
        bits |= data[i]
    return bool(bits < 0x80)
