"""What the router reads from a client's request: model, prompt as tokens or as canonical text, a size estimate.

Pure. Checks no more than the router itself needs; everything else is for the engine to judge.
"""

import hashlib
import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from vllm_llmd.errors import LlmdError

Kind = Literal["chat", "completion"]

BYTES_PER_TOKEN: Final = 4
"""Prior for the length of a prompt given as text."""

_SEED_FIELDS: Final = (
    "cache_salt",
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "documents",
    "reasoning_effort",
)


class RequestError(LlmdError):
    """The client's request cannot be routed. `param` names the field at fault."""

    def __init__(self, text: str, param: str | None = None) -> None:
        super().__init__(text)
        self.param = param


@dataclass(frozen=True)
class Facts:
    """`tokens` is the prompt where the client gave token ids, 4 bytes each. `text` is empty for a batch of prompts.

    `seed` and `text` together decide the prompt's tokens. `salt` keeps its blocks apart from others of the same tokens.
    """

    model: str | None
    tokens: "array[int] | None"
    seed: bytes
    text: bytes
    prompt_tokens: int
    salt: str | None


def parse_body(raw: bytes) -> dict[str, Any]:
    """The request body. Raises RequestError unless it is one JSON object in UTF-8."""
    try:
        body = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(f"the request body must be a JSON object; got {type(body).__name__}")
    return body


def read_facts(kind: Kind, body: Mapping[str, Any]) -> Facts:
    """What routing needs to know. Raises RequestError where the body makes no sense to the router."""
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError("model must be a string", "model")
    tokens, text, prompt_tokens = _chat_prompt(body) if kind == "chat" else _completion_prompt(body)
    seed = _json([kind, model, {name: body[name] for name in _SEED_FIELDS if body.get(name) is not None}])
    salt = body.get("cache_salt")
    return Facts(model, tokens, seed, text, prompt_tokens, salt if isinstance(salt, str) and salt else None)


def _chat_prompt(body: Mapping[str, Any]) -> tuple[None, bytes, int]:
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise RequestError("messages must be a list", "messages")
    tools = body.get("tools")
    lines = [*(tools if isinstance(tools, list) else []), *map(_without_bulk, messages)]
    text = b"".join(_json(line) + b"\n" for line in lines)
    return None, text, len(text) // BYTES_PER_TOKEN


def _completion_prompt(body: Mapping[str, Any]) -> "tuple[array[int] | None, bytes, int]":
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str):
        text = prompt.encode("utf-8", "surrogatepass")
        return None, text, len(text) // BYTES_PER_TOKEN
    if not isinstance(prompt, list):  # absent, or prompt embeddings: for the engine to judge
        return None, b"", 0
    tokens = _token_ids(prompt)
    if tokens is not None:
        return tokens, tokens.tobytes(), len(tokens)
    longest = max(
        (len(part) // (BYTES_PER_TOKEN if isinstance(part, str) else 1) for part in _sized(prompt)), default=0
    )
    return None, b"", longest


def _token_ids(prompt: list[Any]) -> "array[int] | None":
    try:
        return array("I", prompt)
    except (TypeError, OverflowError):
        return None


def _sized(prompts: list[Any]) -> list[str | list[Any]]:
    return [part for part in prompts if isinstance(part, str | list)]


def _without_bulk(message: Any) -> Any:
    """Images and sound count by what they are, not by how many bytes they take."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = [
        part
        if not isinstance(part, dict) or part.get("type") in ("text", "input_text", None)
        else {"type": part.get("type"), "digest": hashlib.blake2b(_json(part), digest_size=16).hexdigest()}
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
