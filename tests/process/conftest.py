"""Fixtures of the tests that run real processes."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from vllm_llmd.testing.site import DEADLINE_S, Router, Site


@pytest.fixture
async def site(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    router = Router(tmp_path / "router.log", getattr(request, "param", ()))
    await router.start()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as client:
        site = Site(router, client)
        try:
            yield site
        finally:
            await asyncio.gather(*(engine.stop() for engine in site.engines))
            if router.running:
                assert router.end(signal.SIGTERM) == 0, router.log.read_text()
    assert "Traceback" not in router.log.read_text()


@pytest.fixture
async def other(site: Site, tmp_path: Path) -> AsyncIterator[Site]:
    """A second router beside the first, with no engines of its own."""
    router = Router(tmp_path / "other.log", ())
    await router.start()
    yield Site(router, site.client)
    if router.running:
        assert router.end(signal.SIGTERM) == 0, router.log.read_text()
