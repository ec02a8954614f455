"""OpenAI's answers, whole and as events of a stream. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from vllm_llmd.sim.asks import Ask
from vllm_llmd.sim.text import Tokens, detokenize

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Heading:
    """What every piece of an answer repeats."""

    id: str
    created_s: int
    ask: Ask
    begun: set[int] = field(default_factory=set)
    """Of a stream, the prompts whose answers have begun."""

    @property
    def _is_chat(self) -> bool:
        return self.ask.kind == "chat"

    def whole(self, texts: list[str], cached_tokens: int) -> bytes:
        choices = [
            {"index": index, **self._message(said), "logprobs": None, "finish_reason": self.ask.ends[index]}
            for index, said in enumerate(texts)
        ]
        kind = "chat.completion" if self._is_chat else "text_completion"
        return json.dumps(self._head(kind) | {"choices": choices, "usage": self.usage(cached_tokens)}).encode()

    def _message(self, said: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": said}} if self._is_chat else {"text": said}

    def opening(self, index: int) -> list[bytes]:
        """What comes before the first token."""
        if not self._is_chat:
            return []
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return [self._event([choice], {"prompt_token_ids": self._told(self.ask.prompts[index])})]

    def piece(self, index: int, tokens: Tokens, end: str | None) -> bytes:
        """Some more of an answer; `end` is why it ends here, if it does."""
        said, ids = detokenize(tokens), {"token_ids": self._told(tokens)}
        if self._is_chat:
            return self._event([{"index": index, "delta": {"content": said}, "finish_reason": end, **ids}])
        prompt = self.ask.prompts[index] if index not in self.begun else None
        self.begun.add(index)
        told = {"prompt_token_ids": None if prompt is None else self._told(prompt), **ids}
        return self._event([{"index": index, "text": said, "logprobs": None, "finish_reason": end, **told}])

    def _told(self, tokens: Tokens) -> list[int] | None:
        return tokens.tolist() if self.ask.return_token_ids else None

    def closing(self, cached_tokens: int) -> bytes:
        """What comes after the last token."""
        if not self.ask.include_usage:
            return DONE
        return self._event([], {"usage": self.usage(cached_tokens)}) + DONE

    def usage(self, cached_tokens: int) -> dict[str, Any]:
        prompt, answer = (sum(map(len, tokens)) for tokens in (self.ask.prompts, self.ask.answers))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }

    def _event(self, choices: list[dict[str, Any]], more: Mapping[str, Any] = MappingProxyType({})) -> bytes:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        said = {**self._head(kind), "choices": choices, **more}
        return b"data: " + json.dumps(said, separators=(",", ":")).encode() + b"\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created_s, "model": self.ask.model}


def error(said: str, status: int, code: str = "BadRequestError", param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": said, "type": code, "param": param, "code": status}}


def models(names: tuple[str, ...], max_model_len: int) -> dict[str, Any]:
    data = [
        {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "vllm-llmd",
            "root": name,
            "parent": None if name == names[0] else names[0],
            "max_model_len": max_model_len,
        }
        for name in names
    ]
    return {"object": "list", "data": data}
