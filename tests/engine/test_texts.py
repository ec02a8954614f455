"""Texts before a real engine: what the router makes of them is what vLLM makes of them."""

import re

import pytest

SYSTEM = {"role": "system", "content": "You answer in one word. " * 20}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
ODD = "caf\u00e9 \u4e2d\u6587 \U0001f600\n\n\t<|im_end|> {{ x }} <s>  two  spaces\r\n" * 20


def chat(*messages: dict, **more: object) -> tuple[str, dict]:
    return "/v1/chat/completions", {"messages": list(messages), **more}


def user(content: object) -> dict:
    return {"role": "user", "content": content}


CASES = {
    "one question": chat(user("What is the capital of France? " * 20)),
    "a system prompt": chat(SYSTEM, user("Where is Paris?")),
    "several turns": chat(SYSTEM, user("Where?"), {"role": "assistant", "content": "In France."}, user("Sure?")),
    "text in parts": chat(SYSTEM, user([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])),
    "tools": chat(
        SYSTEM,
        user("What is the weather?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call-1", "content": "sunny"},
        tools=[TOOL],
        tool_choice="none",
    ),
    "odd characters": chat(user(ODD)),
    "template arguments": chat(user("x " * 200), add_generation_prompt=False, chat_template_kwargs={"a": 1}),
    "special tokens asked for": chat(user("y " * 200), add_special_tokens=True),
    "a cache salt": chat(user("z " * 200), cache_salt="tenant"),
    "a completion": ("/v1/completions", {"prompt": "The capital of France is not " * 30}),
    "a completion of odd characters": ("/v1/completions", {"prompt": ODD}),
    "a completion without special tokens": ("/v1/completions", {"prompt": "a b c " * 60, "add_special_tokens": False}),
}


def counted(lab, line: str) -> float:
    found = re.search(rf"^{re.escape(line)} (\S+)$", lab.router.get("/metrics"), re.MULTILINE)
    return float(found.group(1)) if found else 0.0


@pytest.mark.parametrize("case", CASES)
def test_the_routers_names_are_the_engines_and_the_next_request_finds_them(texts, case: str) -> None:
    path, body = CASES[case]
    names = 'vllm_llmd_exact_names_total{result="%s"}'
    agreed, other = counted(texts, names % "agree"), counted(texts, names % "disagree")
    for _ in range(2):
        texts.router.post(path, {"model": "m", "max_tokens": 2, "temperature": 0, **body})
    texts.until(lambda: counted(texts, names % "agree") == agreed + 2, "the names do not agree, or have not come")
    assert counted(texts, names % "disagree") == other
    assert counted(texts, 'vllm_llmd_exact_prompts_total{result="unsupported"}') == 0
