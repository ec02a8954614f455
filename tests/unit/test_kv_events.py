"""KV events as several releases write them: the decoder, and both followers against each other."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.errors import MalformedMessageError
from vllm_llmd.kernels.block_names import Cleared, Removed, Stored
from vllm_llmd.kernels.hash_chain import chain_names
from vllm_llmd.kernels.kv_events import decode
from vllm_llmd.kernels.kv_events_cpu import Follower
from vllm_llmd.kernels.kv_events_plain import Change, PlainFollower

TOKENS = list(range(8))
NAMES = chain_names(TOKENS, 4)
SALTED = chain_names(TOKENS, 4, msgspec.msgpack.encode(["poet"]))

STORED: dict[str, Any] = {
    "five fields": ["BlockStored", [11, 12], None, TOKENS, 4, None],
    "with a medium": ["BlockStored", [11, 12], None, TOKENS, 4, None, "GPU"],
    "with an adapter": ["BlockStored", [11, 12], None, TOKENS, 4, None, "GPU", None],
    "with extra keys and a group": ["BlockStored", [11, 12], None, TOKENS, 4, None, "GPU", None, [None, None], 0],
    "an array that goes on": [
        "BlockStored",
        [11, 12],
        None,
        TOKENS,
        4,
        None,
        "GPU",
        None,
        None,
        0,
        None,
        7,
        {"a": [1]},
    ],
    "vLLM 0.32, a map": {
        "type": "BlockStored",
        "block_hashes": [11, 12],
        "parent_block_hash": None,
        "token_ids": TOKENS,
        "block_size": 4,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None, None],
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
        "session_id": "later still",
    },
    "hashes of 32 bytes": ["BlockStored", [b"\x0b" * 32, b"\x0c" * 32], None, TOKENS, 4, None, "GPU"],
    "signed hashes": ["BlockStored", [-5, -6], None, TOKENS, 4, None, None],
}


def payload(*events: Any, more: tuple[Any, ...] = (0,)) -> bytes:
    return msgspec.msgpack.encode([12.5, list(events), *more])


def names(change: Change) -> tuple[bool, set[int], set[int]]:
    removed, stored = set(change.removed.tolist()), set(change.stored.tolist())
    return change.cleared, removed, stored


@pytest.fixture(params=[Follower, PlainFollower])
def follower(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.mark.parametrize("event", STORED.values(), ids=STORED)
def test_a_stored_event_of_any_release_names_its_blocks(follower: Any, event: Any) -> None:
    assert names(follower.follow([payload(event)])) == (False, set(), set(NAMES))
    assert follower.block_size == 4


def test_a_batch_may_be_a_map(follower: Any) -> None:
    batch = {"ts": 1.0, "events": [STORED["vLLM 0.32, a map"]], "data_parallel_rank": 0}
    assert names(follower.follow([msgspec.msgpack.encode(batch)]))[2] == set(NAMES)


@pytest.mark.parametrize("event", STORED.values(), ids=STORED)
@pytest.mark.parametrize("more", [(), (None,), (3,), (3, "later")])
def test_what_stands_behind_the_events_changes_nothing(follower: Any, event: Any, more: tuple[Any, ...]) -> None:
    assert names(follower.follow([payload(event, more=more)]))[2] == set(NAMES)


@pytest.mark.parametrize(
    "event",
    [
        ["BlockRemoved", [11]],
        ["BlockRemoved", [11], "GPU"],
        ["BlockRemoved", [11], "GPU", 0, "LOCAL", None],
        {"type": "BlockRemoved", "block_hashes": [11], "medium": "GPU", "group_idx": 0},
    ],
)
def test_a_removed_event_of_any_release_takes_a_block_away(follower: Any, event: Any) -> None:
    follower.follow([payload(["BlockStored", [11, 12], None, TOKENS, 4, None])])
    assert names(follower.follow([payload(event)])) == (False, {NAMES[0]}, set())


@pytest.mark.parametrize("event", [["AllBlocksCleared"], {"type": "AllBlocksCleared"}])
def test_a_cleared_cache_is_empty_and_what_comes_after_counts(follower: Any, event: Any) -> None:
    stored = ["BlockStored", [11, 12], None, TOKENS, 4, None]
    follower.follow([payload(stored)])
    assert names(follower.follow([payload(stored, event, ["BlockStored", [11], None, TOKENS[:4], 4, None])])) == (
        True,
        set(),
        {NAMES[0]},
    )


def test_a_block_is_named_after_a_parent_of_an_earlier_payload(follower: Any) -> None:
    follower.follow([payload(["BlockStored", [11], None, TOKENS[:4], 4, None])])
    assert names(follower.follow([payload(["BlockStored", [12], 11, TOKENS[4:], 4, None])]))[2] == {NAMES[1]}


def test_a_copy_more_and_a_copy_less_change_nothing(follower: Any) -> None:
    stored = payload(["BlockStored", [11, 12], None, TOKENS, 4, None])
    follower.follow([stored])
    assert names(follower.follow([stored])) == (False, set(), set())
    assert names(follower.follow([payload(["BlockRemoved", [12]])])) == (False, set(), set())
    assert names(follower.follow([payload(["BlockRemoved", [12]])])) == (False, {NAMES[1]}, set())


def test_blocks_after_an_unknown_parent_are_counted_and_left_out(follower: Any) -> None:
    assert names(follower.follow([payload(["BlockStored", [11, 12], 99, TOKENS, 4, None])])) == (False, set(), set())
    assert follower.tally.unnamed == 2


def test_an_adapter_and_extra_keys_are_part_of_the_names(follower: Any) -> None:
    by_keys = ["BlockStored", [11, 12], None, TOKENS, 4, 1, "GPU", "poet", [["poet"], ["poet"]]]
    by_name = ["BlockStored", [21, 22], None, TOKENS, 4, 1, "GPU", "poet"]
    assert names(follower.follow([payload(by_keys)]))[2] == set(SALTED)
    follower.forget()
    assert names(follower.follow([payload(by_name)])) == (True, set(), set(SALTED))


def offloaded(change: Change) -> dict[str, tuple[set[int], set[int]]]:
    return {tier: (set(each.removed), set(each.stored)) for tier, each in change.offloaded.items() if each}


def test_offloaded_blocks_are_named_by_their_hashes_in_their_tier(follower: Any) -> None:
    placeholder = {
        "type": "BlockStored",
        "block_hashes": [12],
        "parent_block_hash": None,
        "token_ids": [],
        "medium": "CPU",
    }
    change = follower.follow([payload(STORED["vLLM 0.32, a map"], {**placeholder, "block_size": 0, "lora_id": None})])
    assert names(change) == (False, set(), set(NAMES))
    assert offloaded(change) == {"cpu": (set(), {NAMES[1]})}
    gone = payload(["BlockRemoved", [11, 12]], ["BlockStored", [11, 99], None, [], 0, None, "STORAGE"])
    change = follower.follow([gone])
    assert names(change) == (False, set(NAMES), set())
    assert offloaded(change) == {"disk": (set(), {NAMES[0]})}
    assert follower.tally.unnamed == 1
    assert offloaded(follower.follow([payload(["BlockRemoved", [12, 11], "CPU"])])) == {"cpu": ({NAMES[1]}, set())}
    assert names(follower.follow([payload(["AllBlocksCleared"])])) == (True, set(), set())
    assert offloaded(follower.follow([payload(["BlockRemoved", [11], "STORAGE"])])) == {}


def test_other_tiers_groups_and_sizes_are_counted_and_left_out(follower: Any) -> None:
    window = {**STORED["vLLM 0.32, a map"], "group_idx": 1, "kv_cache_spec_kind": "sliding_window"}
    follower.follow([payload(window, STORED["vLLM 0.32, a map"], window)])
    follower.follow(
        [
            payload(
                ["BlockStored", [11], None, TOKENS[:4], 4, None, "TAPE"],
                ["BlockRemoved", [11], "TAPE"],
                ["BlockRemoved", [11], "GPU", 1],
                ["BlockStored", [31], None, TOKENS[:2], 2, None],
                ["BlockStored", [32], None, TOKENS[:3], 4, None],
            )
        ]
    )
    tally = follower.tally
    assert (tally.other_group, tally.other_tier, tally.other_size) == (2, 2, 2)
    assert follower.blocks == 2


@pytest.mark.parametrize(
    "event",
    [
        ["BlockTouched", [1]],
        {"type": "BlockTouched"},
        {"block_hashes": [1]},
        ["BlockStored"],
        ["BlockStored", [1], None, "text", 4, None],
        ["BlockStored", [1.5], None, TOKENS[:4], 4, None],
        ["BlockStored", [1], None, [-1, 2, 3, 4], 4, None],
        ["BlockStored", [1], None, [1 << 32, 2, 3, 4], 4, None],
        ["BlockStored", [1], None, TOKENS[:4], 0, None],
        ["BlockStored", [1], None, TOKENS[:4], 1 << 40, None],
        ["BlockStored", [1], None, [[1, 2], [2, 3], [3, 4], [4, 5]], 4, None],
        ["BlockStored", [1], None, TOKENS[:4], 4, None, "GPU", None, [None, None]],
        ["BlockStored", [1], None, TOKENS[:4], 4, None, "GPU", None, ["poet"]],
        ["BlockRemoved", b"\x01", "GPU"],
        ["BlockRemoved", [1], "GPU", -1],
        [],
        7,
        None,
    ],
    ids=str,
)
def test_an_event_that_is_not_understood_is_counted_and_its_neighbours_count(follower: Any, event: Any) -> None:
    stored = ["BlockStored", [11, 12], None, TOKENS, 4, None]
    assert names(follower.follow([payload(event, stored)]))[2] == set(NAMES)
    assert follower.tally.unknown == 1


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xc1", b"\x93", b"\x92\x00\x00", b"\x00\x00", msgspec.msgpack.encode({"ts": 1}), payload() + b"x"],
)
def test_a_payload_that_is_no_batch_is_counted_and_its_neighbours_count(follower: Any, garbage: bytes) -> None:
    good = payload(STORED["vLLM 0.32, a map"])
    assert names(follower.follow([garbage, good, garbage]))[2] == set(NAMES)
    assert follower.tally.malformed == 2


def test_a_medium_that_is_not_known_has_no_tier() -> None:
    [known, unknown] = decode(payload(["BlockRemoved", [1], "cpu"], ["BlockRemoved", [1], "TAPE"])).events
    assert (known.tier, unknown.tier) == ("cpu", None)


def test_the_decoder_tells_events_apart() -> None:
    events = decode(payload(STORED["vLLM 0.32, a map"], ["BlockRemoved", [1]], ["AllBlocksCleared"])).events
    assert [type(reported.event) for reported in events] == [Stored, Removed, Cleared]
    with pytest.raises(MalformedMessageError, match="array of a time and the events"):
        decode(msgspec.msgpack.encode([1.0]))


KEYS = st.integers(2, 12) | st.sampled_from([0, 200, 70_000, 1 << 63, (1 << 64) - 1, -1, -200, b"\x07" * 32])


def told_apart(key: int | bytes) -> int:
    """A first token for the block, so that equal blocks have equal hashes, as an engine's do."""
    return int.from_bytes(key[:4]) if isinstance(key, bytes) else key & 0xFFFFFFF | (key >> 32 & 0xF) << 28


