"""What a real router makes of engines that fall silent or speak otherwise; a test says what their sockets say."""

import asyncio
from collections.abc import Iterator

import pytest
import zmq

from vllm_llmd import wire
from vllm_llmd.names import EngineId, Epoch
from vllm_llmd.testing.site import DEADLINE_S, Site, chat, until


@pytest.fixture
def dealer() -> Iterator["zmq.Socket[bytes]"]:
    """A bare engine's end of the link."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        yield dealer


async def falls_silent(site: Site, dealer: "zmq.Socket[bytes]") -> None:
    """An engine that has been ready; on a slow machine it has to say more than once that it is there."""
    dealer.connect(site.router.zmq)
    info = wire.EngineInfo(EngineId("mute"), Epoch(1), "both", "http://127.0.0.1:9", ["fake"], 16, 1, 1, "f", [])

    async def says_that_it_is_there() -> set[tuple[str, int, str]]:
        dealer.send(wire.encode(wire.Hello(info)))
        dealer.send(wire.encode(wire.Snapshot(info.id, info.epoch, 0, 0, 1, b"")))
        return await site.states()

    await until(says_that_it_is_there, lambda states: ("mute", 1, "ready") in states)


@pytest.mark.parametrize("site", [("--stale-after-ms", "600")], indirect=True)
async def test_a_silent_engine_gets_no_requests(site: Site, dealer: "zmq.Socket[bytes]") -> None:
    await falls_silent(site, dealer)
    await until(site.states, lambda states: ("mute", 1, "stale") in states)
    async with site.post(chat("hello")) as response:
        assert response.status == 503


@pytest.mark.parametrize("site", [("--stale-after-ms", "600", "--gone-after-ms", "1200")], indirect=True)
async def test_an_engine_that_is_silent_for_long_is_forgotten(site: Site, dealer: "zmq.Socket[bytes]") -> None:
    await falls_silent(site, dealer)
    await until(site.states, lambda states: not states)


async def test_an_unknown_version_is_refused_with_one_log_line_and_no_harm(
    site: Site, dealer: "zmq.Socket[bytes]"
) -> None:
    dealer.setsockopt(zmq.IDENTITY, b"stranger")
    dealer.connect(site.router.zmq)
    for _ in range(5):
        dealer.send(bytes((wire.MAJOR + 1, 0)) + b"whatever")
    dealer.send(b"x")
    assert await asyncio.to_thread(dealer.poll, DEADLINE_S * 1000)
    refused = wire.decode_link(dealer.recv())
    assert isinstance(refused, wire.Refused) and "same major version" in refused.reason

    async def lines() -> list[str]:
        return [line for line in site.router.log.read_text().splitlines() if "stranger" in line]

    await until(lines, lambda said: len(said) >= 2)
    engine = await site.engine("a")
    await site.ready(engine)
    assert len(await lines()) == 2  # one for the version, one for the malformed frame
