"""From a request to the token ids that an engine makes of it: a model's tokenizer and chat template, without the model.

Text is cut before special tokens, where tokenizing starts anew by definition, and the ids of each piece are kept: the
next turn of a chat costs what is new in it. Thread-safe.
"""

import json
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jinja2
from tokenizers import Tokenizer

from vllm_llmd.errors import ConfigError
from vllm_llmd.router.request import Kind, Unsupported
from vllm_llmd.router.serving.chat_template import NOT_OURS_TO_FOLLOW, ChatTemplate

MAX_TEXT_CHARS: Final = 4 << 20
"""Longer prompts are left to the engine."""

KEPT_TOKENS: Final = 4 << 20
"""Token ids kept, 4 bytes each and the text that they are of: about 40 MiB."""

PROBE: Final = "a"


class ModelTokenizer:
    """One model's."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError unless it holds a tokenizer.json; a chat template is needed for chats alone."""
        config = _json_file(directory / "tokenizer_config.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
            self._templates = _templates(directory, config)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ConfigError(f"tokenizer must be a model directory with a tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._pieces = _Pieces(self._tokenizer)
        self._before, self._after = _framing(self._tokenizer)

    def tokens(self, kind: Kind, body: Mapping[str, Any]) -> "array[int]":
        """The prompt's token ids. Raises Unsupported."""
        if kind == "chat":
            text = self._template(body).render(body)
            framed = bool(body.get("add_special_tokens", False))
        else:
            text, framed = _completion_text(body), bool(body.get("add_special_tokens", True))
        if len(text) > MAX_TEXT_CHARS:
            raise Unsupported("the prompt is too long")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Unsupported("the prompt has half a character") from None
        ids = self._pieces.tokens(text)
        return self._before + ids + self._after if framed else ids

    def _template(self, body: Mapping[str, Any]) -> ChatTemplate:
        name = "tool_use" if body.get("tools") and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise Unsupported("the model has no chat template")
        return self._templates[name]


class _Pieces:
    """Token ids by piece of text, those used longest ago forgotten first."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cuts = _cuts(tokenizer)
        self._known: OrderedDict[str, array[int]] = OrderedDict()
        self._tokens = 0
        self._lock = threading.Lock()

    def tokens(self, text: str) -> "array[int]":
        starts = [0, *(found.start() for found in self._cuts.finditer(text))] if self._cuts else [0]
        pieces = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
        with self._lock:
            known = {piece: self._known[piece] for piece in pieces if piece in self._known}
        missing = [piece for piece in dict.fromkeys(pieces) if piece not in known]
        if missing:
            encoded = self._tokenizer.encode_batch_fast(missing, add_special_tokens=False)
            made = {piece: array("I", each.ids) for piece, each in zip(missing, encoded, strict=True)}
            known |= made
        with self._lock:
            for piece in reversed(known):
                self._keep(piece, known[piece])
        ids: array[int] = array("I")
        for piece in pieces:
            ids += known[piece]
        return ids

    def _keep(self, piece: str, ids: "array[int]") -> None:
        if piece not in self._known:
            self._known[piece] = ids
            self._tokens += len(ids)
        self._known.move_to_end(piece)
        while self._tokens > KEPT_TOKENS:
            self._tokens -= len(self._known.popitem(last=False)[1])


def _cuts(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Where text may be cut: before a special token that takes nothing from its neighbours.

    All tokens that are found before text is normalized are matched, the longest first, as the tokenizer does.
    """
    added = [token for token in tokenizer.get_added_tokens_decoder().values() if not token.normalized]
    if any(token.lstrip or token.single_word for token in added):
        return None
    names = sorted((token.content for token in added if token.content), key=len, reverse=True)
    if not names:
        return None
    alike = next(i for i in range(len(names[-1]), -1, -1) if all(name.startswith(names[0][:i]) for name in names))
    return re.compile(re.escape(names[0][:alike]) + f"(?:{'|'.join(re.escape(name[alike:]) for name in names)})")


def _framing(tokenizer: Tokenizer) -> "tuple[array[int], array[int]]":
    """The ids that the tokenizer puts before and after a text where special tokens are asked for."""
    bare = tokenizer.encode(PROBE, add_special_tokens=False).ids
    framed = tokenizer.encode(PROBE, add_special_tokens=True).ids
    for at in range(len(framed) - len(bare) + 1):
        if framed[at : at + len(bare)] == bare:
            return array("I", framed[:at]), array("I", framed[at + len(bare) :])
    raise ConfigError("tokenizer changes a text by more than what it puts around it; leave it out")


def _completion_text(body: Mapping[str, Any]) -> str:
    for field in NOT_OURS_TO_FOLLOW:
        if body.get(field):
            raise Unsupported(f"{field} is set")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise Unsupported("the prompt is not one text")
    return prompt


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """By name. A file of its own goes before what the configuration says."""
    specials = {name: _content(value) for name, value in config.items() if name.endswith("_token")}
    specials = {name: value for name, value in specials.items() if isinstance(value, str)}
    beside, told = directory / "chat_template.jinja", config.get("chat_template")
    if beside.exists():
        sources = {"default": beside.read_text()}
    elif isinstance(told, list):
        sources = {each["name"]: each["template"] for each in told}
    else:
        sources = {"default": told} if isinstance(told, str) else {}
    try:
        return {name: ChatTemplate(source, specials) for name, source in sources.items()}
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template is none: {error}") from None


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _json_file(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    return read
