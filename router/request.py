"""What the router reads from a client's request: model, prompt as tokens or as canonical text, a size estimate.

Pure. Checks no more than the router itself needs; everything else is for the engine to judge.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import msgspec

from vllm_llmd.errors import LlmdError

Kind = Literal["chat", "completion"]

BYTES_PER_TOKEN: Final = 4
"""Prior for the length of a prompt given as text."""

_BODY = msgspec.json.Decoder()

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


class Unsupported(LlmdError):
    """A prompt's token ids cannot be told from its request."""


@dataclass(frozen=True)
class Facts:
    """`tokens` is the prompt where its token ids are known, 4 bytes each. Of several prompts, all is of the longest.

    `seed` and `text` together decide the prompt's tokens. `salt` keeps its blocks apart from others of the same tokens.
    """

    model: str | None
    tokens: "array[int] | None"
    seed: bytes
    text: bytes
    prompt_tokens: int
    salt: str | None
    prompts: int = 1
    tokenized: bool = False
    """Whether the token ids are not the client's but what this router made of its text."""


@dataclass(frozen=True)
class _Prompt:
    tokens: "array[int] | None"
    text: bytes
    size: int
    """In tokens, estimated for a text."""


_NOTHING = _Prompt(None, b"", 0)


def parse_body(raw: bytes) -> dict[str, Any]:
    """The request body as `json.loads` reads it. Raises RequestError unless it is one JSON object in UTF-8.

    msgspec is faster and stricter: what it refuses (NaN, lone surrogates, huge numbers) is read again.
    """
    try:
        body = _BODY.decode(raw)
    except (ValueError, RecursionError):
        body = _parse_again(raw)
    if not isinstance(body, dict):
        raise RequestError(f"the request body must be a JSON object; got {type(body).__name__}")
    return body


def _parse_again(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request body is not valid JSON: {error}") from None


def read_facts(kind: Kind, body: Mapping[str, Any]) -> Facts:
    """What routing needs to know. Raises RequestError where the body makes no sense to the router."""
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError("model must be a string", "model")
    try:
        prompts = [_chat_prompt(body)] if kind == "chat" else _completion_prompts(body)
        seed = _json([kind, model, {name: body[name] for name in _SEED_FIELDS if body.get(name) is not None}])
    except RecursionError:
        raise RequestError("the request body is nested too deeply") from None
    prompt = max(prompts, key=lambda each: each.size, default=_NOTHING)
    salt = body.get("cache_salt")
    salt = salt if isinstance(salt, str) and salt else None
    return Facts(model, prompt.tokens, seed, prompt.text, prompt.size, salt, len(prompts))


def with_tokens(facts: Facts, tokens: "array[int]") -> Facts:
    """The facts of a prompt given as text, and what its token ids should be."""
    return replace(facts, tokens=tokens, prompt_tokens=len(tokens), tokenized=True)


def _chat_prompt(body: Mapping[str, Any]) -> _Prompt:
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise RequestError("messages must be a list", "messages")
    tools = body.get("tools")
    lines = [_json(tool) for tool in tools] if isinstance(tools, list) else []
    lines += [b"\x00".join(_parts_of(message)) for message in messages]
    text = b"\n".join((*lines, b""))
    return _Prompt(None, text, len(text) // BYTES_PER_TOKEN)


def _parts_of(message: Any) -> Iterator[bytes]:
    """A message in an order of its own, whatever the order and the spelling in the body. Text stays what it is."""
    if not isinstance(message, dict):
        yield _json(message)
        return
    other = {name: message[name] for name in sorted(message) if name != "content"}
    role = other.get("role")
    yield _text(role) if len(other) == 1 and isinstance(role, str) else _json(other)
    content = message.get("content")
    for part in content if isinstance(content, list) else (content,):
        yield _content(part)


def _content(part: Any) -> bytes:
    """Images and sound count by what they are, not by how many bytes they take."""
    if isinstance(part, str):
        return _text(part)
    if not isinstance(part, dict):
        return _json(part)
    text = part.get("text")
    if part.get("type") in ("text", "input_text", None):
        return _text(text) if isinstance(text, str) else _json(part)
    return _json([part.get("type"), hashlib.blake2b(_json(part), digest_size=16).hexdigest()])


def _completion_prompts(body: Mapping[str, Any]) -> list[_Prompt]:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [_text_prompt(prompt)]
    if not isinstance(prompt, list):  # absent, or prompt embeddings: for the engine to judge
        return []
    if prompt and isinstance(prompt[0], int):
        return [_token_prompt(prompt)]
    return [_text_prompt(each) if isinstance(each, str) else _token_prompt(each) for each in prompt]


def _text_prompt(prompt: str) -> _Prompt:
    text = _text(prompt)
    return _Prompt(None, text, len(text) // BYTES_PER_TOKEN)


def _token_prompt(prompt: Any) -> _Prompt:
    try:
        tokens = array("I", prompt)
    except (TypeError, ValueError, OverflowError):
        return _NOTHING
    return _Prompt(tokens, tokens.tobytes(), len(tokens))


def _text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _json(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except ValueError:  # a lone surrogate
        return json.dumps(value).encode()
