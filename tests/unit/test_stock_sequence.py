"""Gaps, duplicates and new lives in a stock engine's messages."""

from vllm_llmd.router.stock.sequence import Sequence


def test_messages_in_order_are_taken() -> None:
    sequence = Sequence()
    assert [sequence.live(number) for number in range(3)] == ["take", "take", "take"]


def test_a_message_too_far_on_is_a_gap_until_the_replay_has_closed_it() -> None:
    sequence = Sequence()
    assert sequence.live(0) == "take"
    assert sequence.live(3) == "gap"
    assert [sequence.replayed(number) for number in (1, 2, 3, 4)] == ["take", "take", "take", "take"]
    assert [sequence.live(number) for number in (3, 4, 5)] == ["old", "old", "take"]


def test_who_joins_late_has_a_gap() -> None:
    assert Sequence().live(7) == "gap"


def test_a_truncated_replay_has_a_hole() -> None:
    sequence = Sequence()
    assert sequence.replayed(5) == "hole"
    sequence.pass_over(5)
    assert sequence.replayed(5) == "take"
    assert sequence.replayed(4) == "old"


def test_a_number_that_does_not_grow_tells_of_a_new_life() -> None:
    sequence = Sequence()
    for number in range(5):
        sequence.live(number)
    assert sequence.live(4) == "restart"
    assert sequence.live(0) == "restart"
    sequence.restart()
    assert sequence.live(0) == "take"


def test_a_new_life_is_seen_although_the_replay_was_ahead() -> None:
    sequence = Sequence()
    assert [sequence.replayed(number) for number in range(10)] == ["take"] * 10
    assert sequence.live(8) == "old"
    assert sequence.live(2) == "restart"
