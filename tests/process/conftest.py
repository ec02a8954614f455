"""Fixtures of the tests that run real processes."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vllm_llmd.kv_connector import link
from vllm_llmd.testing.site import Router, Site, open_client


@pytest.fixture
async def site(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    router = Router(tmp_path / "router.log", getattr(request, "param", ()))
    await router.start()
    async with open_client() as client:
        site = Site(router, client)
        try:
            yield site
        finally:
            await asyncio.gather(*(engine.stop() for engine in site.engines))
            if router.running:
                assert router.end(signal.SIGTERM) == 0, router.log.read_text()
    assert "Traceback" not in router.log.read_text()


@pytest.fixture
def goodbyes_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of this process wait for it; otherwise they only do for a moment."""
    monkeypatch.setattr(link, "GOODBYE_LINGER_MS", 60_000)


@pytest.fixture
async def other(site: Site, tmp_path: Path) -> AsyncIterator[Site]:
    """A second router beside the first, with no engines of its own."""
    router = Router(tmp_path / "other.log", ())
    await router.start()
    yield Site(router, site.client)
    if router.running:
        assert router.end(signal.SIGTERM) == 0, router.log.read_text()
