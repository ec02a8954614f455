"""What the router reads from a client's request: model, prompt as tokens or as canonical text, a size estimate.

Pure. Checks no more than the router itself needs; everything else is for the engine to judge.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar

import msgspec

from vllm_llmd.errors import LlmdError
from vllm_llmd.kernels.json_strings_cpu import hollow
from vllm_llmd.router.members.selector import Selector

Kind = Literal["chat", "completion"]

BYTES_PER_TOKEN: Final = 4
"""Prior for the length of a prompt given as text."""

Made = TypeVar("Made")

_BODY = msgspec.json.Decoder()

LONG_STRING_BYTES: Final = 1024

_STEM: Final = b"vllm-llmd-long-string-"
_MARK: Final = re.compile(b'"(%b[0-9]{8})"' % _STEM)
_MAY_SPELL_A_MARK: Final = re.compile(rb"\\u00[2-7]")
"""ASCII in disguise: honest bodies have none, and in one that has, a string that is not ours could read as a mark."""

Long = Mapping[str, memoryview]
"""Long strings of a body as they are written, by the mark in their place."""

NOTHING_LONG: Final[Long] = MappingProxyType({})

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
    """The client's request cannot be routed. `param` names the field at fault, `code` is OpenAI's for the fault."""

    def __init__(self, text: str, param: str | None = None, code: str = "invalid_request") -> None:
        super().__init__(text)
        self.param = param
        self.code = code


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
    output_tokens: int | None = None
    """The longest answer that the client wants, if it says so."""
    may_be_cut: bool = False
    """Whether the engine is asked to cut a prompt that is too long."""
    selector: Selector | None = None
    """Which engines the client wants, by their labels."""
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    """The client's objectives, for the first token and for each after it."""

    def without_prompt(self) -> "Facts":
        """What stays when the prompt itself is of no use any more."""
        return replace(self, tokens=None if self.tokens is None else array("I"), text=b"")


class Latest(Generic[Made]):
    """What is made of a request, as long as no other one comes: it is looked at, and then placed."""

    def __init__(self) -> None:
        self._made: tuple[Facts, Made] | None = None

    def of(self, facts: Facts, make: Callable[[], Made]) -> Made:
        if self._made is None or self._made[0] is not facts:
            self._made = facts, make()
        return self._made[1]


@dataclass(frozen=True)
class _Prompt:
    tokens: "array[int] | None"
    text: bytes
    size: int
    """In tokens, estimated for a text."""


_NOTHING = _Prompt(None, b"", 0)


class Skimmed(NamedTuple):
    """A body with a mark in place of each long string."""

    body: dict[str, Any]
    long: Long


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


def skim(raw: bytes) -> Skimmed:
    """The body without its long strings, which are only looked at. Raises RequestError as `parse_body` does."""
    found = hollow(raw, _STEM, LONG_STRING_BYTES)
    if found is None or found.text.count(_STEM) != len(found.spans) or _MAY_SPELL_A_MARK.search(found.text):
        return Skimmed(parse_body(raw), NOTHING_LONG)
    try:
        body = parse_body(found.text)
    except RequestError:
        return Skimmed(parse_body(raw), NOTHING_LONG)  # says where it is wrong
    view = memoryview(raw)
    return Skimmed(body, {f"{_STEM.decode()}{i:08d}": view[first:end] for i, (first, end) in enumerate(found.spans)})


