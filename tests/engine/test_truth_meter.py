"""What real engines find in their caches against what the index predicts; clients see nothing of the asking."""

import re
from typing import Any

import pytest

BUCKET = re.compile(
    r'^vllm_llmd_prediction_error_tokens_bucket\{by="(\w+)",engine="decode-0",le="(\S+)"\} (\S+)$', re.M
)

CHAT = {
    "model": "m",
    "messages": [{"role": "user", "content": "what is cached? " * 12}],
    "max_tokens": 1,
    "temperature": 0,
}
"""Of one token, since vLLM may put several that are ready into one event."""


def errors(lab: Any) -> dict[tuple[str, float], float]:
    """How many predictions for the decode engine were in excess by at most so many tokens, by how they were made."""
    return {(by, float(le)): float(count) for by, le, count in BUCKET.findall(lab.router.get("/metrics"))}


def gained(lab: Any, before: dict[tuple[str, float], float], by: str) -> tuple[float, float, float]:
    """Predictions since `before` that were too low, exact, and too high."""
    now = errors(lab)
    low, exact, every = (now[by, at] - before.get((by, at), 0.0) for at in (-1.0, 0.0, float("inf")))
    return low, exact - low, every - exact


def streamed(client: Any, path: str, body: dict[str, Any], **options: Any) -> str:
    """The stream as it comes, but for what differs from request to request."""
    with client.open(path, {**body, "stream": True, **options}) as response:
        said = response.read().decode()
    return re.sub(r'"id":"[^"]*"', '"id":""', re.sub(r'"created":\d+', '"created":0', said))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [200, 192, 33, 32])
def test_token_ids_are_cached_just_as_predicted(lab, stream: bool, tokens: int) -> None:
    body = {"model": "m", "prompt": lab.prompt(tokens), "max_tokens": 4, "temperature": 0}
    before = errors(lab)
    for _ in range(3):
        if stream:
            streamed(lab.router, "/v1/completions", body)
        else:
            lab.router.post("/v1/completions", body)
        lab.until(lab.at_rest, "the request goes on")
    assert gained(lab, before, "tokens") == (0, 3, 0)


def test_a_prompt_that_grows_is_cached_just_as_predicted(lab) -> None:
    prompt, before = lab.prompt(500), errors(lab)
    for tokens in (100, 230, 310, 500):
        lab.router.post("/v1/completions", {"model": "m", "prompt": prompt[:tokens], "max_tokens": 4})
        lab.until(lab.at_rest, "the request goes on")
    assert gained(lab, before, "tokens") == (0, 4, 0)


def texts(lab: Any) -> float:
    """How many pieces of texts the router knows."""
    (chunks,) = re.findall(r"^vllm_llmd_text_chunks (\S+)$", lab.router.get("/metrics"), re.M)
    return float(chunks)


def test_text_that_was_seen_before_is_cached_as_predicted(lab) -> None:
    chat = {**CHAT, "messages": [{"role": "user", "content": "what is learned? " * 12}]}
    known = texts(lab)
    lab.router.post("/v1/chat/completions", chat)
    lab.until(lambda: texts(lab) > known, "the text is not learned")

    def is_predicted() -> bool:
        before = errors(lab)
        lab.router.post("/v1/chat/completions", chat)
        return gained(lab, before, "text") == (0, 1, 0)

    lab.until(is_predicted, "the blocks of the text are not in the index")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stream_options": None},
        {"stream_options": {"include_usage": False, "continuous_usage_stats": True}},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"n": 2, "temperature": 0.1, "seed": 1},
        {"logprobs": True, "top_logprobs": 2},
    ],
)
def test_a_client_streams_through_the_router_what_the_engine_alone_would_send(lab, options: dict[str, Any]) -> None:
    streamed(lab.router, "/v1/chat/completions", CHAT)  # cached from here on, and the fingerprint is known
    direct = streamed(lab.decode, "/v1/chat/completions", CHAT, **options)
    through = streamed(lab.router, "/v1/chat/completions", CHAT, **options)
    assert sorted(through.split("\n\n")) == sorted(direct.split("\n\n"))
    assert through == direct or options.get("n") == 2  # whose choices come in any order
    asked = bool((options.get("stream_options") or {}).get("include_usage"))
    assert ('"choices":[]' in through) == asked
    if not asked:
        assert '"usage"' not in through
        assert '"system_fingerprint":"vllm-' in through


def test_a_completion_streams_through_the_router_as_from_the_engine(lab) -> None:
    body = {"model": "m", "prompt": lab.prompt(100), "max_tokens": 1, "temperature": 0, "return_token_ids": True}
    streamed(lab.router, "/v1/completions", body)
    assert streamed(lab.router, "/v1/completions", body) == streamed(lab.decode, "/v1/completions", body)


def test_a_request_with_a_source_is_not_compared(lab) -> None:
    before = lab.engines()["decode-0"]["predictions"]["compared"]
    lab.router.post("/v1/completions", {"model": "m", "prompt": lab.prompt(1000), "max_tokens": 4})
    assert lab.engines()["decode-0"]["predictions"]["compared"] == before
    assert lab.engines()["decode-0"]["predictions"]["trust"] == "trusted"
