"""Who is due first goes first at a real engine: by vLLM's order, and by prompts that stand still. Less is more urgent.

The engine's steps are of 16 tokens.
"""

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

LONG = 7800
"""So long that a fast engine still computes it when a heartbeat has told of it, and for a while after that."""
LATE, EARLY = 1000, 10


def begun(lab, pool: ThreadPoolExecutor, prompt: list[int]) -> "Future[list[int]]":
    """A long prompt that is due late, of which something has been computed and most has not."""
    answer = pool.submit(lab.slow.complete, prompt, priority=LATE)
    lab.until(lambda: 0 < lab.engines()["slow-0"]["load"]["prefill_tokens"] < LONG, "the long prompt is not begun")
    return answer


def test_a_short_prompt_is_answered_while_a_long_one_that_is_due_later_stands_still(lab) -> None:
    long, short, gained = lab.prompt(LONG), lab.prompt(300), lab.gained(lab.slow)
    with ThreadPoolExecutor() as pool:
        first = begun(lab, pool, long)
        second = pool.submit(lab.slow.complete, short, priority=EARLY)
        done, _ = wait((first, second), return_when=FIRST_COMPLETED)
        assert second in done and first not in done
    assert gained("prompts_held") >= 300 / 16
    assert first.result() == lab.decode.alone(long)
    assert second.result() == lab.decode.alone(short)


def test_nothing_stands_still_for_who_is_due_later_or_says_nothing(lab) -> None:
    long, short, gained = lab.prompt(LONG), lab.prompt(300), lab.gained(lab.slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(lab.slow.complete, long)
        lab.until(lambda: lab.engines()["slow-0"]["load"]["prefill_tokens"] > 0, "the long prompt is not begun")
        second = pool.submit(lab.slow.complete, short)
        third = pool.submit(lab.slow.complete, lab.prompt(40), priority=LATE)
        wait((first, second, third))
    assert gained("prompts_held") == 0
    assert first.result() == lab.decode.alone(long)
    assert second.result() == lab.decode.alone(short)


def test_a_prompt_that_is_being_computed_is_not_computed_by_another_that_is_due_earlier(lab) -> None:
    text, short = lab.prompt(LONG), lab.prompt(300)
    leader, follower = text + lab.prompt(40), text + lab.prompt(50)
    with ThreadPoolExecutor() as pool:
        first = begun(lab, pool, leader)
        second = pool.submit(lab.slow.answer, follower, {}, priority=EARLY)
        third = pool.submit(lab.slow.complete, short, priority=EARLY + 1)
        wait((first, second, third))
    assert second.result().cached >= LONG // 32 * 32
    assert first.result() == lab.decode.alone(leader)
    assert second.result().tokens == lab.decode.alone(follower)
    assert third.result() == lab.decode.alone(short)


def test_a_source_that_stands_still_for_others_supplies_the_prompt_all_the_same(lab) -> None:
    prompt, short, gained, held = lab.prompt(LONG), lab.prompt(300), lab.gained(lab.decode), lab.gained(lab.slow)
    with ThreadPoolExecutor() as pool:
        hint = {"sources": [{"engine": "slow-0", "priority": LATE}]}
        first = pool.submit(lab.decode.answer, prompt, hint)
        lab.until(lambda: 0 < lab.engines()["slow-0"]["load"]["prefill_tokens"] < LONG, "the order is not begun")
        second = pool.submit(lab.slow.complete, short, priority=EARLY)
        wait((first, second))
    assert first.result().tokens == lab.decode.alone(prompt)
    assert second.result() == lab.decode.alone(short)
    assert (gained("orders"), gained("orders_failed")) == (1, 0)
    assert held("prompts_held") >= 300 / 16