@st.composite
def stored_events(draw: Callable[..., Any]) -> Any:
    hashes = draw(st.lists(KEYS, max_size=4))
    size = draw(st.sampled_from([2, 2, 2, 2, 3]))
    token = st.sampled_from([0, 5, 127, 128, 255, 256, 65_535, 65_536, (1 << 32) - 1])
    count = len(hashes) * size + draw(st.sampled_from([0, 0, 0, 0, 1]))
    tokens = draw(st.lists(token, min_size=count, max_size=count))
    tokens[: len(hashes) * size : size] = map(told_apart, hashes)
    fields = {
        "block_hashes": hashes,
        "parent_block_hash": draw(st.none() | KEYS),
        "token_ids": tokens,
        "block_size": size,
        "lora_id": draw(st.sampled_from([None, None, None, 3])),
        "medium": draw(st.sampled_from([None, "GPU", "GPU", "gpu", "CPU", "DISK", "TAPE"])),
        "lora_name": draw(st.sampled_from([None, None, None, "poet"])),
        "extra_keys": draw(st.sampled_from([None, [None] * len(hashes), [["salt"]] * len(hashes)])),
        "group_idx": draw(st.sampled_from([None, 0, 0, 0, 1])),
        "kv_cache_spec_kind": draw(st.sampled_from([None, "full_attention", "mla_attention", "mamba"])),
        "session_id": draw(st.none() | st.text(max_size=40)),
    }
    if draw(st.booleans()):
        return {"type": "BlockStored", **fields}
    return ["BlockStored", *fields.values()][: draw(st.integers(6, 12))]


