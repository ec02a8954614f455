"""Which streams can be continued on another engine after a break, and what that engine is asked. Pure.

Strict: a request is continued only if every field of it is known to leave the answer exactly what one engine would
have given. The ids of its tokens come from the engines, which the router asks for them.
"""

import json
from array import array
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import Any, Final

from vllm_llmd.router.request import Facts, Kind, parse_body


class Way(Enum):
    """`RESUME`: the prompt and the tokens sent are the next engine's prompt. `REPLAY`: it answers from the beginning,
    and what it says again is compared and left out.
    """

    RESUME = "resume"
    REPLAY = "replay"


LONGEST_PROMPT_TOKENS: Final = 32_768
"""Engines return the ids of the whole prompt: for longer ones that is not worth its time."""

_RESUMABLE: Final = frozenset(
    (
        "model", "prompt", "stream", "stream_options", "temperature", "max_tokens", "n", "best_of", "seed", "user",
        "top_p", "top_k", "min_p", "stop_token_ids", "ignore_eos", "logit_bias", "allowed_token_ids",
        "skip_special_tokens", "add_special_tokens", "cache_salt", "priority", "return_token_ids",
        "kv_transfer_params", "request_id", "session_id",
    )
)  # fmt: skip
"""Fields that mean the same for the rest of an answer as for all of it."""

_REPEATABLE: Final = _RESUMABLE | frozenset(
    (
        "messages", "max_completion_tokens", "stop", "include_stop_str_in_output", "min_tokens", "presence_penalty",
        "frequency_penalty", "repetition_penalty", "bad_words", "spaces_between_special_tokens",
        "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "reasoning_effort", "documents",
    )
)  # fmt: skip
"""Fields with which an answer given again is the same."""

_WITHOUT_EFFECT: Final[Mapping[str, tuple[Any, ...]]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
}


def way_to_continue(kind: Kind, body: Mapping[str, Any], facts: Facts) -> Way | None:
    """How the stream that answers this request is continued, if it breaks; None if it cannot be, exactly."""
    fields = {name for name, value in body.items() if not _has_no_effect(name, value)}
    if body.get("stream") is not True or not fields <= _REPEATABLE or facts.prompts != 1:
        return None
    if any(body.get(name) not in (None, 1) for name in ("n", "best_of")):
        return None
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping) or options.get("continuous_usage_stats"):
        return None
    if facts.prompt_tokens > LONGEST_PROMPT_TOKENS:
        return None
    greedy = _is_number(body.get("temperature")) and body["temperature"] == 0
    if not greedy:
        return Way.REPLAY if type(body.get("seed")) is int else None
    resumable = kind == "completion" and fields <= _RESUMABLE and type(body.get("max_tokens")) is int
    return Way.RESUME if resumable else Way.REPLAY


def rest_of(raw: bytes, prompt: "array[int]", sent: "array[int]") -> bytes:
    """The request for what comes after the tokens `sent`."""
    body = parse_body(raw)
    return json.dumps({**body, "prompt": [*prompt, *sent], "max_tokens": body["max_tokens"] - len(sent)}).encode()


def rest_facts(facts: Facts, prompt: "array[int]", sent: "array[int]") -> Facts:
    """The facts of that request."""
    tokens = prompt + sent
    return replace(facts, tokens=tokens, text=tokens.tobytes(), prompt_tokens=len(tokens), tokenized=False)


def _has_no_effect(name: str, value: Any) -> bool:
    return value is None or value is False or value in ([], {}) or value in _WITHOUT_EFFECT.get(name, ())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
