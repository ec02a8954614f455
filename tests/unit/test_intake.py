"""How the body of a request is read: what a real router does is in `tests/process/test_bodies.py`."""

import asyncio
from collections.abc import Iterator, Mapping

import pytest
from aiohttp import StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.test_utils import make_mocked_request

from vllm_llmd.router.waiting import intake
from vllm_llmd.router.waiting.bodies import Bodies, BodyTooLarge
from vllm_llmd.testing.virtual_loop import VirtualLoop


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.close()


def request(loop: VirtualLoop, headers: Mapping[str, str]) -> tuple[web.Request, StreamReader]:
    protocol = BaseProtocol(loop)
    protocol.connection_made(asyncio.Transport())
    content = StreamReader(protocol, 1 << 16, loop=loop)
    return make_mocked_request("POST", "/", headers=headers, payload=content), content


def test_a_body_that_comes_slowly_is_read_and_one_that_stalls_is_given_up(loop: VirtualLoop) -> None:
    async def read(pieces: int) -> bytes:
        http, content = request(loop, {"Content-Length": "100"})
        for number in range(pieces):
            loop.call_later(intake.STALLED_S * 0.9 * number, content.feed_data, b"x" * 10)
        loop.call_later(intake.STALLED_S * 0.9 * 9.5, content.feed_eof)
        with bodies.hold() as hold:
            return await intake.read(http, hold)

    bodies = Bodies(1 << 20, 1 << 20)
    assert loop.run_until_complete(read(10)) == b"x" * 100
    with pytest.raises(TimeoutError):
        loop.run_until_complete(read(5))
    assert bodies.size_bytes == 0


def test_a_compressed_body_counts_as_what_it_becomes(loop: VirtualLoop) -> None:
    """The HTTP library decompresses; the length that is told is that of what is sent."""

    async def read() -> None:
        http, content = request(loop, {"Content-Length": "10", "Content-Encoding": "gzip"})
        content.feed_data(b"x" * 2000)
        content.feed_eof()
        with bodies.hold() as hold:
            await intake.read(http, hold)

    bodies = Bodies(1000, 5000)
    with pytest.raises(BodyTooLarge):
        loop.run_until_complete(read())
    assert bodies.size_bytes == 0