@st.composite
def removed_events(draw: Callable[..., Any]) -> Any:
    fields = {
        "block_hashes": draw(st.lists(KEYS, max_size=4)),
        "medium": draw(st.sampled_from([None, "GPU", "GPU", "CPU", "DISK"])),
        "group_idx": draw(st.sampled_from([None, 0, 0, 1])),
    }
    if draw(st.booleans()):
        return {"type": "BlockRemoved", **fields}
    return ["BlockRemoved", *fields.values()][: draw(st.integers(2, 4))]


EVENTS = stored_events() | stored_events() | removed_events() | st.sampled_from([["AllBlocksCleared"], ["New", {}], 5])
PAYLOADS = st.lists(EVENTS, max_size=5).map(lambda events: payload(*events)) | st.binary(max_size=40)


@given(st.lists(st.lists(PAYLOADS, max_size=6), max_size=5))
def test_both_followers_come_to_hold_the_same(batches: list[list[bytes]]) -> None:
    fast, plain = Follower(), PlainFollower()
    held: dict[str, set[int]] = {"fast": set(), "plain": set()}
    for batch in batches:
        elsewhere = []
        for name, one in (("fast", fast), ("plain", plain)):
            change = one.follow(batch)
            cleared, removed, stored = names(change)
            held[name] = ((set() if cleared else held[name]) - removed) | stored
            elsewhere.append(offloaded(change))
        assert held["fast"] == held["plain"]
        assert elsewhere[0] == elsewhere[1]
        assert (fast.tally, fast.blocks, fast.block_size) == (plain.tally, plain.blocks, plain.block_size)


@given(st.binary(max_size=200), st.integers(0, 200), EVENTS)
def test_bytes_that_were_damaged_do_the_same_to_both(noise: bytes, at: int, event: Any) -> None:
    good = payload(event, STORED["vLLM 0.32, a map"])
    damaged = good[:at] + noise + good[at + len(noise) :]
    fast, plain = Follower().follow([damaged]), PlainFollower().follow([damaged])
    assert names(fast) == names(plain)


def test_a_table_that_grows_keeps_what_it_has() -> None:
    fast, rng = Follower(), np.random.default_rng(0)
    held: set[int] = set()
    for start in range(0, 6000, 100):
        keys, tokens = list(range(start + 1, start + 101)), rng.integers(0, 1 << 20, 400).tolist()
        held |= names(fast.follow([payload(["BlockStored", keys, None, tokens, 4, None])]))[2]
    assert len(held) == fast.blocks == 6000
    change = fast.follow([payload(["BlockRemoved", list(range(1, 6001))])])
    assert set(change.removed.tolist()) == held
    assert fast.blocks == 0
