"""An engine without vLLM: a real link to the router and an OpenAI-shaped server that can be told to misbehave.

Completions are a digest of the prompt, so equal prompts have equal answers. A text's tokens are its bytes.
"""

import asyncio
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from aiohttp import web

from vllm_llmd.kernels.hash_chain import chain_names
from vllm_llmd.kv_connector.link import EngineLink, LinkSettings
from vllm_llmd.names import BlockName, EngineId, Epoch, Role
from vllm_llmd.sim.misbehaviour import fail_before, fail_midway
from vllm_llmd.wire import EngineInfo, Load


class Behaviour(Enum):
    """As the failures of answers of simulated engines, and one more."""

    ANSWER = "none"
    FAIL = "error"
    RESET = "reset"
    RESET_AFTER_HEADERS = "reset-after-headers"
    STALL = "stall"
    STALL_MIDWAY = "stall-midway"
    DIE_MIDWAY = "die-midway"
    REFUSE_STREAM_OPTIONS = "answer with status 400 to a request with stream options"


@dataclass(frozen=True)
class Received:
    """One request as it came in; the names of its headers in lower case."""

    path: str
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


@dataclass(frozen=True)
class FakeSettings:
    """`port` 0 takes a free one."""

    id: str
    routers: tuple[str, ...]
    role: Role = "both"
    models: tuple[str, ...] = ("fake",)
    block_size: int = 16
    fingerprint: str = "fake"
    port: int = 0
    max_sequences: int | None = None
    priorities: bool = False
    labels: tuple[tuple[str, str], ...] = ()
    max_model_len: int = 4096


