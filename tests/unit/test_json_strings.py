"""Long strings taken out of JSON: the kernel and its plain twin, and what is read from what is left."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_llmd.kernels import json_strings, json_strings_cpu
from vllm_llmd.router.request import LONG_STRING_BYTES, RequestError, parse_body, read_facts, skim
from vllm_llmd.router.upstream.rewrite import HINT_KEY, asking_for_usage, with_hint

STEM = b"-stem-"
LEAST = 16

pieces = st.sampled_from(
    [
        b'"', b'"', b"\\", b'\\"', b"\\n", b"\\u00e9", b"\\ud83d", b"\\u12", b"\\x", b"a" * 7, b"b" * 40, b" ", b"{",
        b":", b"\x1f", b"\x00", b"\x7f", b"\xff", b"\xc3", b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80",
        b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xf8", STEM, b"-stem-00000000", *map(str.encode, "é中😀"),
    ]
)  # fmt: skip


@settings(max_examples=500)
@given(st.lists(pieces, max_size=25).map(b"".join))
def test_the_compiled_kernel_does_what_the_plain_one_does_with_any_bytes(raw: bytes) -> None:
    assert json_strings_cpu.hollow(raw, STEM, LEAST) == json_strings.hollow(raw, STEM, LEAST)


strings = st.sampled_from(
    ["short", "x" * 2000, 'a"\\\n\u2028é中😀' * 300, "y" * 1023, "z" * 1024, "vllm-llmd-long-string-00000000"]
)
values = st.recursive(
    st.none() | st.integers() | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries({"role": strings, "content": values}, optional={"tool_calls": values, "name": strings}),
    max_size=4,
)
bodies = st.fixed_dictionaries(
    {"messages": messages}, optional={"model": strings, "cache_salt": strings, "tools": values}
)


@settings(max_examples=200)
@given(bodies)
def test_facts_are_those_of_the_whole_body_where_it_is_spelled_as_most_spell_it(body: dict[str, Any]) -> None:
    raw = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    assert read_facts("chat", *skim(raw)) == read_facts("chat", parse_body(raw))


def long_body(**more: Any) -> tuple[bytes, dict[str, Any]]:
    body = {"model": "m", "prompt": "text\n" * LONG_STRING_BYTES, **more}
    return json.dumps(body).encode(), body


def test_a_long_prompt_is_not_read_but_found_where_it_stands() -> None:
    raw, body = long_body()
    skimmed = skim(raw)
    [(mark, written)] = skimmed.long.items()
    assert skimmed.body == {"model": "m", "prompt": mark}
    assert json.loads(b'"' + bytes(written) + b'"') == body["prompt"]


@pytest.mark.parametrize("forged", ["vllm-llmd-long-string-00000000", "\\u0076llm-llmd-long-string-00000000"])
def test_a_string_that_reads_like_a_mark_is_what_it_is(forged: str) -> None:
    raw = long_body()[0].replace(b'"m"', b'"' + forged.encode() + b'"')
    facts = read_facts("completion", *skim(raw))
    assert facts.model == "vllm-llmd-long-string-00000000"
    assert facts.prompt_tokens > LONG_STRING_BYTES


def test_what_is_sent_on_has_its_long_strings_however_it_is_written() -> None:
    for more in (
        {},
        {"vllm_xargs": {HINT_KEY: 1, "a": 2}},
        {HINT_KEY: 1},
        {"stream": True},
        {"stream_options": {}, "stream": True},
    ):
        raw, body = long_body(**more)
        skimmed = skim(raw)
        sent, as_body = asking_for_usage(raw, skimmed.body) or (raw, skimmed.body)
        read = json.loads(with_hint(sent, as_body, {"llmd": {}}))
        assert read["prompt"] == body["prompt"] and read[HINT_KEY] == {"llmd": {}}
        assert read.get("vllm_xargs") in (None, {"a": 2})


@pytest.mark.parametrize("end", [b"", b"}}", b",}", b'"', b"\x00"])
def test_a_wrong_body_is_refused_with_the_place_where_it_is_wrong(end: bytes) -> None:
    raw = long_body()[0][:-1] + end
    with pytest.raises(RequestError) as whole:
        parse_body(raw)
    with pytest.raises(RequestError, match=r"^the request body") as skimmed:
        skim(raw)
    assert str(skimmed.value) == str(whole.value)
