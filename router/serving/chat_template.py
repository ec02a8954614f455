"""Renders a chat as an engine does before it tokenizes: the model's own template, given what vLLM gives it. Pure.

What cannot be rendered with certainty (images, a template or a truncation of the client's) is `Unsupported`. Templates
are the operator's, and run in Jinja's sandbox all the same.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vllm_llmd.router.request import Unsupported

NOT_OURS_TO_FOLLOW: Final = (
    "chat_template",
    "continue_final_message",
    "truncate_prompt_tokens",
    "prompt_embeds",
    "mm_processor_kwargs",
    "media_io_kwargs",
)
"""Fields of a request that change its tokens in ways that are the engine's business."""

_TEXT_PARTS: Final = ("text", "input_text")
_TOOL_FIELDS: Final = ("name", "description", "parameters")
_TOOL_FIELDS_IF_SET: Final = ("strict", "defer_loading")


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said; it renders as its content."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    """Without the HTML escapes of Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _raise_exception(message: str) -> None:
    raise Unsupported(f"the chat template refuses: {message}")


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


class ChatTemplate:
    """One template and the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        """Raises jinja2.TemplateError for a template that is none."""
        environment = _environment()
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)
        self._content_in_parts = any(_goes_through_content(environment.parse(source)))
        self._knows_developers = '"developer"' in source or "'developer'" in source

    def render(self, body: Mapping[str, Any]) -> str:
        """The prompt's text. Raises Unsupported."""
        for field in NOT_OURS_TO_FOLLOW:
            if body.get(field):
                raise Unsupported(f"{field} is set")
        try:
            messages = [self._message(message) for message in body["messages"]]
            tools = body.get("tools")
            return self._template.render(
                **self._special_tokens,
                **{"documents": None, **_arguments(body)},
                messages=messages,
                tools=None if tools is None else [_tool(tool) for tool in tools],
            )
        except (jinja2.TemplateError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise Unsupported(f"the chat template cannot take it: {error}") from None

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        role = message["role"]
        if role == "developer" and not self._knows_developers:
            raise Unsupported("the chat template has no developer")
        texts = _texts(message.get("content"))
        in_parts = self._content_in_parts and role != "tool"
        content = [{"type": "text", "text": text} for text in texts] if in_parts else "\n".join(texts)
        told: dict[str, Any] = {"role": role, "content": content}
        if role == "assistant":
            told |= _said_beside(message)
        elif role == "tool" and "tool_call_id" in message:
            told["tool_call_id"] = message["tool_call_id"]
        elif role == "developer":
            told["tools"] = message.get("tools")
        if isinstance(message.get("name"), str):
            told["name"] = message["name"]
        return told


def _texts(content: Any) -> list[str]:
    """The text parts of a message. Raises Unsupported if there are others."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if part.get("type") in _TEXT_PARTS else None
        if not isinstance(text, str):
            raise Unsupported("a message has parts other than text")
        texts.append(text)
    return texts


def _said_beside(message: Mapping[str, Any]) -> dict[str, Any]:
    """An assistant's tool calls, with their arguments as an object, and its reasoning."""
    beside: dict[str, Any] = {}
    if message.get("tool_calls"):
        beside["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    if message.get("reasoning") is not None:
        beside["reasoning"] = beside["reasoning_content"] = message["reasoning"]
    return beside


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = {}
    return {**call, "function": {**call["function"], "arguments": arguments if isinstance(arguments, dict) else {}}}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as vLLM hands it on: known fields, in its own order."""
    function = tool["function"]
    told = {name: function.get(name) for name in _TOOL_FIELDS}
    told |= {name: function[name] for name in _TOOL_FIELDS_IF_SET if function.get(name) is not None}
    return {"type": "function", "function": told}


def _arguments(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a client may tell the template, and what vLLM adds."""
    arguments = {**(body.get("chat_template_kwargs") or {}), "add_generation_prompt": True}
    for name in ("add_generation_prompt", "documents", "reasoning_effort"):
        if body.get(name) is not None:
            arguments[name] = body[name]
    if body.get("reasoning_effort") is not None:
        arguments.setdefault("enable_thinking", body["reasoning_effort"] != "none")
    return {name: value for name, value in arguments.items() if name not in ("messages", "tools", "chat_template")}


def _goes_through_content(template: nodes.Template) -> Iterator[bool]:
    """A true value for every loop over a message's content: such a template wants it in parts, even if it is text."""
    for loop in template.find_all(nodes.For):
        over: nodes.Node | None = loop.iter
        while isinstance(over, nodes.Filter) or (isinstance(over, nodes.Getitem) and isinstance(over.arg, nodes.Slice)):
            over = over.node
        match over:
            case nodes.Getattr(attr="content") | nodes.Getitem(arg=nodes.Const(value="content")):
                yield True
            case nodes.Name(name="content"):
                yield True