@dataclass
class FakeEngine:
    """`held` is the truth that a router's index must come to equal; change it through `publish`.

    Of what is held, `honest_share` is found by requests; with less than 1 the engine lies. `details`: whether it says
    how much of a prompt was cached. With a `turnstile`, it answers as many requests as that lets through.
    """

    settings: FakeSettings
    epoch: Epoch = field(default_factory=lambda: Epoch(secrets.randbits(63)))
    behaviour: Behaviour = Behaviour.ANSWER
    load: Load = field(default_factory=Load)
    held: set[BlockName] = field(default_factory=set)
    requests: list[Received] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)
    cancelled: int = 0
    honest_share: float = 1.0
    details: bool = True
    turnstile: asyncio.Semaphore | None = None

    async def start(self) -> "FakeEngine":
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/v1/completions", self._complete)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.settings.port).start()
        self.info = EngineInfo(
            id=EngineId(self.settings.id),
            epoch=self.epoch,
            role=self.settings.role,
            http=f"http://127.0.0.1:{self._runner.addresses[0][1]}",
            models=list(self.settings.models),
            block_size=self.settings.block_size,
            num_blocks=1000,
            max_model_len=self.settings.max_model_len,
            labels=dict(self.settings.labels),
            fingerprint=self.settings.fingerprint,
            workers=[],
            priorities=self.settings.priorities,
            max_sequences=self.settings.max_sequences,
        )
        self.link = EngineLink(LinkSettings(self.info, self.settings.routers, lambda: self.load))
        self.link.start()
        return self

    async def stop(self) -> None:
        """Leaves in good order."""
        await asyncio.to_thread(self.link.close)
        await self._runner.cleanup()

    def publish(self, removed: Sequence[BlockName] = (), stored: Sequence[BlockName] = ()) -> None:
        """Changes what is held, and tells."""
        self.held.difference_update(removed)
        self.held.update(stored)
        self.link.publish(False, removed, stored)

    def publish_clear(self) -> None:
        """Drops everything held, and tells."""
        self.held.clear()
        self.link.publish(True, (), ())

    def names(self, prompt: str | Sequence[int]) -> list[BlockName]:
        """The block names of a prompt."""
        tokens = list(prompt.encode()) if isinstance(prompt, str) else prompt
        return chain_names(tokens, self.settings.block_size)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        received = Received(request.path, _lower(request.headers), await request.read())
        self.requests.append(received)
        try:
            if self.turnstile is not None:
                await self.turnstile.acquire()
            return await self._behave(request, received)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _behave(self, request: web.Request, received: Received) -> web.StreamResponse:
        failed = await fail_before(request, self.behaviour.value)
        if failed is not None:
            return failed
        body = received.body
        if self.behaviour is Behaviour.REFUSE_STREAM_OPTIONS and "stream_options" in body:
            return web.json_response({"error": {"message": "stream_options: unknown", "code": 400}}, status=400)
        usage = self._usage(body)
        self._cache(body)
        chunks = _stream_chunks(body, usage) if body.get("stream") else _whole_chunks(body, usage)
        answer = b"".join(chunks)
        self.answers.append(answer)
        response = web.StreamResponse()
        response.headers["X-Fake-Engine"] = self.settings.id
        response.content_type = "text/event-stream" if body.get("stream") else "application/json"
        if not body.get("stream"):
            response.content_length = len(answer)
        await response.prepare(request)
        for number, chunk in enumerate(chunks):
            await response.write(chunk)
            if number == 0:
                await fail_midway(request, self.behaviour.value)
        await response.write_eof()
        return response

    def _usage(self, body: Any) -> dict[str, Any]:
        """What vLLM would say: the last token is always computed."""
        prompt, block_size = _prompt(body), self.settings.block_size
        tokens, hit = len(prompt.encode() if isinstance(prompt, str) else prompt), 0
        for name in self.names(prompt):
            if name not in self.held:
                break
            hit += 1
        cached = int(min(hit, max(tokens - 1, 0) // block_size) * self.honest_share) * block_size
        return {"prompt_tokens": tokens} | (
            {"prompt_tokens_details": {"cached_tokens": cached}} if self.details else {}
        )

    def _cache(self, body: Any) -> None:
        names = self.names(_prompt(body))
        new = [name for name in names if name not in self.held]
        self.publish(stored=new)
        hint = (body.get("kv_transfer_params") or {}).get("llmd")
        if hint is not None:
            self.link.seen(hint["request"], len(names) * self.settings.block_size, names)


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _prompt(body: Any) -> str | list[int]:
    """The text or token ids that a template would give."""
    if "messages" in body:
        return "".join(f"<{message['role']}>{message['content']}" for message in body["messages"])
    prompt: str | list[int] = body["prompt"]
    return prompt


def _words(body: Any) -> list[str]:
    digest = hashlib.blake2b(json.dumps(_prompt(body)).encode(), digest_size=8).hexdigest()
    return [digest[start : start + 4] + " " for start in range(0, len(digest), 4)]


def _stream_chunks(body: Any, usage: dict[str, Any]) -> list[bytes]:
    """As vLLM does it, the fingerprint is in the last event with a choice, or else in the one with the usage."""
    words = _words(body)
    finishes = [None] * (len(words) - 1) + ["stop"]
    events: list[dict[str, Any]] = [
        {"object": "chunk", "choices": [{"index": 0, "text": word, "finish_reason": finish}]}
        for word, finish in zip(words, finishes, strict=True)
    ]
    if (body.get("stream_options") or {}).get("include_usage"):
        events.append({"object": "chunk", "choices": [], "usage": usage})
    events[-1]["system_fingerprint"] = "fake-1"
    written = (json.dumps(event, separators=(",", ":")).encode() for event in events)
    return [*(b"data: " + event + b"\n\n" for event in written), b"data: [DONE]\n\n"]


def _whole_chunks(body: Any, usage: dict[str, Any]) -> list[bytes]:
    choices = [{"index": 0, "text": "".join(_words(body)), "finish_reason": "stop"}]
    answer = json.dumps({"object": "completion", "choices": choices, "usage": usage}).encode()
    return [answer[:10], answer[10:]]
