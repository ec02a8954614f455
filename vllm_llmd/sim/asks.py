"""What a client asks of a simulated engine, read from OpenAI's request bodies. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vllm_llmd.errors import LlmdError
from vllm_llmd.sim import text
from vllm_llmd.sim.text import Tokens

Kind = Literal["chat", "completion"]

COMPLETION_TOKENS = 16
"""What a completion gets that does not say how many tokens it wants; a chat goes on to its end."""


class AskError(LlmdError):
    """The request makes no sense. `param` names the field at fault."""

    def __init__(self, said: str, param: str | None = None, status: int = 400, code: str = "BadRequestError") -> None:
        super().__init__(said)
        self.param, self.status, self.code = param, status, code


@dataclass(frozen=True)
class Room:
    """What the engine serves: names of models, the first of which is no adapter, and how long a request may be."""

    models: tuple[str, ...]
    max_model_len: int
    answer_tokens: int


@dataclass(frozen=True)
class Ask:
    """One request, of one prompt or of several. `answers` are the tokens that each will get, `ends` why it ends there.

    `adapter` and `cache_salt` keep its blocks apart from others of the same tokens.
    """

    kind: Kind
    model: str
    adapter: str | None
    prompts: list[Tokens]
    answers: list[Tokens]
    ends: list[str]
    stream: bool
    include_usage: bool
    cache_salt: str | None
    priority: int
    kv_transfer_params: Mapping[str, Any] | None
    return_token_ids: bool = False


def read_ask(kind: Kind, body: Any, room: Room) -> Ask:
    """Raises AskError where an engine would refuse."""
    if not isinstance(body, Mapping):
        raise AskError(f"the request body must be a JSON object; got {type(body).__name__}")
    model = body.get("model", room.models[0])
    if model not in room.models:
        raise AskError(f"The model `{model}` does not exist.", "model", 404, "NotFoundError")
    if _count(body, "n", 1) != 1:
        raise AskError("a simulated engine gives one answer: leave out n, or say 1", "n")
    prompts = [_chat(body)] if kind == "chat" else _prompts(body)
    answers, ends = zip(*(_answer(kind, body, prompt, room) for prompt in prompts), strict=True)
    params = body.get("kv_transfer_params")
    options = body.get("stream_options")
    salt = body.get("cache_salt")
    return Ask(
        kind=kind,
        model=model,
        adapter=None if model == room.models[0] else model,
        prompts=prompts,
        answers=list(answers),
        ends=list(ends),
        stream=bool(body.get("stream")),
        include_usage=isinstance(options, Mapping) and bool(options.get("include_usage")),
        return_token_ids=body.get("return_token_ids") is True,
        cache_salt=salt if isinstance(salt, str) and salt else None,
        priority=_count(body, "priority", 0),
        kv_transfer_params=params if isinstance(params, Mapping) else None,
    )


def _chat(body: Mapping[str, Any]) -> Tokens:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(each, Mapping) for each in messages):
        raise AskError("messages must be a list of objects, and not empty", "messages")
    return text.tokenize(*text.chat_pieces(messages, body.get("tools")))


def _prompts(body: Mapping[str, Any]) -> list[Tokens]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return [_prompt(each) for each in prompt]
    return [_prompt(prompt)]


def _prompt(prompt: Any) -> Tokens:
    if isinstance(prompt, str) and prompt:
        return text.tokenize(prompt)
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        try:
            return np.array(prompt, np.uint32)
        except OverflowError:
            raise AskError("token ids must fit into 32 bits", "prompt") from None
    raise AskError("prompt must be a text or a list of token ids, or a list of either, and not empty", "prompt")


def _answer(kind: Kind, body: Mapping[str, Any], prompt: Tokens, room: Room) -> tuple[Tokens, str]:
    left = room.max_model_len - len(prompt)
    if left < 1:
        raise AskError(
            f"This model's maximum context length is {room.max_model_len} tokens; the prompt has {len(prompt)}.",
            "messages" if kind == "chat" else "prompt",
        )
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    most = _count(body, name, left if kind == "chat" else COMPLETION_TOKENS)
    if most < 1:
        raise AskError(f"{name} must be at least 1; got {most}", name)
    most = min(most, left)
    own = max(text.answer_length(prompt, room.answer_tokens), _count(body, "min_tokens", 0))
    if body.get("ignore_eos") or own > most:
        return text.answer_words(prompt, most), "length"
    return text.answer_words(prompt, own), "stop"


def _count(body: Mapping[str, Any], name: str, default: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int:
        raise AskError(f"{name} must be an integer; got {value!r}", name)
    return value
