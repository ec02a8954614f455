"""Decisions recorded by a real router process, and replayed by the command."""

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest

from vllm_llmd.testing.fake_engine import FakeEngine
from vllm_llmd.testing.site import COMPLETIONS, DEADLINE_S, Router, Site, open_client, until


async def command(*arguments: str) -> tuple[int, str, str]:
    """Status and output of `vllm-llmd`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "vllm_llmd.cli", *arguments, stdout=-1, stderr=-1
    )
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def serve(site: Site, engines: list[FakeEngine], requests: int) -> None:
    await site.ready(*engines)
    for number in range(requests):
        body = {"model": "fake", "prompt": f"a private prompt {number % 2} " * 60, "stream": True}
        async with site.post(body, COMPLETIONS) as response:
            assert response.status == 200 and await response.read()


async def test_what_a_router_has_recorded_can_be_replayed(tmp_path: Path) -> None:
    file, report = tmp_path / "decisions", tmp_path / "report.json"
    router = Router(tmp_path / "router.log", ("--record-decisions", str(file), "--policy", "round_robin"))
    await router.start()
    async with open_client() as client:
        site = Site(router, client)
        engines = [await site.engine(name) for name in ("a", "b", "c")]
        await serve(site, engines, 12)
        assert router.end(signal.SIGTERM) == 0, router.log.read_text()
        await asyncio.gather(*(engine.stop() for engine in engines))
    content = file.read_bytes()
    assert content.startswith(b"vllm-llmd decisions 1\n") and b"private" not in content
    flags = ("--policy", "round_robin", "--policy", "cost", "--json", str(report))
    status, said, trouble = await command("replay", str(file), *flags)
    assert (status, trouble) == (0, ""), trouble
    assert said.startswith("12 decisions of round_robin\n") and "time to first byte of 12 streams" in said
    scores = {score["policy"]: score for score in json.loads(report.read_bytes())["scores"]}
    assert scores["taken"]["busiest_to_mean"] == scores["round_robin"]["agree"] == 1.0
    assert scores["cost"]["cached_share"] > scores["taken"]["cached_share"]


async def test_a_router_that_was_killed_leaves_what_can_be_replayed_and_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "decisions"
    router = Router(tmp_path / "router.log", ("--record-decisions", str(file)))
    await router.start()
    async with open_client() as client:
        site = Site(router, client)
        engine = await site.engine("a")
        await serve(site, [engine], 3)
        await until(lambda: site.metric("vllm_llmd_decisions_recorded_total"), lambda count: count == 3)
        router.end(signal.SIGKILL)
        with file.open("ab") as torn:
            torn.write(b"\x00\x01\x00")
        status, said, _ = await command("replay", str(file), "--policy", "cost")
        assert status == 0 and said.startswith("3 decisions of cost\n") and "ends within a record" in said
        await router.start()
        await serve(site, [engine], 2)
        assert await site.metric("vllm_llmd_decisions_lost_total") == 0
        assert router.end(signal.SIGTERM) == 0, router.log.read_text()
        await engine.stop()
    status, said, _ = await command("replay", str(file), "--policy", "cost")
    assert status == 0 and said.startswith("5 decisions of cost\n") and "ends within" not in said


@pytest.mark.parametrize(
    ("name", "said"), [("no/such/folder/file", "cannot be written"), ("letter", "no recording of decisions")]
)
async def test_a_file_that_cannot_be_recorded_to_ends_the_start_with_one_line(
    name: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "letter").write_text("Dear friend")
    flags = ("--port", "0", "--bind", "tcp://127.0.0.1:0", "--record-decisions", str(tmp_path / name))
    status, _, trouble = await command("router", *flags)
    assert status == 2 and trouble.splitlines()[-1].startswith("error: record_decisions: ") and said in trouble
    assert (tmp_path / "letter").read_text() == "Dear friend"
