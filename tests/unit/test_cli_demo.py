"""The demo's arithmetic, without engines."""

import io
from typing import Any

import pytest

from vllm_llmd import demo
from vllm_llmd.demo import Answer, Round
from vllm_llmd.errors import LaunchError

READ = {"kv_bytes_read": 10, "kv_ranges": 4, "ranges_read_before_prefill_ended": 3}


def rounds(*texts: tuple[str, str]) -> list[Round]:
    return [Round(Answer(one, 10.0 * n), Answer(other, 20.0 * n)) for n, (one, other) in enumerate(texts, start=1)]


def test_it_reports_medians_the_answer_and_the_counters() -> None:
    paris = "It is Paris."
    assert demo.report(rounds((paris, paris), (paris, paris), (paris, paris)), READ) == {
        "ok": True,
        "identical": True,
        "answer": paris,
        "ttft_ms": {"one_engine": 20.0, "disaggregated": 40.0},
        **READ,
    }


@pytest.mark.parametrize(
    ("texts", "change"),
    [
        (("Paris", "Paris!"), {}),
        (("Rome", "Rome"), {}),
        (("Paris", "Paris"), {"kv_bytes_read": 0}),
        (("Paris", "Paris"), {"ranges_read_before_prefill_ended": 0}),
    ],
)
def test_it_is_not_ok_unless_the_answer_is_right_alike_and_streamed(
    texts: tuple[str, str], change: dict[str, int]
) -> None:
    assert not demo.report(rounds(texts), {**READ, **change})["ok"]


def test_prompts_differ_within_their_first_words() -> None:
    beginnings = {demo.messages(number)[0]["content"][:40] for number in range(20)}
    assert len(beginnings) == 20


def test_only_pieces_with_text_count() -> None:
    stream = (
        b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
        b'data: {"choices": [{"delta": {"content": "Par"}}]}\n\n: a comment\n'
        b'data: {"choices": [{"delta": {"content": "is"}}]}\n\ndata: {"choices": []}\n\ndata: [DONE]\n\n'
    )
    assert list(pieces(stream)) == ["Par", "is"]


def test_an_error_in_the_stream_is_an_error() -> None:
    with pytest.raises(LaunchError, match="the answer broke off"):
        list(pieces(b'data: {"error": {"message": "gone"}}\n\n'))


def pieces(stream: bytes) -> Any:
    return demo._pieces(io.BytesIO(stream))  # type: ignore[arg-type]
