"""Room for the bodies of requests."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.router.waiting.bodies import SMALL_BYTES, Bodies, BodyTooLarge, Hold, NoRoomForBody

GIB = 1 << 30
MIB = 1 << 20


def held(bodies: Bodies, size_bytes: int) -> Hold:
    hold = bodies.hold()
    hold.reach(size_bytes)
    return hold


def test_bodies_have_room_until_it_is_taken_and_again_when_one_goes() -> None:
    bodies = Bodies(800 * MIB, 100 * MIB)
    holds = [held(bodies, 100 * MIB) for _ in range(7)]
    with pytest.raises(NoRoomForBody):
        held(bodies, 100 * MIB)
    assert bodies.size_bytes == 700 * MIB
    holds[0].let_go()
    held(bodies, 100 * MIB)


def test_giants_leave_room_to_small_ones() -> None:
    bodies = Bodies(GIB, 64 * MIB)
    giants = 0
    while True:
        try:
            held(bodies, 64 * MIB)
        except NoRoomForBody:
            break
        giants += 1
    assert giants == 14
    small = [held(bodies, SMALL_BYTES) for _ in range(128)]
    assert bodies.size_bytes == GIB
    with pytest.raises(NoRoomForBody):
        held(bodies, 1)
    small[0].let_go()
    held(bodies, 1)


@pytest.mark.parametrize(("most", "largest", "taken"), [(GIB, 64 * MIB, 64 * MIB), (MIB, 64 * MIB, MIB * 7 // 8)])
def test_a_body_that_can_never_have_room_is_too_large(most: int, largest: int, taken: int) -> None:
    bodies = Bodies(most, largest)
    assert bodies.largest_bytes == taken
    held(bodies, taken).let_go()
    with pytest.raises(BodyTooLarge):
        held(bodies, taken + 1)


def test_a_body_that_grows_is_large_from_when_it_is() -> None:
    bodies = Bodies(GIB, 64 * MIB)
    for _ in range(14):
        held(bodies, 64 * MIB)
    grows = held(bodies, SMALL_BYTES)
    with pytest.raises(NoRoomForBody):
        grows.reach(SMALL_BYTES + 1)
    assert bodies.size_bytes == 14 * 64 * MIB + SMALL_BYTES
    grows.let_go()
    assert bodies.size_bytes == 14 * 64 * MIB


def test_what_is_let_go_twice_counts_once() -> None:
    bodies = Bodies(GIB, GIB)
    stays = held(bodies, 5)
    with bodies.hold() as goes:
        goes.reach(7)
        goes.let_go()
    assert bodies.size_bytes == 5
    stays.let_go()
    assert bodies.size_bytes == 0


@dataclass
class Truth:
    """The same by hand: the size of each body that is there."""

    sizes: dict[int, int] = field(default_factory=dict)


@given(
    most=st.integers(1, 10_000),
    largest=st.integers(1, 10_000),
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 5000)), max_size=60),
)
def test_what_is_counted_is_what_is_there_and_never_more_than_there_may_be(
    most: int, largest: int, steps: list[tuple[int, int]]
) -> None:
    bodies, truth = Bodies(most, largest), Truth()
    holds: dict[int, Hold] = {}
    for body, size in steps:
        hold = holds.setdefault(body, bodies.hold())
        if size < 0:
            hold.let_go()
            truth.sizes[body] = 0
            continue
        try:
            hold.reach(size)
            truth.sizes[body] = max(size, truth.sizes.get(body, 0))
        except BodyTooLarge:
            assert size > bodies.largest_bytes
        except NoRoomForBody:
            assert sum(truth.sizes.values()) - truth.sizes.get(body, 0) + size > most - most // 8
        assert bodies.size_bytes == sum(truth.sizes.values()) <= most
    for hold in holds.values():
        hold.let_go()
    assert bodies.size_bytes == 0
