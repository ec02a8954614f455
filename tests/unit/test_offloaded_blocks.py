"""Offloaded blocks by name, from events that tell of hashes alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.kernels.block_names import BlockNamer, Cleared, NetChange, Removed, Stored
from vllm_llmd.kernels.offloaded_blocks import Dropped, Offloaded, OffloadedBlocks
from vllm_llmd.names import BlockName, Tier

KNOWN = {h: BlockName(100 + h) for h in range(8)}

hashes = st.lists(st.integers(0, 9), max_size=5).map(tuple)
tiers = st.sampled_from(["cpu", "disk"])
events = st.builds(Offloaded, tiers, hashes) | st.builds(Dropped, tiers, hashes)


@given(st.lists(st.lists(events, max_size=4) | st.none(), max_size=12))
def test_routers_end_up_with_what_each_tier_holds_at_least_once(steps: list[list[Offloaded | Dropped] | None]) -> None:
    blocks = OffloadedBlocks(KNOWN.get)
    told: dict[Tier, set[int]] = {"cpu": set(), "disk": set()}
    copies: dict[Tier, dict[int, int]] = {"cpu": {}, "disk": {}}
    for step in steps:
        for event in step or ():
            for h in event.hashes:
                if h in KNOWN:
                    count = copies[event.tier].get(h, 0) + (1 if isinstance(event, Offloaded) else -1)
                    copies[event.tier][h] = max(count, 0)
        if step is None:
            copies = {"cpu": {}, "disk": {}}
        for tier, change in (blocks.clear() if step is None else blocks.apply(step)).items():
            assert not change.removed & change.stored
            assert change.removed <= told[tier]
            assert not change.stored & (told[tier] - change.removed)
            told[tier] = (set() if change.cleared else told[tier] - change.removed) | change.stored
        for tier, held in copies.items():
            assert told[tier] == {KNOWN[h] for h, count in held.items() if count}


def test_a_block_without_a_name_is_counted_and_kept_from_routers() -> None:
    blocks = OffloadedBlocks(KNOWN.get)
    assert blocks.apply([Offloaded("cpu", (1, 99))]) == {"cpu": NetChange(stored={KNOWN[1]})}
    assert blocks.unnamed == 1
    assert blocks.apply([Dropped("cpu", (99,))]) == {"cpu": NetChange()}


@pytest.mark.parametrize("gone", [Removed(("h",)), Cleared()])
def test_a_block_that_has_just_left_the_gpu_still_has_its_name(gone: Removed | Cleared) -> None:
    namer = BlockNamer(2)
    namer.apply([Stored(("h",), None, [1, 2], None)])
    name = namer.name_of("h")
    assert name is not None
    namer.apply([gone])
    assert namer.name_of("h") == name
    assert OffloadedBlocks(namer.name_of).apply([Offloaded("cpu", ("h",))])["cpu"].stored == {name}
