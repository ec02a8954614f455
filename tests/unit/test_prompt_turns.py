import itertools

from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.due import Rank
from vllm_llmd.kv_connector.turns import Prompt, Turns, follows


def prompt(name: str, due: int, hashes: str = "", computed: int = 0) -> Prompt:
    return Prompt(name, Rank(0, due), hashes or [f"{name} {at}" for at in range(9)], computed)


def test_a_prompt_stands_still_for_one_that_waits_and_is_due_earlier() -> None:
    assert Turns().held([prompt("long", 9)], [prompt("short", 1)]) == {"long"}
    assert Turns().held([prompt("long", 1)], [prompt("short", 9)]) == set()


def test_among_those_that_are_equally_due_nobody_stands_still() -> None:
    assert Turns().held([prompt("a", 0), prompt("b", 0)], [prompt("c", 0)]) == set()


def test_of_those_that_have_been_begun_all_stand_still_but_who_is_due_first() -> None:
    assert Turns().held([prompt("a", 3), prompt("b", 1), prompt("c", 2)], []) == {"a", "c"}
    assert Turns().held([prompt("a", 3), prompt("b", 1)], [prompt("c", 2)]) == {"a"}


def test_who_would_compute_the_same_waits_for_who_has_begun_to() -> None:
    leader, follower = prompt("leader", 9, "abcdef", 2), prompt("follower", 1, "abcdxy")
    turns = Turns()
    assert turns.held([leader], [follower]) == set()
    assert turns.must_wait(follower)
    assert not turns.must_wait(follower._replace(computed=4)), "all that they share is there"
    assert not turns.must_wait(prompt("stranger", 1, "uvw"))
    assert not turns.must_wait(leader), "it does not wait for itself"


def test_who_is_waited_for_is_due_when_those_are_that_wait() -> None:
    leader, follower = prompt("leader", 9, "abcdef", 2), prompt("follower", 1, "abcdxy")
    assert Turns().held([leader, prompt("other", 5)], [follower]) == {"other"}
    assert Turns().held([leader], [follower, prompt("other", 5)]) == set()


def test_what_has_been_computed_of_a_prompt_that_is_cut_short_is_followed_no_more() -> None:
    begun = prompt("leader", 9, "abc", 3)
    assert not follows(prompt("follower", 1, "abcdef"), begun)


def test_nobody_stands_still_again_after_a_step_in_which_that_was_of_no_use() -> None:
    turns, long, short = Turns(), prompt("long", 9), prompt("short", 1)
    assert turns.held([long], [short]) == {"long"}
    assert turns.held([long], [short]) == set(), "it was not begun: there is no room for it"
    assert turns.held([long], [short]) == {"long"}
    assert turns.held([long, short], []) == {"long"}, "it was"


def test_a_begun_prompt_stands_still_for_whoever_is_due_earlier_and_no_less_urgent() -> None:
    begun, urgent, less = prompt("begun", 5), prompt("urgent", 1), prompt("less", 1)
    assert Turns().held([begun], [urgent._replace(rank=Rank(-1, 1))]) == {"begun"}
    assert Turns().held([begun], [urgent._replace(rank=Rank(-1, 9))]) == set(), "it has blocks that others want"
    assert Turns().held([begun], [less._replace(rank=Rank(1, 1))]) == set()


def ranked(name: str, rank: Rank) -> Prompt:
    return prompt(name, 0)._replace(rank=rank)


ranks = st.builds(Rank, st.integers(0, 2), st.integers(0, 5))
begun_ones = st.lists(st.builds(ranked, st.sampled_from("abcdef"), ranks), max_size=6, unique_by=lambda p: p[0])
waiting_ones = st.lists(st.builds(ranked, st.sampled_from("uvwxyz"), ranks), max_size=6, unique_by=lambda p: p[0])


@given(begun_ones, waiting_ones)
def test_whoever_is_left_out_is_so_for_somebody_who_is_due_earlier_and_is_not(
    begun: list[Prompt], waiting: list[Prompt]
) -> None:
    held = Turns().held(begun, waiting)
    going = [each.rank for each in (*begun, *waiting) if each.request not in held]
    assert not begun or going
    for each in begun:
        assert (each.request in held) == any(other.before(each.rank) for other in going)


@given(st.lists(st.tuples(begun_ones, waiting_ones), max_size=20))
def test_in_two_steps_at_least_one_goes_on(steps: list[tuple[list[Prompt], list[Prompt]]]) -> None:
    """If who waits is not begun when all others are left out for it, they are not left out in the next step."""
    turns, begun = Turns(), [prompt("a", 9)]
    stood_still = [turns.held(begun, [prompt("z", 0), *waiting]) for _, waiting in steps for _ in range(2)]
    assert all(not (one and two) for one, two in itertools.pairwise(stood_still))