def _parse_again(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request body is not valid JSON: {error}") from None


def read_facts(kind: Kind, body: Mapping[str, Any], long: Long = NOTHING_LONG) -> Facts:
    """What routing needs to know of a body, skimmed or whole. Raises RequestError where it makes no sense to us."""
    spelled, model = _Spelled(long), body.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError("model must be a string", "model")
    try:
        prompts = [_chat_prompt(body, spelled)] if kind == "chat" else _completion_prompts(body, spelled)
        seed = spelled.json([kind, model, {name: body[name] for name in _SEED_FIELDS if body.get(name) is not None}])
    except RecursionError:
        raise RequestError("the request body is nested too deeply") from None
    prompt = max(prompts, key=lambda each: each.size, default=_NOTHING)
    salt = body.get("cache_salt")
    salt = spelled.plain(salt) if isinstance(salt, str) and salt else None
    model = None if model is None else spelled.plain(model)
    return Facts(
        model,
        prompt.tokens,
        seed,
        prompt.text,
        prompt.size,
        salt,
        len(prompts),
        output_tokens=_output_tokens(body),
        may_be_cut=body.get("truncate_prompt_tokens") is not None,
    )


def without_prompt(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body when its facts have been read; parsed token ids take several times as much memory as their bytes."""
    return {name: None if name in ("prompt", "messages") else value for name, value in body.items()}


def _output_tokens(body: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        wanted = body.get(name)
        if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted > 0:
            return wanted
    return None


def with_tokens(facts: Facts, tokens: "array[int]") -> Facts:
    """The facts of a prompt given as text, and what its token ids should be."""
    return replace(facts, tokens=tokens, prompt_tokens=len(tokens), tokenized=True)


def _chat_prompt(body: Mapping[str, Any], spelled: "_Spelled") -> _Prompt:
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise RequestError("messages must be a list", "messages")
    tools = body.get("tools")
    pieces: list[bytes | memoryview] = []
    for tool in tools if isinstance(tools, list) else []:
        pieces += (spelled.json(tool), b"\n")
    for message in messages:
        for part in _parts_of(message, spelled):
            pieces += (part, b"\x00")
        pieces.append(b"\n")
    text = b"".join(pieces)
    return _Prompt(None, text, len(text) // BYTES_PER_TOKEN)


def _parts_of(message: Any, spelled: "_Spelled") -> Iterator[bytes | memoryview]:
    """A message in an order of its own, whatever the order in the body."""
    if not isinstance(message, dict):
        yield spelled.json(message)
        return
    other = {name: message[name] for name in sorted(message) if name != "content"}
    role = other.get("role")
    yield spelled.text(role) if len(other) == 1 and isinstance(role, str) else spelled.json(other)
    content = message.get("content")
    for part in content if isinstance(content, list) else (content,):
        yield _content(part, spelled)


def _content(part: Any, spelled: "_Spelled") -> bytes | memoryview:
    """Images and sound count by what they are, not by how many bytes they take."""
    if isinstance(part, str):
        return spelled.text(part)
    if not isinstance(part, dict):
        return spelled.json(part)
    text = part.get("text")
    if part.get("type") in ("text", "input_text", None):
        return spelled.text(text) if isinstance(text, str) else spelled.json(part)
    return spelled.json([part.get("type"), hashlib.blake2b(spelled.json(part), digest_size=16).hexdigest()])


def _completion_prompts(body: Mapping[str, Any], spelled: "_Spelled") -> list[_Prompt]:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [_text_prompt(prompt, spelled)]
    if not isinstance(prompt, list):  # absent, or prompt embeddings: for the engine to judge
        return []
    if prompt and isinstance(prompt[0], int):
        return [_token_prompt(prompt)]
    return [_text_prompt(each, spelled) if isinstance(each, str) else _token_prompt(each) for each in prompt]


def _text_prompt(prompt: str, spelled: "_Spelled") -> _Prompt:
    text = bytes(spelled.text(prompt))
    return _Prompt(None, text, len(text) // BYTES_PER_TOKEN)


def _token_prompt(prompt: Any) -> _Prompt:
    try:
        tokens = array("I", prompt)
    except (TypeError, ValueError, OverflowError):
        return _NOTHING
    return _Prompt(tokens, tokens.tobytes(), len(tokens))


@dataclass(frozen=True)
class _Spelled:
    """Values as JSON spells them: long strings as the client did, all else as most do, without needless escapes."""

    long: Long

    def text(self, text: str) -> bytes | memoryview:
        """A string without its quotation marks."""
        return self.long[text] if text in self.long else self.json(text)[1:-1]

    def plain(self, text: str) -> str:
        """A string as it is meant."""
        return str(json.loads(self._quoted(text))) if text in self.long else text

    def json(self, value: Any) -> bytes:
        try:
            encoded = msgspec.json.encode(value)
        except ValueError:  # a lone surrogate
            encoded = json.dumps(value).encode()
        return _MARK.sub(lambda found: self._quoted(found[1].decode()), encoded) if self.long else encoded

    def _quoted(self, mark: str) -> bytes:
        return b"".join((b'"', self.long[mark], b'"'))
