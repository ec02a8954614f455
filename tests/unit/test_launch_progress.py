"""What a person sees while engines load."""

import io

from rich.console import Console

from vllm_llmd.fleet import Status
from vllm_llmd.launch_progress import shown_on
from vllm_llmd.testing.clock import FakeClock


def test_off_a_terminal_each_change_is_one_line() -> None:
    out, clock = io.StringIO(), FakeClock()
    loading, ready = Status("a", "decode", "loading", "weights"), Status("a", "decode", "ready", "")
    with shown_on(Console(file=out), clock) as progress:
        progress([loading])
        progress([loading])
        clock.advance(12_000)
        progress([ready])
    assert out.getvalue().splitlines() == ["a (decode): loading, 0 s", "a (decode): ready, 12 s"]


def test_on_a_terminal_a_table_shows_what_each_engine_does() -> None:
    out = io.StringIO()
    with shown_on(Console(file=out, force_terminal=True, width=100), FakeClock()) as progress:
        progress([Status("a", "decode", "loading", "reading [weights]"), Status("b", "both", "ready", "unseen")])
    last = out.getvalue()
    assert "reading [weights]" in last
    assert "ready" in last
    assert "unseen" not in last
