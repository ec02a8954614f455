"""Fixtures of the tests of simulated engines."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from vllm_llmd.testing.sim_site import SimSite
from vllm_llmd.testing.site import Router, open_client


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[SimSite]:
    async with AsyncExitStack() as stack:
        client = open_client()
        site = SimSite(tmp_path, await stack.enter_async_context(client))
        try:
            yield site
        finally:
            for fleet in site.fleets:
                await fleet.stop()
            for process in site.processes:
                if process.running:
                    assert process.end() == 0, process.log.read_text()
    for process in site.processes:
        assert "Traceback" not in process.log.read_text()


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    """One process for all tests here; each leaves it without engines."""
    flags = ("--stale-after-ms", "10000", "--gone-after-ms", "20000")  # so long if a goodbye is lost
    router = Router(tmp_path_factory.mktemp("router") / "router.log", flags)
    asyncio.run(router.start())
    yield router
    assert router.end(signal.SIGTERM) == 0, router.log.read_text()
    assert "Traceback" not in router.log.read_text()


@pytest.fixture
async def routed(site: SimSite, router: Router) -> AsyncIterator[SimSite]:
    """A site whose engines join the router."""
    site.router, site.link = router.http, router.zmq
    await site.ready(0)
    yield site
    site.router = ""


@pytest.fixture
async def routed_apart(site: SimSite, tmp_path: Path) -> AsyncIterator[SimSite]:
    """Likewise, with a router of its own, which goes on believing in engines that are killed."""
    router = Router(tmp_path / "router.log", ())
    await router.start()
    site.router, site.link = router.http, router.zmq
    yield site
    site.router = ""
    assert router.end(signal.SIGTERM) == 0, router.log.read_text()
    assert "Traceback" not in router.log.read_text()
