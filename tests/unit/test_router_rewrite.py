import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_llmd.router.request import RequestError, parse_body, read_facts
from vllm_llmd.router.upstream.rewrite import (
    HINT_KEY,
    asking_for_usage,
    request_headers,
    response_headers,
    uncompressed,
    unsized,
    with_hint,
)

HINT = {"llmd": {"request": "r-1", "source": "p"}}

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = st.text(max_size=6) | st.sampled_from([HINT_KEY, "vllm_xargs", "model", "KV_Transfer_Params"])
xargs = st.fixed_dictionaries({"vllm_xargs": st.dictionaries(keys, values, max_size=3) | values})
bodies = st.tuples(st.dictionaries(keys, values, max_size=5), xargs | st.just({})).map(lambda pair: pair[0] | pair[1])
spaces = st.text(" \t\r\n", max_size=3)


@st.composite
def spelled(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A JSON object, and one of the many ways to write it: spacing, escapes, keys given twice."""
    body = draw(bodies)
    members = []
    for key, value in body.items():
        written = json.dumps(key)
        if draw(st.booleans()):
            written = '"' + "".join(f"\\u{ord(unit):04x}" if ord(unit) < 0x10000 else unit for unit in key) + '"'
        if draw(st.booleans()):
            members.append(f"{written}: {json.dumps('given before')}")
        members.append(f"{written}{draw(spaces)}:{json.dumps(value, ensure_ascii=draw(st.booleans()))}")
    text = draw(spaces) + "{" + draw(spaces) + ",".join(members) + draw(spaces) + "}" + draw(spaces)
    return body, text.encode()


def cleaned(body: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in body.items() if key != HINT_KEY}
    if isinstance(kept.get("vllm_xargs"), dict):
        kept["vllm_xargs"] = {key: value for key, value in kept["vllm_xargs"].items() if key != HINT_KEY}
    return kept


@given(spelled())
def test_any_body_gets_our_hint_keeps_its_meaning_and_loses_the_clients_own_hint(
    case: tuple[dict[str, Any], bytes],
) -> None:
    body, raw = case
    sent = with_hint(raw, parse_body(raw), HINT)
    assert json.loads(sent) == {**cleaned(body), HINT_KEY: HINT}
    top = json.loads(sent, object_pairs_hook=lambda pairs: pairs)
    assert [key for key, _ in top].count(HINT_KEY) == 1


@given(st.dictionaries(st.text(max_size=4), values), spaces)
def test_a_body_without_the_key_keeps_every_byte(body: dict[str, Any], space: str) -> None:
    raw = (json.dumps(body, indent=1, ensure_ascii=False) + space).encode("utf-8", "surrogatepass")
    if b"\\u00" in raw:
        return
    sent = with_hint(raw, body, HINT)
    assert sent.startswith(raw.rstrip()[:-1].rstrip())


@pytest.mark.parametrize("raw", [b"{}", b" { } \n", b'{"a":1}', b'{"a":{}}\n\n'])
def test_the_hint_is_spliced_in_before_the_last_brace(raw: bytes) -> None:
    assert json.loads(with_hint(raw, json.loads(raw), HINT)) == {**json.loads(raw), HINT_KEY: HINT}


@given(st.dictionaries(st.text(max_size=4), values), spaces)
def test_asking_for_the_usage_of_a_stream_keeps_every_byte_of_the_request(body: dict[str, Any], space: str) -> None:
    body = {**body, "stream": True}
    raw = (json.dumps(body, indent=1, ensure_ascii=False) + space).encode("utf-8", "surrogatepass")
    asked = asking_for_usage(raw, body)
    assert asked is not None
    assert asked[0].startswith(raw.rstrip()[:-1].rstrip())
    assert json.loads(asked[0]) == asked[1] == {**body, "stream_options": {"include_usage": True}}
    assert json.loads(with_hint(*asked, HINT)) == {**cleaned(dict(asked[1])), HINT_KEY: HINT}


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (None, {"include_usage": True}),
        ({}, {"include_usage": True}),
        ({"include_usage": None}, {"include_usage": True}),
        ({"include_usage": False, "other": 1}, {"include_usage": True, "other": 1}),
        ({"continuous_usage_stats": True}, {"include_usage": True, "continuous_usage_stats": False}),
        (
            {"include_usage": False, "continuous_usage_stats": True},
            {"include_usage": True, "continuous_usage_stats": False},
        ),
    ],
)
def test_stream_options_of_the_clients_own_are_kept_but_for_what_would_show(options: Any, asked: Any) -> None:
    body = {"stream": True, "stream_options": options, "n": 1}
    raw = json.dumps(body).replace('"stream_options"', '"str\\u0065am_options"').encode()
    found = asking_for_usage(raw, parse_body(raw))
    assert found is not None
    pairs = json.loads(found[0], object_pairs_hook=lambda pairs: pairs)
    assert [key for key, _ in pairs] == ["stream", "stream_options", "n"]
    assert json.loads(found[0]) == found[1] == {**body, "stream_options": asked}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"stream": False},
        {"stream": None},
        {"stream": "true"},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_usage": "yes"}},
        {"stream": True, "stream_options": "nonsense"},
        {"stream": True, "stream_options": False},
    ],
)
def test_usage_is_asked_for_in_streams_alone_and_only_where_the_client_did_not(body: dict[str, Any]) -> None:
    assert asking_for_usage(json.dumps(body).encode(), body) is None


def test_an_answer_to_be_read_comes_uncompressed_and_one_that_shrinks_without_its_size() -> None:
    sent = [("Accept-Encoding", "gzip"), ("content-length", "5"), ("X-Custom", "1")]
    assert uncompressed(sent) == sent[1:]
    assert unsized(sent) == [sent[0], sent[2]]


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b'"x"', b"{", b"\xff{}", b'{"a":}', b"[" * 100_000])
def test_a_body_that_is_no_object_is_an_error(raw: bytes) -> None:
    with pytest.raises(RequestError):
        parse_body(raw)


junk = st.sampled_from(
    [
        "{", "}", "[", "]", ",", ":", '"', "\\", "\\u", "\\ud800", "\\udc00", "\\u0000", "\x00", "\x1f", "\x7f",
        "é", "\ufeff", "0", "-", "+", ".", "1e5", "1e400", "01", "-0", "9" * 30, "NaN", "-Infinity", "null", "nul", " ",
        "\x0c", "'", "/", '"a":', '"a"', "{}", "\u2028", "0.1", "5e-324", "2.2250738585072011e-308",
    ]
).map(str.encode) | st.sampled_from([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"])  # fmt: skip


@given(
    spelled().map(lambda case: case[1]) | st.just(b'{"a":}'), st.lists(st.tuples(st.integers(0, 99), junk), max_size=3)
)
def test_a_body_is_read_as_an_engine_reads_it_or_refused_as_one_refuses_it(
    raw: bytes, put_in: list[tuple[int, bytes]]
) -> None:
    for at, what in put_in:
        raw = raw[:at] + what + raw[at:]
    try:
        wanted = json.loads(raw.decode())
    except ValueError:
        wanted = None
    if isinstance(wanted, dict):
        assert repr(parse_body(raw)) == repr(wanted)
    else:
        with pytest.raises(RequestError):
            parse_body(raw)


def test_a_message_nested_too_deeply_is_refused() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RequestError, match="too deeply"):
        read_facts("chat", {"messages": [{"role": "user", "extra": deep}]})


def test_withheld_headers_do_not_pass_and_others_do_with_their_duplicates() -> None:
    sent = [
        ("Host", "h"), ("Content-Length", "9"), ("Connection", "keep-alive, X-Hop"), ("X-Hop", "1"), ("TE", "x"),
        ("X-LLMD-Anything", "1"), ("x-llm-d-x", "1"), ("X-Forwarded-For", "1"), ("Forwarded", "1"),
        ("x-gateway-destination-endpoint", "1"), ("X-Real-IP", "1"), ("X-Request-Id", "theirs"),
        ("Authorization", "Bearer k"), ("X-Custom", "1"), ("X-Custom", "2"),
    ]  # fmt: skip
    assert request_headers(sent, "ours") == [
        ("Authorization", "Bearer k"), ("X-Custom", "1"), ("X-Custom", "2"), ("X-Request-Id", "ours")
    ]  # fmt: skip


def test_an_engines_headers_pass_but_for_those_about_the_connection() -> None:
    sent = [("Content-Type", "text/plain"), ("Transfer-Encoding", "chunked"), ("Set-Cookie", "a"), ("Set-Cookie", "b")]
    assert response_headers(sent) == [sent[0], *sent[2:]]


def test_chats_that_share_a_beginning_share_their_text_and_what_renders_it_is_in_the_seed() -> None:
    turn = {"role": "user", "content": "hi"}
    one = read_facts("chat", {"model": "m", "messages": [turn]})
    two = read_facts("chat", {"messages": [turn, {"role": "assistant", "content": "yes"}], "model": "m", "n": 2})
    assert two.text.startswith(one.text) and one.seed == two.seed
    for field in ({"model": "other"}, {"cache_salt": "s"}, {"chat_template_kwargs": {"a": 1}}):
        other = read_facts("chat", {"model": "m", "messages": [turn], **field})
        assert other.seed != one.seed
    assert read_facts("chat", {"model": "m", "messages": [turn], "tools": [{"a": 1}]}).text != one.text


def test_the_spelling_of_a_body_does_not_change_its_text_but_the_order_within_a_tool_does() -> None:
    one = b'{"messages": [{"role": "user", "content": "caf\xc3\xa9"}, {"role":"a","content":null,"x":1}]}'
    two = b'{"messages":[{"content":"caf\\u00e9","role":"user"},{"x":1,"content":null,"role":"a"}]}'
    assert read_facts("chat", parse_body(one)).text == read_facts("chat", parse_body(two)).text
    tools = [[{"a": 1, "b": 2}], [{"b": 2, "a": 1}]]
    assert len({read_facts("chat", {"messages": [], "tools": each}).text for each in tools}) == 2


def test_of_several_prompts_the_longest_counts() -> None:
    one = read_facts("completion", {"prompt": "y" * 80})
    three = read_facts("completion", {"prompt": ["x" * 40, "y" * 80, [7]]})
    assert (three.text, three.seed, three.prompts, one.prompts) == (one.text, one.seed, 3, 1)


def test_an_image_counts_by_its_content_but_not_by_its_bytes() -> None:
    def with_image(data: str) -> bytes:
        content = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": data}}]
        return read_facts("chat", {"messages": [{"role": "user", "content": content}]}).text

    assert len(with_image("x" * 100_000)) < 300
    assert with_image("x" * 100_000) != with_image("y" * 100_000)


@pytest.mark.parametrize(
    ("prompt", "tokens", "count"),
    [
        ("x" * 40, None, 10),
        ([1, 2, 3], [1, 2, 3], 3),
        ([[1, 2, 3]], [1, 2, 3], 3),
        (["x" * 40], None, 10),
        (["x" * 40, "y" * 80], None, 20),
        ([[1], [1, 2]], [1, 2], 2),
        ([1, -5], None, 0),
        (None, None, 0),
    ],
)
def test_a_prompt_is_read_as_tokens_or_text_with_an_estimate_of_its_length(
    prompt: Any, tokens: list[int] | None, count: int
) -> None:
    facts = read_facts("completion", {"prompt": prompt})
    assert (facts.tokens and list(facts.tokens)) == tokens
    assert facts.prompt_tokens == count


@pytest.mark.parametrize(("body", "param"), [({"model": 1, "messages": []}, "model"), ({"messages": "x"}, "messages")])
def test_what_the_router_cannot_read_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_facts("chat", body)
    assert caught.value.param == param
