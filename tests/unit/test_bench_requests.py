"""What the benchmark sends to whom, and from when to when it measures; against a server that plays both engines."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import pd_requests
from pd_block import counter
from pd_requests import Alone, BenchError, Client, Ordered, Prompts, Pulled, Pushed, Route

PROMPT = [300, 301]
RETURNED = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1]],
    "remote_engine_id": "p",
    "remote_request_id": "r",
    "remote_host": "h",
    "remote_port": 1,
    "tp_size": 1,
}
PREFILL_MS, DECODE_MS, REST_MS = 50, 30, 200


class Engines:
    """Remembers what it was sent; a prefill takes 50 ms, the first token of a stream 30, its end 200 more.

    Its time is made up, and stands still until the client has looked at it `looks_before_the_end` times. `together`
    streams are answered at once.
    """

    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self.returned: dict[str, Any] | None = RETURNED
        self.stream = [{"choices": [{"text": "a"}]}]
        self.status = 200
        self.together = asyncio.Barrier(1)
        self.now_ms = self.looks = self.looks_before_the_end = 0
        self.looked_enough = asyncio.Event()

    def perf_counter(self) -> float:
        self.looks += 1
        if self.looks >= self.looks_before_the_end:
            self.looked_enough.set()
        return self.now_ms / 1000

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.heard.append((request.headers["X-Request-Id"], body))
        if not body.get("stream"):
            self.now_ms += PREFILL_MS
            answer = {"choices": [{"token_ids": [7, 8]}], "kv_transfer_params": self.returned}
            return web.json_response(answer, status=self.status)
        response = web.StreamResponse()
        await response.prepare(request)
        if await self.together.wait() == 0:
            self.now_ms += DECODE_MS
        await self.together.wait()
        for event in self.stream:
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await self.looked_enough.wait()
        self.now_ms += REST_MS
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
async def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    engines = Engines()
    monkeypatch.setattr(pd_requests, "time", engines)
    return engines


@pytest.fixture
async def http(engines: Engines) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/completions", engines.answer)
    server = TestServer(app)
    await server.start_server()
    yield str(server.make_url("")).rstrip("/")
    await server.close()


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with Client() as client:
        yield client


async def test_one_engine_is_asked_without_a_hint_under_a_salt_of_its_own(
    engines: Engines, http: str, client: Client
) -> None:
    await client.ttft_ms(Alone(http), PROMPT)
    await client.ttft_ms(Alone(http), PROMPT)
    first, second = (body for _, body in engines.heard)
    assert first["prompt"] == PROMPT
    assert (first["stream"], first["max_tokens"], first["temperature"]) == (True, 1, 0)
    assert "kv_transfer_params" not in first
    assert first["cache_salt"] != second["cache_salt"]


async def test_ours_is_asked_once_with_the_source(engines: Engines, http: str, client: Client) -> None:
    await client.ttft_ms(Ordered(http, "prefill"), PROMPT)
    ((_, body),) = engines.heard
    assert body["kv_transfer_params"]["llmd"]["source"] == "prefill"
    assert body["kv_transfer_params"]["llmd"]["request"]


async def test_a_pull_is_a_prefill_and_then_a_decode_with_all_that_it_returned(
    engines: Engines, http: str, client: Client
) -> None:
    await client.ttft_ms(Pulled(http, http), PROMPT)
    (first_id, prefill), (second_id, decode) = engines.heard
    assert first_id == second_id
    assert (prefill["max_tokens"], prefill.get("stream", False)) == (1, False)
    assert prefill["kv_transfer_params"]["do_remote_decode"] is True
    assert decode["kv_transfer_params"] == RETURNED


async def test_a_push_tells_the_decode_engine_whom_to_ask_and_no_blocks(
    engines: Engines, http: str, client: Client
) -> None:
    await client.ttft_ms(Pushed(http, http), PROMPT)
    (first_id, _), (second_id, decode) = engines.heard
    assert first_id == second_id
    assert decode["kv_transfer_params"] == {key: RETURNED[key] for key in RETURNED if key != "remote_block_ids"}


@pytest.mark.parametrize(("proxied", "took_ms"), [(False, DECODE_MS), (True, PREFILL_MS + DECODE_MS)])
async def test_time_runs_from_sending_to_the_first_token(
    engines: Engines, http: str, client: Client, proxied: bool, took_ms: float
) -> None:
    engines.looks_before_the_end = 2
    route: Route = Pulled(http, http) if proxied else Alone(http)
    assert await client.ttft_ms(route, PROMPT) == pytest.approx(took_ms)


async def test_events_without_choices_are_no_tokens(engines: Engines, http: str, client: Client) -> None:
    engines.stream = [{"choices": []}]
    with pytest.raises(BenchError, match="without a token"):
        await client.ttft_ms(Alone(http), PROMPT)


async def test_requests_at_once_count_by_their_mean(engines: Engines, http: str, client: Client) -> None:
    engines.together, engines.looks_before_the_end = asyncio.Barrier(8), 16
    mean_ms = await client.mean_ttft_ms(Alone(http), [PROMPT] * 8)
    assert len(engines.heard) == 8
    assert mean_ms == pytest.approx(DECODE_MS)


async def test_an_error_in_a_stream_is_told(engines: Engines, http: str, client: Client) -> None:
    engines.stream = [{"error": {"message": "out of luck"}}]
    with pytest.raises(BenchError, match="out of luck"):
        await client.ttft_ms(Alone(http), PROMPT)


async def test_a_refusal_is_told(engines: Engines, http: str, client: Client) -> None:
    engines.status = 400
    with pytest.raises(BenchError, match="answered 400"):
        await client.tokens(Alone(http), PROMPT, 2)


async def test_a_prefill_engine_without_its_connector_is_named(engines: Engines, http: str, client: Client) -> None:
    engines.returned = None
    with pytest.raises(BenchError, match="no transfer parameters"):
        await client.ttft_ms(Pulled(http, http), PROMPT)


async def test_nobody_there_is_told(client: Client) -> None:
    with pytest.raises(BenchError, match="did not answer"):
        await client.ttft_ms(Alone("http://127.0.0.1:9"), PROMPT)


async def test_tokens_come_as_ids(http: str, client: Client) -> None:
    assert await client.tokens(Alone(http), PROMPT, 2) == [7, 8]


def test_prompts_differ_and_come_again_under_the_same_seed() -> None:
    prompts, again = Prompts("seed", 512), Prompts("seed", 512)
    first = prompts.next(64)
    assert first != prompts.next(64)
    assert first == again.next(64)
    assert all(300 <= token < 512 for token in first)


def test_a_counter_is_the_sum_over_its_labels_or_none() -> None:
    metrics = '# HELP x_total x\nx_total{engine="0"} 3.0\nx_total{engine="1"} 4e0\nx_total_more 9\ny_total 2.0\n'
    assert (counter(metrics, "x_total"), counter(metrics, "y_total"), counter(metrics, "z_total")) == (7, 2, None)
