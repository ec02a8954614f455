"""The client: how each arm is asked, and the time to the first token.

vLLM's own connectors need a proxy in front of two engines. What that proxy does in vLLM's documentation and examples
is done here, within the time that is measured: the prefill engine is asked for one token, then the decode engine with
the parameters that the prefill engine returned.
"""

import asyncio
import json
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import aiohttp

from vllm_llmd.errors import LlmdError

MODEL_NAME = "m"
ANSWER_S = 1800.0
"""vLLM's own connectors may take minutes for a long prompt on few cores."""


class BenchError(LlmdError):
    """Something could not be measured."""


@dataclass(frozen=True)
class Leg:
    """One request to one engine: where to, and what it carries beside the prompt."""

    http: str
    more: Mapping[str, Any] = field(default_factory=dict)
    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))


class Route(Protocol):
    """How an arm is asked."""

    async def to_decode(self, client: "Client", prompt: Sequence[int]) -> Leg:
        """Everything up to the request that is answered with tokens; returns that request."""
        ...


@dataclass(frozen=True)
class Alone:
    """One engine, no help. A salt of its own keeps it from finding what another arm has left in its cache."""

    http: str

    async def to_decode(self, client: "Client", prompt: Sequence[int]) -> Leg:
        return Leg(self.http, {"cache_salt": str(uuid.uuid4())})


@dataclass(frozen=True)
class Ordered:
    """Ours: the decode engine is told who should prefill."""

    http: str
    source: str

    async def to_decode(self, client: "Client", prompt: Sequence[int]) -> Leg:
        return Leg(self.http, {"kv_transfer_params": {"llmd": {"source": self.source, "request": str(uuid.uuid4())}}})


@dataclass(frozen=True)
class Pulled:
    """vLLM's `NixlConnector`: the decode engine is told which blocks of the prefill engine to read."""

    prefill: str
    decode: str

    async def to_decode(self, client: "Client", prompt: Sequence[int]) -> Leg:
        leg = _prefill_leg(self.prefill)
        return Leg(self.decode, {"kv_transfer_params": await client.prefill(leg, prompt)}, leg.request_id)


PUSH_NEEDS = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "tp_size")


@dataclass(frozen=True)
class Pushed:
    """vLLM's `NixlPushConnector`: the decode engine is told of whom to ask that blocks be written into its own."""

    prefill: str
    decode: str

    async def to_decode(self, client: "Client", prompt: Sequence[int]) -> Leg:
        leg = _prefill_leg(self.prefill)
        returned = await client.prefill(leg, prompt)
        params = {"do_remote_prefill": True, "do_remote_decode": False, **{key: returned[key] for key in PUSH_NEEDS}}
        return Leg(self.decode, {"kv_transfer_params": params}, leg.request_id)


def _prefill_leg(http: str) -> Leg:
    unknown = dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
    return Leg(http, {"kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False, **unknown}})


class Client:
    """Asks engines. A connection is used once: an engine that was frozen would answer late on an old one."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=ANSWER_S),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ttft_ms(self, route: Route, prompt: Sequence[int]) -> float:
        """Milliseconds from sending to the first token. Raises BenchError."""
        began = time.perf_counter()
        leg = await route.to_decode(self, prompt)
        first: float | None = None
        try:
            async with self._post(leg, prompt, {"max_tokens": 1, "stream": True}) as response:
                async for line in response.content:
                    if first is None and _carries_a_token(line, leg):
                        first = time.perf_counter()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchError(f"{leg.http} did not answer: {error!r}") from error
        if first is None:
            raise BenchError(f"{leg.http} answered without a token")
        return (first - began) * 1000

    async def mean_ttft_ms(self, route: Route, prompts: Sequence[Sequence[int]]) -> float:
        """The mean over requests that are sent at once."""
        each = await asyncio.gather(*(self.ttft_ms(route, prompt) for prompt in prompts))
        return sum(each) / len(each)

    async def tokens(self, route: Route, prompt: Sequence[int], count: int) -> list[int]:
        """The answer's token ids, greedily chosen. Raises BenchError."""
        leg = await route.to_decode(self, prompt)
        more = {"max_tokens": count, "ignore_eos": True, "return_token_ids": True}
        answer = await self._json(leg, prompt, more)
        token_ids: list[int] = answer["choices"][0]["token_ids"]
        return token_ids

    async def prefill(self, leg: Leg, prompt: Sequence[int]) -> dict[str, Any]:
        """One token from a prefill engine; returns the transfer parameters for the decode engine."""
        params: dict[str, Any] | None = (await self._json(leg, prompt, {"max_tokens": 1})).get("kv_transfer_params")
        if not params:
            raise BenchError(f"{leg.http} returned no transfer parameters: is its connector on?")
        return params

    async def text(self, url: str) -> str:
        """What a GET brings. Raises BenchError."""
        try:
            async with self._session.get(url) as response:
                response.raise_for_status()
                return await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchError(f"{url} did not answer: {error!r}") from error

    async def _json(self, leg: Leg, prompt: Sequence[int], more: Mapping[str, Any]) -> dict[str, Any]:
        try:
            async with self._post(leg, prompt, more) as response:
                answer: dict[str, Any] = await response.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchError(f"{leg.http} did not answer: {error!r}") from error
        if response.status != 200:
            raise BenchError(f"{leg.http} answered {response.status}: {json.dumps(answer)[:500]}")
        return answer

    def _post(self, leg: Leg, prompt: Sequence[int], more: Mapping[str, Any]) -> Any:
        body = {"model": MODEL_NAME, "prompt": prompt, "temperature": 0, **more, **leg.more}
        return self._session.post(f"{leg.http}/v1/completions", json=body, headers={"X-Request-Id": leg.request_id})


def _carries_a_token(line: bytes, leg: Leg) -> bool:
    """Whether a line of a stream is the first piece of an answer. Raises BenchError for anything that is not one."""
    if not line.strip() or line.startswith(b"data: [DONE]"):
        return False
    if not line.startswith(b"data: ") or b'"error"' in line:
        raise BenchError(f"{leg.http} answered {line[:500].decode(errors='replace')}")
    return bool(json.loads(line.removeprefix(b"data: "))["choices"])


class Prompts:
    """Random token ids, new in every request, so that no cache knows them."""

    def __init__(self, seed: str, vocabulary: int) -> None:
        """The same seed gives the same prompts. Ids below 300 are left out: special tokens are among them."""
        self._random = random.Random(seed)
        self._ids = range(300, vocabulary)

    def next(self, tokens: int) -> list[int]:
        return self._random.choices(self._ids, k=tokens)
